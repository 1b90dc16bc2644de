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
    lengths = np.array([*segments.lengths(), size - segments.length])
    parents = np.array([*segments.parents, -1])
    filled = np.flatnonzero(lengths)  # a sequence without tokens is in no block
    places = np.full(len(lengths) + 1, -1)  # the last: of the parent -1
    places[filled] = np.arange(len(filled))
    parents, ends = places[parents[filled]], lengths[filled].cumsum()
    # The sequences of each block's first token and of its last. A column's block lies before the row's.
    block = np.arange(size // BLOCK)
    first = np.searchsorted(ends, block * BLOCK, side="right")
    last = np.searchsorted(ends, block * BLOCK + BLOCK - 1, side="right")
    before = block[:, None] > block
    some = (first[:, None] <= last) & before
    np.fill_diagonal(some, True)
    for n in np.flatnonzero(parents >= 0):
        start, seen = ends[n] - lengths[filled[n]], ends[parents[n]] - lengths[filled[parents[n]]]
        some[_touched(start, ends[n]), _touched(seen, ends[parents[n]])] = True
    every = (last[:, None] == first) & before
    # All tokens of a block see what lies within a sequence that starts by itself if all are of it or go on from it.
    roots = np.where(parents >= 0, parents, np.arange(len(parents)))
    family = np.cumsum(np.diff(roots, prepend=-1) != 0)
    root = np.where(family[first] == family[last], roots[first], -1)
    every |= (root[:, None] == first) & (root[:, None] == last) & before
    return some, every


def _touched(start: int, end: int) -> slice:
    """The blocks that tokens start .. end - 1 touch."""
    return slice(start // BLOCK, -(-end // BLOCK))


def block_mask(segments: Segments) -> BlockMask:
    """The mask of these segments, made once however many layers ask for it."""
    kept = getattr(segments, "_block_mask", None)
    if kept is None:
        size = padded_length(segments)
        extra = size - segments.length
        own = F.pad(segments.sequence_of_token, (0, extra), value=-2)
        parent = F.pad(segments.parent_of_token, (0, extra), value=-3)

        def rule(b, h, query, key):
            return (query >= key) & ((own[query] == own[key]) | (parent[query] == own[key]))

        some, every = block_tables(segments)
        part = some & ~every
        # By rows and by columns: `BlockMask.from_kv_blocks` would derive the latter on the card by many small launches.
        keys, full_keys, queries, full_queries = (
            _ordered(table, segments.device) for table in (part, every, part.T, every.T)
        )
        kept = BlockMask((size, size), *keys, *full_keys, *queries, *full_queries, (BLOCK, BLOCK), rule)
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
