"""The short convolution over packed sequences, one pass over the tokens forward and two backward (Triton).

With the taps w, x before a sequence's first token read from its history, and d = dy silu'(pre):

    pre[t] = sum_i w[W-1-i] x[t-i]      dx[t] = sum_i w[W-1-i] d[t+i]      dw[W-1-i] = sum_t d[t] x[t-i]

t + i stays in t's sequence. The first pass back computes `pre` again and writes d, in x's dtype, while each program
adds up dw over its tokens; the second adds up dx. What concerns only a sequence's ends (its last inputs, the gradient
of its history) is a few rows, and plain PyTorch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

TOKENS, CHANNELS = 32, 128  # of one program at a time
PROGRAMS = 64  # of the first pass back a block of channels, at most


@triton.jit
def _input(
    x_ptr, history_ptr, at, first, sequence, column, back, real, stride_x, channels,
    WIDTH: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """x [TOKENS, CHANNELS] `back` tokens before each; from the history where that is before the sequence."""
    source = at - back
    inside = source >= first
    x = tl.load(
        x_ptr + source.to(tl.int64)[:, None] * stride_x + column[None, :], mask=inside[:, None] & real, other=0.0
    ).to(tl.float32)
    if HAS_HISTORY:  # noqa: SIM102 (known when compiled; what follows is not)
        if tl.max((source < first).to(tl.int32), axis=0) > 0:  # few blocks hold a sequence's first tokens
            slot = source - first + (WIDTH - 1)
            place = (sequence.to(tl.int64)[:, None] * channels + column[None, :]) * (WIDTH - 1) + slot[:, None]
            x += tl.load(history_ptr + place, mask=(~inside)[:, None] & real, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x_ptr, weight_ptr, history_ptr, first_ptr, sequence_ptr, y_ptr, tokens, channels, stride_x,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_HISTORY: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (at < tokens)[:, None] & (column < channels)[None, :]
    first = tl.load(first_ptr + at, mask=at < tokens, other=0)
    sequence = tl.load(sequence_ptr + at, mask=at < tokens, other=0)
    pre = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for back in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + column * WIDTH + WIDTH - 1 - back, mask=column < channels, other=0.0).to(tl.float32)
        x = _input(
            x_ptr, history_ptr, at, first, sequence, column, back, real, stride_x, channels, WIDTH, HAS_HISTORY
        )  # fmt: skip
        pre += x * tap[None, :]
    if SILU:
        pre *= tl.sigmoid(pre)
    place = at.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(y_ptr + place, pre.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _backward_kernel(
    x_ptr, weight_ptr, history_ptr, first_ptr, sequence_ptr, dy_ptr, d_ptr, dweight_ptr,
    tokens, channels, stride_x, stride_dy, blocks,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_HISTORY: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    taps = tl.arange(0, WIDTH_BLOCK)
    dweight = tl.zeros([CHANNELS, WIDTH_BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = block * TOKENS + tl.arange(0, TOKENS)
        real = (at < tokens)[:, None] & (column < channels)[None, :]
        first = tl.load(first_ptr + at, mask=at < tokens, other=0)
        sequence = tl.load(sequence_ptr + at, mask=at < tokens, other=0)
        place = at.to(tl.int64)[:, None] * stride_dy + column[None, :]
        d = tl.load(dy_ptr + place, mask=real, other=0.0).to(tl.float32)
        if SILU:
            pre = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
            for back in tl.static_range(WIDTH):
                place = weight_ptr + column * WIDTH + WIDTH - 1 - back
                tap = tl.load(place, mask=column < channels, other=0.0).to(tl.float32)
                x = _input(
                    x_ptr, history_ptr, at, first, sequence, column, back, real, stride_x, channels, WIDTH, HAS_HISTORY
                )  # fmt: skip
                pre += x * tap[None, :]
            s = tl.sigmoid(pre)
            d *= s * (1.0 + pre * (1.0 - s))
        place = at.to(tl.int64)[:, None] * channels + column[None, :]
        tl.store(d_ptr + place, d.to(d_ptr.dtype.element_ty), mask=real)
        for back in tl.static_range(WIDTH):
            x = _input(
                x_ptr, history_ptr, at, first, sequence, column, back, real, stride_x, channels, WIDTH, HAS_HISTORY
            )  # fmt: skip
            dweight += tl.where((taps == WIDTH - 1 - back)[None, :], tl.sum(d * x, axis=0)[:, None], 0.0)
    place = (tl.program_id(0) * channels + column)[:, None] * WIDTH + taps[None, :]
    tl.store(dweight_ptr + place, dweight, mask=(column < channels)[:, None] & (taps < WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _dx_kernel(
    d_ptr, weight_ptr, last_ptr, dx_ptr, tokens, channels,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (at < tokens)[:, None] & (column < channels)[None, :]
    last = tl.load(last_ptr + at, mask=at < tokens, other=0)
    dx = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for ahead in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + column * WIDTH + WIDTH - 1 - ahead, mask=column < channels, other=0.0).to(tl.float32)
        source = at + ahead
        d = tl.load(
            d_ptr + source.to(tl.int64)[:, None] * channels + column[None, :],
            mask=(source < last)[:, None] & real, other=0.0,
        ).to(tl.float32)  # fmt: skip
        dx += d * tap[None, :]
    place = at.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=real)


class Layout:
    """Of packed sequences, on the device: int32 [T] first token, token after the last, and number, of each token's
    sequence; `bounds` int64 [N + 1]."""

    def __init__(self, bounds: torch.Tensor, length: int):
        numbers = torch.arange(len(bounds) - 1, device=bounds.device)
        sequence = torch.repeat_interleave(numbers, bounds.diff(), output_size=length)
        self.bounds = bounds
        self.first, self.last = bounds[sequence].int(), bounds[sequence + 1].int()
        self.sequence = sequence.int()


_LAYOUTS = WeakTensorKeyDictionary()  # every layer of a forward gets the same `cu_seqlens`


def layout_of(cu_seqlens: torch.Tensor, length: int) -> Layout:
    if cu_seqlens not in _LAYOUTS:
        _LAYOUTS[cu_seqlens] = Layout(cu_seqlens.long().clone(), length)
    return _LAYOUTS[cu_seqlens]


@functools.lru_cache(maxsize=16)
def layout_of_rows(batch: int, length: int, device: torch.device) -> Layout:
    return Layout(torch.arange(batch + 1, device=device) * length, batch * length)


def _warps(history: torch.Tensor | None) -> int:
    return 4 if history is None else 8  # places in the history take registers


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, history, layout, silu, output_final_state):
        """x [T, C], weight [C, W], history [N, C, W-1] or None -> y [T, C], and the last inputs [N, C, W-1] or None."""
        tokens, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if tokens:
            grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(channels, CHANNELS))
            _forward_kernel[grid](
                x, weight, history, layout.first, layout.sequence, y, tokens, channels, x.stride(0),
                WIDTH=weight.shape[1], SILU=silu, HAS_HISTORY=history is not None, TOKENS=TOKENS, CHANNELS=CHANNELS,
                num_warps=_warps(history),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, history)
        ctx.layout, ctx.silu = layout, silu
        final = None
        if output_final_state:
            place, inside, slot = _tail(layout, weight.shape[1] - 1)
            final = x[place] * inside[..., None]
            if history is not None:
                final = torch.where(inside[..., None], final, _slots(history, slot))
            final = final.transpose(1, 2)
        return y, final

    @staticmethod
    def backward(ctx, dy, d_final):
        x, weight, history = ctx.saved_tensors
        layout, (tokens, channels), width = ctx.layout, x.shape, weight.shape[1]
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        d, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        blocks = triton.cdiv(tokens, TOKENS)
        programs, over_channels = min(PROGRAMS, blocks), triton.cdiv(channels, CHANNELS)
        dweight = torch.zeros(programs, channels, width, dtype=torch.float32, device=x.device)
        if tokens:
            sizes = {"WIDTH": width, "TOKENS": TOKENS, "CHANNELS": CHANNELS}
            _backward_kernel[(programs, over_channels)](
                x, weight, history, layout.first, layout.sequence, dy, d, dweight,
                tokens, channels, x.stride(0), dy.stride(0), blocks,
                WIDTH_BLOCK=triton.next_power_of_2(width), SILU=ctx.silu, HAS_HISTORY=history is not None, **sizes,
                num_warps=_warps(history),
            )  # fmt: skip
            _dx_kernel[(blocks, over_channels)](d, weight, layout.last, dx, tokens, channels, **sizes, num_warps=4)
        d_history = None
        if history is not None and ctx.needs_input_grad[2]:
            d_history = _d_history(d, weight, layout).to(history.dtype)
        if d_final is not None:
            place, inside, slot = _tail(layout, width - 1)
            rows = d_final.transpose(1, 2)
            dx.index_add_(0, place.flatten(), (rows * inside[..., None]).flatten(0, 1).to(dx.dtype))
            if d_history is not None:
                kept = (rows * ~inside[..., None]).transpose(1, 2).to(d_history.dtype)
                d_history = d_history.scatter_add(2, slot[:, None].expand_as(kept), kept)
        return dx, dweight.sum(0).to(weight.dtype), d_history, None, None, None


def _tail(layout: Layout, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the last `count` inputs of every sequence [N, count]: place among the tokens (0 where there is none), whether
    it is a token, and otherwise which slot of the history."""
    first, last = layout.bounds[:-1, None], layout.bounds[1:, None]
    place = last - count + torch.arange(count, device=last.device)
    inside = place >= first
    return place.where(inside, 0), inside, (count + place - first).clamp(0, max(count - 1, 0))


def _slots(history: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """history [N, C, W-1] at slot [N, W-1]: [N, W-1, C]."""
    return history.transpose(1, 2).gather(1, slot[..., None].expand(-1, -1, history.shape[1]))


def _d_history(d: torch.Tensor, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Slot j of a history meets tap j - m at the sequence's token m, for m up to j: [N, C, W-1]."""
    count = weight.shape[1] - 1
    place = layout.bounds[:-1, None] + torch.arange(count, device=d.device)
    inside = place < layout.bounds[1:, None]
    rows = d[place.where(inside, 0)].float() * inside[..., None]  # [N, W-1, C]
    slot = torch.arange(count, device=d.device)
    ahead = slot[:, None] - slot  # [j, m]
    taps = weight.float()[:, ahead.clamp(min=0)] * (ahead >= 0)  # [C, j, m]
    return (rows.transpose(1, 2)[:, :, None] * taps).sum(-1)


def short_conv_triton(
    x, weight, *, initial_state=None, output_final_state=False, cu_seqlens=None, activation="silu"
):  # fmt: skip
    """Same signature and shapes as `short_conv`; below float64."""
    batch, length, channels = x.shape
    if cu_seqlens is None:
        layout = layout_of_rows(batch, length, x.device)
    else:
        layout = layout_of(cu_seqlens, length)
    flat = x.reshape(batch * length, channels)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    history = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    y, final = _ShortConv.apply(flat, weight.contiguous(), history, layout, activation == "silu", output_final_state)
    return y.view(batch, length, channels), final
