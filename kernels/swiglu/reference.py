"""Plain form of silu(a) b."""

import torch

from kimi_rl.kernels.dispatch import compute_dtype


def swiglu_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Same signature and shapes as `swiglu`."""
    dtype = compute_dtype(a, b)
    return (a.to(dtype) * a.to(dtype).sigmoid() * b.to(dtype)).to(a.dtype)
