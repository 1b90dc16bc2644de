"""Attention over packed sequences through FlexAttention (NVIDIA GPU): the rule becomes a block mask.

Blocks of 128 x 128 pairs in which no token sees another are never computed, so the cost is that of the sequences, not
of the row. Rows are padded to whole blocks: then one compiled kernel serves rows of any length.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kimi_rl.kernels.segments import Segments

BLOCK = 128


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


def padded_length(segments: Segments) -> int:
    return -(-segments.length // BLOCK) * BLOCK


def block_mask(segments: Segments) -> BlockMask:
    """The mask of these segments, made once however many layers ask for it.

    Padding tokens form a sequence of their own (-2), so that every row of the softmax has something to sum over.
    """
    kept = getattr(segments, "_block_mask", None)
    if kept is None:
        extra = padded_length(segments) - segments.length
        own = F.pad(segments.sequence_of_token, (0, extra), value=-2)
        parent = F.pad(segments.parent_of_token, (0, extra), value=-3)

        def rule(b, h, query, key):
            return (query >= key) & ((own[query] == own[key]) | (parent[query] == own[key]))

        size = padded_length(segments)
        kept = create_block_mask(
            rule,
            None,
            None,
            size,
            size,
            device=segments.device,
            BLOCK_SIZE=BLOCK,
            _compile=segments.device.type == "cuda",  # compiled, the mask is never made pair by pair
        )
        segments._block_mask = kept
    return kept


def varlen_attention_flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float
) -> torch.Tensor:
    """Same signature and shapes as `varlen_attention`, without dropout. q, k and v in one dtype below float64."""
    extra = padded_length(segments) - segments.length
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, extra)).transpose(0, 1).unsqueeze(0) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    run = _compiled() if q.device.type == "cuda" else flex_attention
    o = run(q, k, v, block_mask=block_mask(segments), scale=scale)
    return o[0].transpose(0, 1)[: segments.length]
