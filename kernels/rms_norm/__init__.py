"""RMSNorm, with or without a sigmoid gate behind it."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.rms_norm.reference import rms_norm_reference


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    gate: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x rsqrt(mean(x^2) + eps) weight, times sigmoid(gate) where there is one; differentiable in x, weight and gate.

    x [..., D]; weight [D]; gate of x's shape. Computed in float32 (float64 if an input is) and rounded once, to
    `out_dtype` (unset: x's). On an NVIDIA card one kernel forward and one backward, which keep one number a row.
    Raises `ValueError` if the shapes do not fit.
    """
    if weight.shape != x.shape[-1:] or (gate is not None and gate.shape != x.shape):
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)} and gate "
            f"{None if gate is None else tuple(gate.shape)} do not fit"
        )
    out_dtype = out_dtype or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        if choose("rms_norm", x, has_fla=True) == "fla":
            from kimi_rl.kernels.rms_norm.triton_norm import rms_norm_triton

            return rms_norm_triton(x, weight, eps, gate=gate, out_dtype=out_dtype)
        return rms_norm_reference(x, weight, eps, gate=gate, out_dtype=out_dtype)


__all__ = ["rms_norm", "rms_norm_reference"]
