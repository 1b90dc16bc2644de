"""Plain form of the (gated) RMSNorm."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype


def rms_norm_reference(x, weight, eps: float, *, gate=None, out_dtype=None) -> torch.Tensor:
    """Same signature and shapes as `rms_norm`."""
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    if gate is not None:
        y = y * gate.to(dtype).sigmoid()
    return y.to(out_dtype or x.dtype)
