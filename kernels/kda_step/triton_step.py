"""One decoding step of a KDA layer in one launch (Triton).

A program takes one head of one sequence. Its state, V x K float32 (64 KiB at 128 x 128), is read once and written
once; all else is small beside it. So the floor is the time of moving the states. A program goes through its state in
pieces of a few rows, so that it needs few registers and many programs share a processor: some read while others write.
The next piece is on its way while one is worked on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kimi_rl.kernels.kda_step.reference import parts_of


@triton.jit
def _conv_inputs(
    new_ptr, conv_state_ptr, weight_ptr, row, slot, channel, first, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    stride_new, stride_slot, stride_channel, stride_time, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The newest input of one head's channels [BLOCK], those its state keeps and its weights, a tuple of [BLOCK] each.

    `channel`: the first of the head's channels among all; `first`: among those of `new_ptr` and `weight_ptr`.
    """
    at = tl.arange(0, BLOCK)
    real = at < SIZE
    new = tl.load(new_ptr + row * stride_new + first + at, mask=real, other=0.0)
    place = conv_state_ptr + slot * stride_slot + (channel + at) * stride_channel
    old = ()
    for time in tl.static_range(LENGTH):
        old = old + (tl.load(place + time * stride_time, mask=real, other=0.0),)
    weights = ()
    for tap in tl.static_range(WIDTH):
        weights = weights + (tl.load(weight_ptr + (first + at) * WIDTH + tap, mask=real, other=0.0),)
    return new, old, weights


@triton.jit
def _convolved(
    new, old, weights, conv_state_ptr, slot, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    stride_slot, stride_channel, stride_time, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution of what `_conv_inputs` read. Moves the conv state on by one."""
    at = tl.arange(0, BLOCK)
    place = conv_state_ptr + slot * stride_slot + (channel + at) * stride_channel
    y = new.to(tl.float32) * weights[WIDTH - 1].to(tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        y += old[LENGTH - WIDTH + 1 + tap].to(tl.float32) * weights[tap].to(tl.float32)
    for time in tl.static_range(LENGTH - 1):
        tl.store(place + time * stride_time, old[time + 1], mask=at < SIZE)
    tl.store(place + (LENGTH - 1) * stride_time, new.to(conv_state_ptr.dtype.element_ty), mask=at < SIZE)
    return y * tl.sigmoid(y)


@triton.jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, gate_ptr, conv_state_ptr, state_ptr, out_ptr,
    q_weight_ptr, k_weight_ptr, v_weight_ptr, a_log_ptr, dt_bias_ptr, norm_weight_ptr, slots_ptr,
    scale, eps,
    stride_q, stride_k, stride_v, stride_g, stride_beta, stride_gate, stride_out,
    stride_conv_slot, stride_conv_channel, stride_conv_time,
    stride_state_slot, stride_state_head, stride_state_v, stride_state_k, stride_slots,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PREFETCH: tl.constexpr,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, SMALL: tl.constexpr, HAS_SLOTS: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    over_k, over_v = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    real_k, real_v = over_k < K, over_v < V
    # May be the gate's own place: a program has read its gate by the time the first of its sums is done.
    out_place = out_ptr + row * stride_out + head * V + over_v
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row * stride_slots).to(tl.int64)
    else:
        slot = row
    if slot < FIRST_SLOT:
        tl.store(out_place, tl.zeros([V_BLOCK], dtype=out_ptr.dtype.element_ty), mask=real_v)
        return

    # Every load of the program but the later pieces', before anything waits for one. The first piece first.
    PIECES: tl.constexpr = V_BLOCK // ROWS
    piece_rows = tl.arange(0, ROWS)
    state_place = (
        state_ptr
        + slot * stride_state_slot
        + head * stride_state_head
        + piece_rows[:, None] * stride_state_v
        + over_k[None, :] * stride_state_k
    )
    state = tl.load(state_place, mask=(piece_rows < V)[:, None] & real_k[None, :], other=0.0)

    new_q, old_q, weights_q = _conv_inputs(
        q_ptr, conv_state_ptr, q_weight_ptr, row, slot, head * K, head * K, K, K_BLOCK,
        stride_q, stride_conv_slot, stride_conv_channel, stride_conv_time, LENGTH, WIDTH,
    )  # fmt: skip
    new_k, old_k, weights_k = _conv_inputs(
        k_ptr, conv_state_ptr, k_weight_ptr, row, slot, (HEADS + head) * K, head * K, K, K_BLOCK,
        stride_k, stride_conv_slot, stride_conv_channel, stride_conv_time, LENGTH, WIDTH,
    )  # fmt: skip
    new_v, old_v, weights_v = _conv_inputs(
        v_ptr, conv_state_ptr, v_weight_ptr, row, slot, 2 * HEADS * K + head * V, head * V, V, V_BLOCK,
        stride_v, stride_conv_slot, stride_conv_channel, stride_conv_time, LENGTH, WIDTH,
    )  # fmt: skip
    raw = tl.load(g_ptr + row * stride_g + head * K + over_k, mask=real_k, other=0.0)
    bias = tl.load(dt_bias_ptr + head * K + over_k, mask=real_k, other=0.0)
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    raw_beta = tl.load(beta_ptr + row * stride_beta + head).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + head * V + over_v, mask=real_v, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + over_v, mask=real_v, other=0.0)

    if SMALL:
        # A channel lies in several threads at once: none may store before all have read.
        tl.debug_barrier()
    q = _convolved(
        new_q, old_q, weights_q, conv_state_ptr, slot, head * K, K, K_BLOCK,
        stride_conv_slot, stride_conv_channel, stride_conv_time, LENGTH, WIDTH,
    )  # fmt: skip
    k = _convolved(
        new_k, old_k, weights_k, conv_state_ptr, slot, (HEADS + head) * K, K, K_BLOCK,
        stride_conv_slot, stride_conv_channel, stride_conv_time, LENGTH, WIDTH,
    )  # fmt: skip
    v = _convolved(
        new_v, old_v, weights_v, conv_state_ptr, slot, 2 * HEADS * K + head * V, V, V_BLOCK,
        stride_conv_slot, stride_conv_channel, stride_conv_time, LENGTH, WIDTH,
    )  # fmt: skip

    q = q * tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6) * scale
    k = k * tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
    kq = tl.sum(k * q, axis=0)
    raw = raw.to(tl.float32) + bias.to(tl.float32)
    softplus = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    decay = tl.exp(-tl.exp(a_log) * softplus)
    beta = tl.sigmoid(raw_beta)

    which = tl.arange(0, PIECES)[:, None]
    v_pieces = tl.reshape(v, [PIECES, ROWS])
    o_pieces = tl.zeros([PIECES, ROWS], dtype=tl.float32)
    for piece in range(PIECES):
        place = state_place + piece * ROWS * stride_state_v
        real_state = (piece * ROWS + piece_rows < V)[:, None] & real_k[None, :]
        if PREFETCH:
            real_next = ((piece + 1) * ROWS + piece_rows < V)[:, None] & real_k[None, :]
            following = tl.load(place + ROWS * stride_state_v, mask=real_next, other=0.0)
        elif piece > 0:
            state = tl.load(place, mask=real_state, other=0.0)
        v_piece = tl.sum(tl.where(which == piece, v_pieces, 0.0), axis=0)
        state = state * decay[None, :]
        # Both sums over the decayed state, so that neither waits for the other: (S + e k) q = S q + e (k q).
        error = (v_piece - tl.sum(state * k[None, :], axis=1)) * beta
        o_piece = tl.sum(state * q[None, :], axis=1) + error * kq
        tl.store(place, state + error[:, None] * k[None, :], mask=real_state)
        o_pieces = tl.where(which == piece, o_piece[None, :], o_pieces)
        if PREFETCH:
            state = following

    o = tl.reshape(o_pieces, [V_BLOCK])
    o = o * tl.rsqrt(tl.sum(tl.where(real_v, o * o, 0.0), axis=0) / V + eps)
    o = o * norm_weight.to(tl.float32) * tl.sigmoid(gate.to(tl.float32))
    tl.store(out_place, o.to(out_ptr.dtype.element_ty), mask=real_v)


# Rows of the state in one piece, whether the next piece is read ahead, warps of a program, and most registers of a
# thread. The fastest of those tried on an H100 80GB at batch 64, 256 and 1,024.
LAUNCH = (64, True, 4, None)


def kda_step_triton(
    q, k, v, raw_g, raw_beta, out_gate, conv_state, state, *,
    conv_weight, A_log, dt_bias, norm_weight, eps: float, slots=None, first_slot: int = 0, scale: float | None = None,
    out=None, launch: tuple[int, bool, int, int | None] | None = None,
):  # fmt: skip
    """Same signature and shapes as `kda_step`. The host reads no tensor, so a CUDA graph can hold it.

    `launch` as `LAUNCH`.
    """
    heads, value_dim = A_log.numel(), norm_weight.numel()
    weights = [w.contiguous() for w in parts_of(conv_weight, (q, k, v))]
    key_dim, width, length = k.shape[-1] // heads, weights[0].shape[-1], conv_state.shape[-1]
    if state.dtype != torch.float32:
        raise ValueError(f"kda_step: the state is kept in float32, found {state.dtype}")
    if length < width - 1:
        raise ValueError(f"kda_step: conv_state holds {length} inputs; a convolution over {width} needs {width - 1}")
    if out is not None and out.stride(-1) != 1:
        raise ValueError("kda_step: the elements of a row of `out` must lie side by side")
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, raw_g, raw_beta, out_gate)]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    rows_of_piece, prefetch, warps, registers = launch or LAUNCH
    blocks = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    _step_kernel[(q.shape[0] * heads,)](
        *rows, conv_state, state, out,
        *weights, A_log.reshape(-1), dt_bias.reshape(-1), norm_weight, q if slots is None else slots,
        key_dim**-0.5 if scale is None else scale, eps,
        *(x.stride(0) for x in rows), out.stride(0), *conv_state.stride(), *state.stride(),
        0 if slots is None else slots.stride(0),
        HEADS=heads, K=key_dim, V=value_dim, K_BLOCK=blocks[0], V_BLOCK=blocks[1],
        ROWS=min(rows_of_piece, blocks[1]), PREFETCH=prefetch,
        LENGTH=length, WIDTH=width, SMALL=min(blocks) < 32 * warps, HAS_SLOTS=slots is not None,
        FIRST_SLOT=0 if slots is None else first_slot,
        num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return out
