"""Triton kernel that moves what a KDA decoding step moves and computes nothing: a rung between its floor and itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kimi_rl.kernels.kda_step.triton_step import LAUNCH


@triton.jit
def _move_kernel(
    qkv_ptr, g_ptr, beta_ptr, gate_ptr, conv_state_ptr, state_ptr, out_ptr, factor,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // HEADS, program % HEADS
    over = tl.arange(0, DIM)
    place = state_ptr + program * DIM * DIM + tl.arange(0, ROWS)[:, None] * DIM + over[None, :]
    piece = tl.load(place)
    if REST:
        start = row * HEADS * DIM + head * DIM
        total = tl.load(g_ptr + start + over).to(tl.float32) + tl.load(gate_ptr + start + over).to(tl.float32)
        total += tl.load(beta_ptr + program).to(tl.float32)
        for part in tl.static_range(3):
            channel = row * 3 * HEADS * DIM + part * HEADS * DIM + head * DIM
            total += tl.load(qkv_ptr + channel + over).to(tl.float32)
            at = tl.arange(0, CHUNK)
            conv_place = conv_state_ptr + channel * LENGTH + at
            moved = tl.load(conv_place, mask=at < DIM * LENGTH).to(tl.float32) * factor
            tl.store(conv_place, moved.to(conv_state_ptr.dtype.element_ty), mask=at < DIM * LENGTH)
        tl.store(out_ptr + start + over, (total * factor).to(out_ptr.dtype.element_ty))
    for n in range(DIM // ROWS):
        inside = tl.full([ROWS, DIM], n + 1 < DIM // ROWS, tl.int1)
        following = tl.load(place + (n + 1) * ROWS * DIM, mask=inside)
        tl.store(place + n * ROWS * DIM, piece * factor)
        piece = following


def move_step_bytes(
    qkv: torch.Tensor, raw_g: torch.Tensor, raw_beta: torch.Tensor, out_gate: torch.Tensor,
    conv_state: torch.Tensor, state: torch.Tensor, *, rest: bool, factor: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Scales the states in place by `factor`, in the fused step's own grid and pieces, the next piece read ahead.

    Args:
        qkv: [B, 3*H*D]; raw_g, out_gate: [B, H*D]; raw_beta: [B, H]; conv_state: [B, 3*H*D, L]; state: float32
            [B, H, D, D], D a power of 2. All contiguous.
        rest: also scale the conv states and return, [B, H*D], the inputs' sum times `factor`; else nothing is returned
            that has a meaning.
    """
    (batch, heads, dim, _), length = state.shape, conv_state.shape[-1]
    rows, _, warps, _ = LAUNCH
    out = torch.empty_like(out_gate)
    _move_kernel[(batch * heads,)](
        qkv, raw_g, raw_beta, out_gate, conv_state, state, out, factor,
        HEADS=heads, DIM=dim, ROWS=min(rows, dim), LENGTH=length, CHUNK=triton.next_power_of_2(dim * length),
        REST=rest, num_warps=warps,
    )  # fmt: skip
    return out
