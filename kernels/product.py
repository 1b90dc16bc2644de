"""Matrix products of narrow inputs, summed and returned in a wide dtype."""

from __future__ import annotations

import torch


def wide_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a [M, K] @ b [K, N], or a batch of such, with products, sums and result in `dtype`.

    The product of two bf16 numbers is exact in float32, so on a card bf16 inputs go through the tensor cores, about ten
    times as fast as a float32 product of the same values and different from it only in the order of the sums.
    """
    if a.is_cuda and dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
