"""silu(a) b: the middle of a gated feed-forward layer."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.swiglu.reference import swiglu_reference


def swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """silu(a) b, computed in float32 (float64 if an input is) and rounded once, to a's dtype; differentiable in both.

    a and b of one shape and dtype. On an NVIDIA card one kernel each way, and silu(a) is not kept for the backward.
    Raises `ValueError` if shapes or dtypes differ.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"swiglu: a {tuple(a.shape)} {a.dtype} and b {tuple(b.shape)} {b.dtype} must be alike")
    if choose("swiglu", a, has_fla=True) == "fla":
        from kimi_rl.kernels.swiglu.triton_swiglu import swiglu_triton

        return swiglu_triton(a, b)
    return swiglu_reference(a, b)


__all__ = ["swiglu", "swiglu_reference"]
