"""How far states are from those wanted, as a share of these: what a distilled layer is trained by."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose, compute_dtype
from kimi_rl.kernels.relative_error.reference import relative_error_reference


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Sum of squared differences over the power of `wanted`; 0: equal, 1: as far off as zeros would be.

    found, wanted: of one shape; taken in float32 (float64 if an input is). Returns a scalar, differentiable in `found`.
    On an NVIDIA card one kernel each way. Raises `ValueError` if the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"relative_error: found {tuple(found.shape)} and wanted {tuple(wanted.shape)} differ")
    wide = compute_dtype(found, wanted) == torch.float64
    with torch.autocast(found.device.type, enabled=False):
        if choose("relative_error", found, has_fla=not wide) == "fla":
            from kimi_rl.kernels.relative_error.triton_error import relative_error_triton

            return relative_error_triton(found, wanted.detach())
        return relative_error_reference(found, wanted.detach())


__all__ = ["relative_error", "relative_error_reference"]
