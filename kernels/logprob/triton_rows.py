"""The passes over a tile of logits, one each way (Triton).

Forward: log Z, the entropy and the token's log-prob of each row from one read. Backward: dz from the logits, in one
pass, in the dtype that its products want. The formulas are in `torch_logprob.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kimi_rl.kernels.logprob.torch_logprob import Passes, token_logprobs_torch

BLOCK = 4096  # tokens of the vocabulary that a program reads at a time


@triton.jit
def _forward_kernel(
    z_ptr, tokens_ptr, logp_ptr, log_z_ptr, entropy_ptr, inverse, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """With the largest z so far, m: total = sum exp(z - m), mean = sum exp(z - m) (z - m)."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total, mean = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + column, mask=column < SIZE, other=float("-inf")).to(tl.float32) * inverse
        now = tl.maximum(largest, z)
        moved = tl.where(largest == float("-inf"), 0.0, largest - now)
        shift = tl.exp(moved)
        below = tl.where(z == float("-inf"), 0.0, z - now)
        weight = tl.where(z == float("-inf"), 0.0, tl.exp(below))
        mean = (mean + total * moved) * shift + weight * below
        total = total * shift + weight
        largest = now
    top = tl.max(largest, axis=0)
    moved = tl.where(largest == float("-inf"), 0.0, largest - top)
    shift = tl.exp(moved)
    whole = tl.sum(total * shift, axis=0)
    log_z = tl.log(whole) + top
    token = tl.load(tokens_ptr + row)
    tl.store(logp_ptr + row, tl.load(z_ptr + row * stride + token).to(tl.float32) * inverse - log_z)
    tl.store(log_z_ptr + row, log_z)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, tl.log(whole) - tl.sum((mean + total * moved) * shift, axis=0) / whole)


@triton.jit
def _backward_kernel(
    z_ptr, tokens_ptr, log_z_ptr, entropy_ptr, d_logp_ptr, d_entropy_ptr, dz_ptr, inverse, stride, stride_dz,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    log_z = tl.load(log_z_ptr + row)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + column, mask=column < SIZE, other=float("-inf")).to(tl.float32) * inverse
        p = tl.exp(z - log_z)
        dz = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_LOGP:
            dz += tl.load(d_logp_ptr + row) * (tl.where(column == token, 1.0, 0.0) - p)
        if HAS_ENTROPY:
            log_p = tl.where(column < SIZE, z - log_z, 0.0)
            dz -= tl.load(d_entropy_ptr + row) * p * (log_p + tl.load(entropy_ptr + row))
        tl.store(
            dz_ptr + row * stride_dz + column, (dz * inverse).to(dz_ptr.dtype.element_ty), mask=column < SIZE
        )


def forward_rows(z, tokens, logps, log_z, entropies, temperature: float, with_entropy: bool) -> None:
    """As in `Passes`, in float32."""
    if len(z):
        _forward_kernel[(len(z),)](
            z, tokens, logps, log_z, entropies, 1.0 / temperature, z.stride(0),
            SIZE=z.shape[1], BLOCK=_block(z.shape[1]), WITH_ENTROPY=with_entropy, num_warps=8,
        )  # fmt: skip


def backward_rows(z, tokens, log_z, entropies, d_logps, d_entropies, temperature: float, dtype) -> torch.Tensor:
    """As in `Passes`, in float32."""
    dz = torch.empty(z.shape, dtype=dtype, device=z.device)
    if len(z):
        _backward_kernel[(len(z),)](
            z, tokens, log_z, entropies, d_logps, d_entropies, dz, 1.0 / temperature, z.stride(0), dz.stride(0),
            SIZE=z.shape[1], BLOCK=_block(z.shape[1]), HAS_LOGP=d_logps is not None,
            HAS_ENTROPY=d_entropies is not None, num_warps=8,
        )  # fmt: skip
    return dz


def _block(size: int) -> int:
    return min(BLOCK, triton.next_power_of_2(size))


def token_logprobs_triton(hidden, weight, tokens, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same signature and shapes as `token_logprobs_torch`; below float64."""
    return token_logprobs_torch(hidden, weight, tokens, **options, passes=Passes(forward_rows, backward_rows))
