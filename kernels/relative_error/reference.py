"""Plain form of the relative error."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype


def relative_error_reference(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Same signature and shapes as `relative_error`."""
    dtype = compute_dtype(found, wanted)
    found, wanted = found.to(dtype), wanted.to(dtype)
    return (found - wanted).square().sum() / wanted.square().sum()
