"""The short convolution over packed sequences, one pass over the tokens each way (Triton).

With the taps w, x before a sequence's first token read from its history, and d = dy silu'(pre):

    pre[t] = sum_i w[W-1-i] x[t-i]      dx[t] = sum_i w[W-1-i] d[t+i]      dw[W-1-i] = sum_t d[t] x[t-i]

t + i stays in t's sequence. A program walks over a run of tokens, a few channels a thread, and keeps the last W - 1
rows of x, the last W of d and its sums of dw in registers: every row is read once (but for the W - 1 at the ends of a
run), nothing lies between the tokens' d and dx, and nothing is shared between threads. Rows are loaded ROWS at a time,
before any of them is used, so that enough bytes are on the way. Sums of dw are added up in a fixed order.

The history of a sequence is given, or is its parent's end in the same row (`Segments`): then nothing is copied. What
its gradient needs are the first W - 1 rows of d of a sequence, which the pass back keeps.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from kimi_rl.kernels.segments import Segments

CHANNELS = {"forward": 256, "backward": 128}  # of a program; a warp reads 512 or 256 bytes of bf16 at a time
ROWS = 4  # on the way at a time
WARPS = 1
PROGRAMS = 6144  # about three waves of a Hopper card's, at most; short inputs take runs of ROWS tokens
NONE, GIVEN, PARENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where a sequence's history is


@triton.jit
def _rows_before(
    x_ptr, history_ptr, parent_first_ptr, parent_last_ptr, at, first, sequence, column, stride_x, channels,
    WIDTH: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before token `at`, the nearest first."""
    rows = ()
    for back in tl.static_range(1, WIDTH):
        source = at - back
        inside = source >= first
        if HISTORY == PARENT:  # the parent's end lies before the sequence as if it were joined to it
            parent_last = tl.load(parent_last_ptr + sequence)
            source = tl.where(inside, source, source - first + parent_last)
            inside = inside | (source >= tl.load(parent_first_ptr + sequence))
        there = column < tl.where(inside, channels, 0)
        x = tl.load(x_ptr + source.to(tl.int64) * stride_x + column, mask=there, other=0.0).to(tl.float32)
        if HISTORY == GIVEN:
            place = (sequence.to(tl.int64) * (WIDTH - 1) + source - first + WIDTH - 1) * channels
            kept = column < tl.where(inside, 0, channels)
            x += tl.load(history_ptr + place + column, mask=kept, other=0.0).to(tl.float32)
        rows = rows + (x,)
    return rows


@triton.jit
def _taps(weight_ptr, column, real, WIDTH: tl.constexpr):
    """The taps by how far they look back."""
    taps = ()
    for back in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight_ptr + column * WIDTH + WIDTH - 1 - back, mask=real, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _load_rows(ptr, at, last, stride, column, channels, ROWS: tl.constexpr):
    rows = ()
    for i in tl.static_range(ROWS):
        place = (at + i).to(tl.int64) * stride
        rows = rows + (tl.load(ptr + place + column, mask=column < tl.where(at + i < last, channels, 0), other=0.0),)
    return rows


@triton.jit(do_not_specialize=["tokens", "run"])
def _forward_kernel(
    x_ptr, weight_ptr, history_ptr, parent_first_ptr, parent_last_ptr, first_ptr, last_ptr, sequence_ptr, y_ptr,
    tokens, run, channels, stride_x,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HISTORY: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = column < channels
    start = tl.program_id(1) * run
    stop = tl.minimum(start + run, tokens)
    taps = _taps(weight_ptr, column, real, WIDTH)
    sequence = tl.load(sequence_ptr + start)
    end = tl.load(last_ptr + start)
    before = _rows_before(
        x_ptr, history_ptr, parent_first_ptr, parent_last_ptr, start, tl.load(first_ptr + start), sequence, column,
        stride_x, channels, WIDTH, HISTORY,
    )  # fmt: skip
    for done in range(0, stop - start, ROWS):
        group = start + done
        loaded = _load_rows(x_ptr, group, stop, stride_x, column, channels, ROWS)
        for i in tl.static_range(ROWS):
            at = group + i
            if (at == end) & (at < stop):
                end = tl.load(last_ptr + at)
                before = _rows_before(
                    x_ptr, history_ptr, parent_first_ptr, parent_last_ptr, at, at, tl.load(sequence_ptr + at), column,
                    stride_x, channels, WIDTH, HISTORY,
                )  # fmt: skip
            window = (loaded[i].to(tl.float32),) + before
            pre = window[0] * taps[0]
            for back in tl.static_range(1, WIDTH):
                pre += window[back] * taps[back]
            if SILU:
                pre *= tl.sigmoid(pre)
            place = at.to(tl.int64) * channels + column
            tl.store(y_ptr + place, pre.to(y_ptr.dtype.element_ty), mask=column < tl.where(at < stop, channels, 0))
            before = window[: WIDTH - 1]


@triton.jit(do_not_specialize=["tokens", "run"])
def _backward_kernel(
    x_ptr, weight_ptr, history_ptr, parent_first_ptr, parent_last_ptr, first_ptr, last_ptr, sequence_ptr,
    dy_ptr, dx_ptr, dweight_ptr, heads_ptr, tokens, run, channels, stride_x, stride_dy,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HISTORY: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = column < channels
    start = tl.program_id(1) * run
    stop = tl.minimum(start + run, tokens)  # of the rows of dx and dw; d of W - 1 tokens more is needed
    taps = _taps(weight_ptr, column, real, WIDTH)
    first, end = tl.load(first_ptr + start), tl.load(last_ptr + start)
    before = _rows_before(
        x_ptr, history_ptr, parent_first_ptr, parent_last_ptr, start, first, tl.load(sequence_ptr + start), column,
        stride_x, channels, WIDTH, HISTORY,
    )  # fmt: skip
    zero = tl.zeros([CHANNELS], dtype=tl.float32)
    dweights, earlier = (zero,), ()
    for _ in tl.static_range(WIDTH - 1):
        dweights, earlier = dweights + (zero,), earlier + (zero,)
    read = tl.minimum(stop + WIDTH - 1, tokens)
    for done in range(0, stop - start + WIDTH - 1, ROWS):
        group = start + done
        loaded = _load_rows(x_ptr, group, read, stride_x, column, channels, ROWS)
        loaded_dy = _load_rows(dy_ptr, group, read, stride_dy, column, channels, ROWS)
        for i in tl.static_range(ROWS):
            at = group + i
            if (at == end) & (at < read):
                first, end = at, tl.load(last_ptr + at)
                before = _rows_before(
                    x_ptr, history_ptr, parent_first_ptr, parent_last_ptr, at, at, tl.load(sequence_ptr + at), column,
                    stride_x, channels, WIDTH, HISTORY,
                )  # fmt: skip
            window = (loaded[i].to(tl.float32),) + before
            d = loaded_dy[i].to(tl.float32)
            if SILU:
                pre = window[0] * taps[0]
                for back in tl.static_range(1, WIDTH):
                    pre += window[back] * taps[back]
                s = tl.sigmoid(pre)
                d *= s * (1.0 + pre * (1.0 - s))
            own = tl.where(at < stop, d, 0.0)
            sums = ()
            for back in tl.static_range(WIDTH):
                sums = sums + (dweights[back] + own * window[back],)
            dweights = sums
            if HISTORY != NONE:  # noqa: SIM102 (known when compiled; what follows is not)
                if (at - first < WIDTH - 1) & (at < stop):
                    head = (tl.load(sequence_ptr + at).to(tl.int64) * (WIDTH - 1) + at - first) * channels
                    tl.store(heads_ptr + head + column, d, mask=real)
            # dx of the token W - 1 back, which d of this token completes
            row = at - (WIDTH - 1)
            known = (d,) + earlier
            dx = known[WIDTH - 1] * taps[0]
            if row >= first:
                for ahead in tl.static_range(1, WIDTH):
                    dx += known[WIDTH - 1 - ahead] * taps[ahead]
            else:  # its sequence is at an end
                row_end = tl.load(last_ptr + row, mask=row >= start, other=0)
                for ahead in tl.static_range(1, WIDTH):
                    dx += tl.where(row + ahead < row_end, known[WIDTH - 1 - ahead] * taps[ahead], 0.0)
            place = row.to(tl.int64) * channels + column
            ours = column < tl.where((row >= start) & (row < stop), channels, 0)
            tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=ours)
            before, earlier = window[: WIDTH - 1], known[: WIDTH - 1]
    for back in tl.static_range(WIDTH):
        place = (tl.program_id(1) * WIDTH + WIDTH - 1 - back).to(tl.int64) * channels
        tl.store(dweight_ptr + place + column, dweights[back], mask=real)


@triton.jit
def _parents_kernel(
    heads_ptr, weight_ptr, children_ptr, child_bounds_ptr, bounds_ptr, dx_ptr, channels,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds to dx of one of a parent's last W - 1 tokens what comes back from the sequences that go on from it."""
    parent, slot = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    real = column < channels
    row = tl.load(bounds_ptr + parent + 1) - (WIDTH - 1) + slot
    if row >= tl.load(bounds_ptr + parent):
        total = tl.zeros([CHANNELS], dtype=tl.float32)
        for i in range(tl.load(child_bounds_ptr + parent), tl.load(child_bounds_ptr + parent + 1)):
            child = tl.load(children_ptr + i)
            for m in tl.static_range(WIDTH - 1):  # the child's token m looks slot - m further back than W - 1
                met = column < tl.where(m <= slot, channels, 0)
                d = tl.load(heads_ptr + (child * (WIDTH - 1) + m) * channels + column, mask=met, other=0.0)
                tap = tl.load(weight_ptr + column * WIDTH + slot - m, mask=met, other=0.0)
                total += d * tap.to(tl.float32)
        place = row * channels + column
        total += tl.load(dx_ptr + place, mask=real, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, total.to(dx_ptr.dtype.element_ty), mask=real)


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


def _grid(tokens: int, channels: int, block: int) -> tuple[tuple[int, int], int]:
    """Blocks of channels, runs of tokens; and the tokens of a run."""
    over_channels = triton.cdiv(channels, block)
    run = triton.cdiv(triton.cdiv(tokens, max(1, PROGRAMS // over_channels)), ROWS) * ROWS
    return (over_channels, triton.cdiv(tokens, run)), run


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, history, layout, parents, silu, output_final_state):
        """x [T, C], weight [C, W], history [N, W-1, C] or None -> y [T, C], and the last inputs [N, C, W-1] or None."""
        (tokens, channels), width = x.shape, weight.shape[1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.kind = (PARENT if parents is not None else NONE if history is None else GIVEN).value
        ends = (None, None) if parents is None else parents.ends_of_parents
        if tokens:
            grid, run = _grid(tokens, channels, CHANNELS["forward"])
            _forward_kernel[grid](
                x, weight, history, *ends, layout.first, layout.last, layout.sequence, y,
                tokens, run, channels, x.stride(0),
                WIDTH=width, SILU=silu, HISTORY=ctx.kind, ROWS=ROWS, CHANNELS=CHANNELS["forward"], num_warps=WARPS,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, history, *ends)
        ctx.layout, ctx.parents, ctx.silu = layout, parents, silu
        final = None
        if output_final_state:
            place, inside, slot = _tail(layout, width - 1)
            final = x[place] * inside[..., None]
            if history is not None:
                final = torch.where(inside[..., None], final, history.gather(1, slot[..., None].expand_as(final)))
            final = final.transpose(1, 2)
        return y, final

    @staticmethod
    def backward(ctx, dy, d_final):
        x, weight, history, *ends = ctx.saved_tensors
        layout, (tokens, channels), width = ctx.layout, x.shape, weight.shape[1]
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dweight = heads = d_history = None
        if ctx.kind != NONE.value:  # zeros: of a short sequence not all are written
            heads = torch.zeros(len(layout.bounds) - 1, width - 1, channels, dtype=torch.float32, device=x.device)
        if tokens:
            block = CHANNELS["backward"]
            grid, run = _grid(tokens, channels, block)
            dweight = torch.empty(grid[1], width, channels, dtype=torch.float32, device=x.device)
            _backward_kernel[grid](
                x, weight, history, *ends, layout.first, layout.last, layout.sequence, dy, dx, dweight, heads,
                tokens, run, channels, x.stride(0), dy.stride(0),
                WIDTH=width, SILU=ctx.silu, HISTORY=ctx.kind, ROWS=ROWS, CHANNELS=block, num_warps=WARPS,
            )  # fmt: skip
            dweight = dweight.sum(0).t().to(weight.dtype)
            if ctx.parents is not None:
                children, child_bounds = ctx.parents.children
                _parents_kernel[(len(child_bounds) - 1, width - 1, grid[0])](
                    heads, weight, children, child_bounds, layout.bounds, dx, channels,
                    WIDTH=width, CHANNELS=block, num_warps=WARPS,
                )  # fmt: skip
        else:
            dweight = torch.zeros_like(weight)
        if history is not None and ctx.needs_input_grad[2]:
            d_history = _d_history(heads, weight).to(history.dtype)
        if d_final is not None:
            place, inside, slot = _tail(layout, width - 1)
            rows = d_final.transpose(1, 2)
            dx.index_add_(0, place.flatten(), (rows * inside[..., None]).flatten(0, 1).to(dx.dtype))
            if d_history is not None:
                kept = (rows * ~inside[..., None]).to(d_history.dtype)
                d_history = d_history.scatter_add(1, slot[..., None].expand_as(kept), kept)
        return dx, dweight, d_history, None, None, None, None


def _tail(layout: Layout, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the last `count` inputs of every sequence [N, count]: place among the tokens (0 where there is none), whether
    it is a token, and otherwise which slot of the history."""
    first, last = layout.bounds[:-1, None], layout.bounds[1:, None]
    place = last - count + torch.arange(count, device=last.device)
    inside = place >= first
    return place.where(inside, 0), inside, (count + place - first).clamp(0, max(count - 1, 0))


def _d_history(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Slot j of a history meets tap j - m at the sequence's token m, for m up to j: [N, W-1, C] from d there."""
    count = heads.shape[1]
    slot = torch.arange(count, device=heads.device)
    ahead = slot[:, None] - slot  # [j, m]
    taps = weight.float()[:, ahead.clamp(min=0)] * (ahead >= 0)  # [C, j, m]
    return (heads.transpose(1, 2)[:, :, None] * taps).sum(-1).transpose(1, 2)


def short_conv_triton(
    x, weight, *, initial_state=None, output_final_state=False, cu_seqlens=None, parents: Segments | None = None,
    activation="silu",
):  # fmt: skip
    """Same signature and shapes as `short_conv`; below float64."""
    batch, length, channels = x.shape
    if cu_seqlens is None:
        layout = layout_of_rows(batch, length, x.device)
    else:
        layout = layout_of(cu_seqlens, length)
    flat = x.reshape(batch * length, channels)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    history = None if initial_state is None else initial_state.transpose(1, 2).to(x.dtype).contiguous()
    y, final = _ShortConv.apply(
        flat, weight.contiguous(), history, layout, parents, activation == "silu", output_final_state
    )
    return y.view(batch, length, channels), final
