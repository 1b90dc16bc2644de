"""The draw in two launches (Triton): logits are read once, and only a few numbers a block are written.

A program of the first takes BLOCK tokens of one row, and leaves its best token with score and logit, its largest logit
and its sum of exponentials. The second puts a row's blocks together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kimi_rl.kernels.keyed_draw.reference import BLOCK


@triton.jit
def _scored(bits, logits):
    """Logits with Gumbel noise made of 32 random bits each; see `reference.exponential`."""
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + u * 0.2))))
    e = tl.where(u < 0.015625, series, -tl.log(1 - u))
    return logits - tl.log(e)


@triton.jit
def _read(logits_ptr, stride, row, token, temperature, VOCABULARY: tl.constexpr):
    logits = tl.load(logits_ptr + row * stride + token, mask=token < VOCABULARY, other=float("-inf"))
    return logits.to(tl.float32) / temperature


@triton.jit
def _block_kernel(
    logits_ptr, stride, seeds_ptr, positions_ptr, temperature_ptr,
    score_ptr, token_ptr, logit_ptr, largest_ptr, sum_ptr,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    QUARTER: tl.constexpr = BLOCK // 4
    lane = tl.arange(0, QUARTER)
    seed = tl.load(seeds_ptr + row)
    zero = lane * 0
    position = zero + tl.load(positions_ptr + row).to(tl.int32)
    bits0, bits1, bits2, bits3 = tl.philox(seed, block * QUARTER + lane, position, zero, zero)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    else:
        temperature = 1.0

    token = block * BLOCK + lane
    x0 = _read(logits_ptr, stride, row, token, temperature, VOCABULARY)
    x1 = _read(logits_ptr, stride, row, token + QUARTER, temperature, VOCABULARY)
    x2 = _read(logits_ptr, stride, row, token + 2 * QUARTER, temperature, VOCABULARY)
    x3 = _read(logits_ptr, stride, row, token + 3 * QUARTER, temperature, VOCABULARY)

    score, logit = _scored(bits0, x0), x0
    challenger = _scored(bits1, x1)
    token = tl.where(challenger > score, block * BLOCK + lane + QUARTER, token)
    logit = tl.where(challenger > score, x1, logit)
    score = tl.maximum(score, challenger)
    challenger = _scored(bits2, x2)
    token = tl.where(challenger > score, block * BLOCK + lane + 2 * QUARTER, token)
    logit = tl.where(challenger > score, x2, logit)
    score = tl.maximum(score, challenger)
    challenger = _scored(bits3, x3)
    token = tl.where(challenger > score, block * BLOCK + lane + 3 * QUARTER, token)
    logit = tl.where(challenger > score, x3, logit)
    score = tl.maximum(score, challenger)

    best, at = tl.max(score, axis=0, return_indices=True)
    largest = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)  # a block without any token to draw
    total = tl.sum(tl.exp(x0 - base) + tl.exp(x1 - base) + tl.exp(x2 - base) + tl.exp(x3 - base), axis=0)
    place = row * tl.num_programs(1) + block
    tl.store(score_ptr + place, best)
    tl.store(token_ptr + place, tl.sum(tl.where(lane == at, token, 0), axis=0))
    tl.store(logit_ptr + place, tl.sum(tl.where(lane == at, logit, 0.0), axis=0))
    tl.store(largest_ptr + place, largest)
    tl.store(sum_ptr + place, total)


@triton.jit
def _row_kernel(
    score_ptr, token_ptr, logit_ptr, largest_ptr, sum_ptr, drawn_ptr, logprob_ptr, blocks, BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCKS)
    place, real = row * blocks + lane, lane < blocks
    largest = tl.load(largest_ptr + place, mask=real, other=float("-inf"))
    top = tl.max(largest, axis=0)
    sums = tl.load(sum_ptr + place, mask=real, other=0.0)
    total = tl.sum(sums * tl.exp(largest - top), axis=0)
    _, at = tl.max(tl.load(score_ptr + place, mask=real, other=float("-inf")), axis=0, return_indices=True)
    logit = tl.load(logit_ptr + row * blocks + at)
    tl.store(drawn_ptr + row, tl.load(token_ptr + row * blocks + at))
    tl.store(logprob_ptr + row, logit - top - tl.log(total))


def keyed_draw_triton(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `keyed_draw`. Nothing waits for the device."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    blocks = triton.cdiv(vocabulary, BLOCK)
    scores, chosen, largest, sums = torch.empty(4, rows, blocks, device=logits.device)
    tokens = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(rows, device=logits.device)
    _block_kernel[(rows, blocks)](
        logits, logits.stride(0), seeds, positions, seeds if temperature is None else temperature,
        scores, tokens, chosen, largest, sums,
        VOCABULARY=vocabulary, BLOCK=BLOCK, HAS_TEMPERATURE=temperature is not None,
    )  # fmt: skip
    _row_kernel[(rows,)](
        scores, tokens, chosen, largest, sums, drawn, logprobs, blocks, BLOCKS=triton.next_power_of_2(blocks)
    )
    return drawn, logprobs
