"""Attention over packed sequences as its rule reads: one mask over all pairs of tokens."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.segments import Segments


def visible(segments: Segments) -> torch.Tensor:
    """bool [T, T]: whether the row's token sees the column's."""
    own, parent = segments.sequence_of_token, segments.parent_of_token
    place = torch.arange(segments.length, device=segments.device)
    belongs = (own[:, None] == own) | (parent[:, None] == own)
    return belongs & (place[:, None] >= place)


def varlen_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Same signature and shapes as `varlen_attention`."""
    dtype = compute_dtype(q, k, v)
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k.to(dtype)) * scale
    weights = scores.masked_fill(~visible(segments), -torch.inf).softmax(-1)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("hqk,khd->qhd", weights, v.to(dtype)).to(v.dtype)
