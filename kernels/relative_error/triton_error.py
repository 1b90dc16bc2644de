"""The relative error in one pass each way (Triton).

    error = sum (f - w)^2 / P with P = sum w^2        d error / df = 2 (f - w) / P

The forward's programs each add up their part, so that the sums' order is always the same. In PyTorch's operations the
states, in bf16, become four tensors in float32 on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
PROGRAMS = 1024  # of the forward, at most


@triton.jit
def _forward_kernel(found_ptr, wanted_ptr, sums_ptr, size, BLOCK: tl.constexpr):
    error, power = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(found_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        wanted = tl.load(wanted_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        error += (found - wanted) * (found - wanted)
        power += wanted * wanted
    tl.store(sums_ptr + tl.program_id(0), tl.sum(error, axis=0))
    tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(power, axis=0))


@triton.jit
def _backward_kernel(found_ptr, wanted_ptr, power_ptr, d_error_ptr, d_found_ptr, size, BLOCK: tl.constexpr):
    scale = 2.0 * tl.load(d_error_ptr) / tl.load(power_ptr)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(found_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    wanted = tl.load(wanted_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(d_found_ptr + at, (scale * (found - wanted)).to(d_found_ptr.dtype.element_ty), mask=at < size)


class _RelativeError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, found, wanted):
        found, wanted = found.contiguous(), wanted.contiguous()
        programs = max(1, min(PROGRAMS, triton.cdiv(found.numel(), BLOCK)))
        sums = torch.empty(2, programs, dtype=torch.float32, device=found.device)
        _forward_kernel[(programs,)](found, wanted, sums, found.numel(), BLOCK=BLOCK, num_warps=8)
        error, power = sums.sum(1)
        ctx.save_for_backward(found, wanted, power)
        return error / power

    @staticmethod
    def backward(ctx, d_error):
        found, wanted, power = ctx.saved_tensors
        d_found = torch.empty_like(found)
        if found.numel():
            grid = (triton.cdiv(found.numel(), BLOCK),)
            _backward_kernel[grid](found, wanted, power, d_error, d_found, found.numel(), BLOCK=BLOCK, num_warps=8)
        return d_found, None


def relative_error_triton(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Same signature and shapes as `relative_error`; below float64."""
    return _RelativeError.apply(found, wanted)
