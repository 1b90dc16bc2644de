"""The forget gate in one launch each way (Triton).

With x = raw_g + dt_bias and rate = exp(A_log): g = -rate softplus(x), dx = -rate sigmoid(x) dg, dA_log = sum g dg.
x and A_log are clamped as in the PyTorch form, and the gradient is zero where they are, so nothing overflows.
A backward program takes one head and adds up its parameters' gradients over its rows, in an order of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of one program at a time
PROGRAMS = 64  # of the backward a head, at most


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to float32's precision for any x: log1p(u) as log(w) u / (w - 1) with w = 1 + u (Kahan)."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    return tl.maximum(x, 0.0) + tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    raw_ptr, a_log_ptr, bias_ptr, g_ptr, rows, largest_x, largest_a,
    HEADS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (column < K)[None, :]
    place = (row[:, None] * HEADS + head) * K + column[None, :]
    x = tl.load(raw_ptr + place, mask=real, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + head * K + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    rate = tl.exp(tl.minimum(tl.load(a_log_ptr + head).to(tl.float32), largest_a))
    tl.store(g_ptr + place, -rate * _softplus(tl.minimum(x, largest_x)), mask=real)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward_kernel(
    raw_ptr, a_log_ptr, bias_ptr, dg_ptr, dx_ptr, da_ptr, dbias_ptr, rows, blocks, largest_x, largest_a,
    HEADS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + head * K + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    rate = tl.exp(tl.minimum(a_log, largest_a))
    dbias, da = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        real = (row < rows)[:, None] & (column < K)[None, :]
        place = (row[:, None] * HEADS + head) * K + column[None, :]
        x = tl.load(raw_ptr + place, mask=real, other=0.0).to(tl.float32) + bias
        dg = tl.load(dg_ptr + place, mask=real, other=0.0).to(tl.float32)
        dx = tl.where(x <= largest_x, -rate * tl.sigmoid(x) * dg, 0.0)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=real)
        dbias += tl.sum(tl.where(real, dx, 0.0), axis=0)
        da += tl.sum(-rate * _softplus(tl.minimum(x, largest_x)) * dg, axis=0)
    part = tl.program_id(0) * HEADS + head
    tl.store(dbias_ptr + part * K + column, dbias, mask=column < K)
    tl.store(da_ptr + part, tl.where(a_log <= largest_a, tl.sum(da, axis=0), 0.0))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw_g, A_log, dt_bias, limits):
        heads, raw_g = A_log.numel(), raw_g.contiguous()
        key_dim, rows = raw_g.shape[-1] // heads, raw_g.numel() // raw_g.shape[-1]
        g = torch.empty(raw_g.shape, dtype=torch.float32, device=raw_g.device)
        block = triton.next_power_of_2(key_dim)
        many = max(1, ELEMENTS // block)
        if rows:
            _forward_kernel[(triton.cdiv(rows, many), heads)](
                raw_g, A_log, dt_bias, g, rows, *limits, HEADS=heads, K=key_dim, BLOCK=block, ROWS=many, num_warps=4
            )
        ctx.save_for_backward(raw_g, A_log, dt_bias)
        ctx.limits = limits
        return g.unflatten(-1, (heads, key_dim))

    @staticmethod
    def backward(ctx, dg):
        raw_g, A_log, dt_bias = ctx.saved_tensors
        heads, dg = A_log.numel(), dg.contiguous()
        key_dim, rows = raw_g.shape[-1] // heads, raw_g.numel() // raw_g.shape[-1]
        block = triton.next_power_of_2(key_dim)
        many = max(1, ELEMENTS // block)
        blocks = triton.cdiv(rows, many)
        programs = min(PROGRAMS, blocks)
        dx = torch.empty_like(raw_g)
        da = torch.empty(programs, heads, dtype=torch.float32, device=dg.device)
        dbias = torch.empty(programs, heads * key_dim, dtype=torch.float32, device=dg.device)
        if rows:
            _backward_kernel[(programs, heads)](
                raw_g, A_log, dt_bias, dg, dx, da, dbias, rows, blocks, *ctx.limits,
                HEADS=heads, K=key_dim, BLOCK=block, ROWS=many, num_warps=4,
            )  # fmt: skip
        return dx, da.sum(0).view_as(A_log).to(A_log), dbias.sum(0).view_as(dt_bias).to(dt_bias), None


def kda_gate_triton(
    raw_g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, *, limits: tuple[float, float]
) -> torch.Tensor:
    """Same signature and shapes as `kda_gate`; below float64. `limits`: the largest raw_g + dt_bias and A_log."""
    return _Gate.apply(raw_g, A_log, dt_bias, limits)
