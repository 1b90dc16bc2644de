"""Attention over packed sequences through FlexAttention (NVIDIA GPU): the rule becomes a block mask.

Blocks of 128 x 128 pairs in which no token sees another are never computed, and in blocks where every token sees every
other the rule is not asked, so the cost is that of the sequences, not of the row. Rows are padded to whole blocks: then
one compiled kernel serves rows of any length. The tables of blocks come from the borders, on the host: making them
with `create_block_mask` would compile once more for each of the first lengths.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kimi_rl.kernels.segments import Segments, to_device

BLOCK = 128


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


def padded_length(segments: Segments) -> int:
    """Tokens in whole blocks; at least two, since a size of 1 would be compiled for separately."""
    return max(2, -(-segments.length // BLOCK)) * BLOCK


def block_tables(segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """bool [blocks, blocks]: whether any token of the row's block sees any of the column's, and whether all see all.

    The padding is one more sequence, so that every row of the softmax has something to sum over.
    """
    size = padded_length(segments)
    bounds, parents = [*segments.bounds, size], [*segments.parents, -1]
    some, every = (np.zeros((size // BLOCK, size // BLOCK), dtype=bool) for _ in range(2))
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            continue
        touched, inside = _blocks(start, end)
        for row in range(touched.start, touched.stop):
            some[row, touched.start : row + 1] = True
        for row in range(inside.start, inside.stop):
            every[row, inside.start : row] = True
        if parents[n] >= 0:
            seen, whole = _blocks(bounds[parents[n]], bounds[parents[n] + 1])
            some[touched, seen] = bounds[parents[n]] < bounds[parents[n] + 1]
            every[inside, whole] = True
    return some, every


def _blocks(start: int, end: int) -> tuple[slice, slice]:
    """Blocks that tokens start .. end - 1 touch, and those that lie in them whole."""
    first, last = -(-start // BLOCK), end // BLOCK
    return slice(start // BLOCK, -(-end // BLOCK)), slice(first, max(first, last))


def block_mask(segments: Segments) -> BlockMask:
    """The mask of these segments, made once however many layers ask for it."""
    kept = getattr(segments, "_block_mask", None)
    if kept is None:
        extra = padded_length(segments) - segments.length
        own = F.pad(segments.sequence_of_token, (0, extra), value=-2)
        parent = F.pad(segments.parent_of_token, (0, extra), value=-3)

        def rule(b, h, query, key):
            return (query >= key) & ((own[query] == own[key]) | (parent[query] == own[key]))

        some, every = block_tables(segments)
        tables = [*_ordered(some & ~every, segments.device), *_ordered(every, segments.device)]
        kept = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=rule)
        segments._block_mask = kept
    return kept


def _ordered(table: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many columns each row has, int32 [1, 1, blocks], and which, first, int32 [1, 1, blocks, blocks]."""
    rows, places = table.nonzero()
    counts = table.sum(1)
    columns = np.zeros(table.shape, dtype=np.int32)  # what stands behind a row's count is not read
    columns[rows, np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = places
    return tuple(to_device(torch.from_numpy(x.astype(np.int32))[None, None], device) for x in (counts, columns))


def varlen_attention_flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float
) -> torch.Tensor:
    """Same signature and shapes as `varlen_attention`, without dropout. q, k and v in one dtype below float64."""
    extra = padded_length(segments) - segments.length
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, extra)).transpose(0, 1).unsqueeze(0) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    run = _compiled() if q.device.type == "cuda" else flex_attention
    # In float32 the default tiles of wide heads do not fit into a card's shared memory with every PyTorch.
    small = q.dtype == torch.float32 and q.shape[-1] > 128
    options = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1} if small else None
    o = run(q, k, v, block_mask=block_mask(segments), scale=scale, kernel_options=options)
    return o[0].transpose(0, 1)[: segments.length]
