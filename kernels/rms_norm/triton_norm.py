"""The (gated) RMSNorm in one launch each way (Triton).

With r = rsqrt(mean(x^2) + eps), x^ = r x and s = sigmoid(gate):

    y = x^ w s    dx = r (d - x^ mean(d x^)) with d = dy w s    dw = sum dy x^ s    dgate = dy x^ w s (1 - s)

The forward keeps r, one number a row. The backward's programs each add up dw over their rows, so that the sum's order
does not depend on which program is quicker.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of one program at a time
PROGRAMS = 512  # of the backward, at most


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, scale_ptr, rows, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (column < SIZE)[None, :]
    place = row[:, None] * SIZE + column[None, :]
    x = tl.load(x_ptr + place, mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    y = x * scale[:, None] * tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        y *= tl.sigmoid(tl.load(gate_ptr + place, mask=real, other=0.0).to(tl.float32))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward_kernel(
    x_ptr, gate_ptr, weight_ptr, scale_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr, rows, blocks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        real = (row < rows)[:, None] & (column < SIZE)[None, :]
        place = row[:, None] * SIZE + column[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(x_ptr + place, mask=real, other=0.0).to(tl.float32) * scale
        d = tl.load(dy_ptr + place, mask=real, other=0.0).to(tl.float32)
        if HAS_GATE:
            passed = tl.sigmoid(tl.load(gate_ptr + place, mask=real, other=0.0).to(tl.float32))
            d *= passed
            dgate = d * unit * weight * (1.0 - passed)
            tl.store(dgate_ptr + place, dgate.to(dgate_ptr.dtype.element_ty), mask=real)
        dweight += tl.sum(d * unit, axis=0)
        d *= weight
        dx = scale * (d - unit * (tl.sum(d * unit, axis=1) / SIZE)[:, None])
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=real)
    tl.store(dweight_ptr + tl.program_id(0) * SIZE + column, dweight, mask=column < SIZE)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, eps, out_dtype):
        size = x.shape[-1]
        x, gate = x.contiguous(), None if gate is None else gate.contiguous()
        rows = x.numel() // size
        y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(size)
        many = max(1, ELEMENTS // block)
        if rows:
            _forward_kernel[(triton.cdiv(rows, many),)](
                x, gate, weight, y, scale, rows, eps,
                SIZE=size, BLOCK=block, ROWS=many, HAS_GATE=gate is not None, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, gate, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, scale = ctx.saved_tensors
        size, rows, dy = x.shape[-1], scale.numel(), dy.contiguous()
        block = triton.next_power_of_2(size)
        many = max(1, ELEMENTS // block)
        blocks = triton.cdiv(rows, many)
        programs = min(PROGRAMS, blocks)
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        dweight = torch.empty(programs, size, dtype=torch.float32, device=x.device)
        if rows:
            _backward_kernel[(programs,)](
                x, gate, weight, scale, dy, dx, dgate, dweight, rows, blocks,
                SIZE=size, BLOCK=block, ROWS=many, HAS_GATE=gate is not None, num_warps=4,
            )  # fmt: skip
        return dx, dweight.sum(0).to(weight.dtype), dgate, None, None


def rms_norm_triton(x, weight, eps: float, *, gate=None, out_dtype=None) -> torch.Tensor:
    """Same signature and shapes as `rms_norm`; below float64."""
    return _RMSNorm.apply(x, weight, gate, eps, out_dtype or x.dtype)
