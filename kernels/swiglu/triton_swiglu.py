"""silu(a) b in one launch each way (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _forward_kernel(a_ptr, b_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (a * tl.sigmoid(a) * b).to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _backward_kernel(a_ptr, b_ptr, dy_ptr, da_ptr, db_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(da_ptr + at, (dy * b * s * (1.0 + a * (1.0 - s))).to(da_ptr.dtype.element_ty), mask=at < size)
    tl.store(db_ptr + at, (dy * a * s).to(db_ptr.dtype.element_ty), mask=at < size)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        y = torch.empty_like(a)
        if a.numel():
            _forward_kernel[(triton.cdiv(a.numel(), BLOCK),)](a, b, y, a.numel(), BLOCK=BLOCK, num_warps=8)
        return y

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        dy, da, db = dy.contiguous(), torch.empty_like(a), torch.empty_like(b)
        if a.numel():
            grid = (triton.cdiv(a.numel(), BLOCK),)
            _backward_kernel[grid](a, b, dy, da, db, a.numel(), BLOCK=BLOCK, num_warps=8)
        return da, db


def swiglu_triton(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Same signature and shapes as `swiglu`; below float64."""
    return _SwiGLU.apply(a, b)
