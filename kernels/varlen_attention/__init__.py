"""Causal attention over packed sequences, some of which go on from another: MLA's attention in training."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.segments import Segments
from kimi_rl.kernels.varlen_attention.reference import varlen_attention_reference
from kimi_rl.kernels.varlen_attention.torch_sdpa import varlen_attention_torch


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(q k^T scale) v, where a token sees its own sequence up to itself, and its sequence's parent.

    q, k [T, H, K]; v [T, H, V], V and K may differ; differentiable in all three. Returns [T, H, V] in v's dtype.
    `dropout` of the attention weights. Raises `ValueError` if the segments do not cover the T tokens.
    """
    if not q.shape[0] == k.shape[0] == v.shape[0] == segments.length:
        raise ValueError(
            f"cu_seqlens must run from 0 to the packed length {q.shape[0]}, found 0..{segments.length} "
            f"(k {k.shape[0]}, v {v.shape[0]})"
        )
    # FlexAttention has neither dropout nor heads narrower than 16.
    flex = not dropout and min(q.shape[-1], v.shape[-1]) >= 16
    choice = choose("varlen_attention", q, has_fla=False, has_flex=flex)
    if choice == "flex":
        from kimi_rl.kernels.varlen_attention.flex import varlen_attention_flex

        return varlen_attention_flex(q, k, v, segments, scale=scale).to(v.dtype)
    run = varlen_attention_reference if choice == "reference" else varlen_attention_torch
    return run(q, k, v, segments, scale=scale, dropout=dropout)


__all__ = ["varlen_attention", "varlen_attention_reference", "varlen_attention_torch"]
