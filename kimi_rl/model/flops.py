"""Floating-point operations of a model, counted from its configuration: for MFU and for the cost of a sample.

A multiply-add counts as two. Norms, activations, the gates' elementwise parts and the softmax are left out, as usual.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import KimiLinearConfig

from kimi_rl.model.modeling import KimiLinearForCausalLM

KDA_CHUNK = 64  # fla's; the work inside a chunk depends on it a little


@dataclass(frozen=True)
class ForwardCost:
    """Operations of one forward: `per_token`, for each token; `per_pair`, for each pair (token, token it sees) in MLA;
    `per_score`, for each token whose log-prob is wanted (the output head)."""

    per_token: float
    per_pair: float
    per_score: float

    def of(self, sequences: Iterable[tuple[int, int]], scored: int = 0) -> float:
        """Operations for `sequences` of (tokens, tokens before them that they see as well)."""
        total = self.per_score * scored
        for tokens, before in sequences:
            total += self.per_token * tokens + self.per_pair * (tokens * before + tokens * (tokens + 1) / 2)
        return total


def forward_cost(config: KimiLinearConfig) -> ForwardCost:
    """The cost of a forward of such a model; a backward costs twice as much. Allocates no weights.

    KDA per token and head (keys K, values V wide, chunks of C tokens): W S, q S and the state's update, 6 K V; inside
    the chunk, where a token meets half of it, k k^T, q k^T, the solve for [U | W] and the read-out, C (3 K + 2 V).
    """
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    matrices = 0.0
    for name, parameter in model.model.named_parameters():
        if parameter.dim() < 2 or "embed_tokens" in name or name.endswith("A_log"):
            continue
        size = parameter.numel()
        if ".experts." in name:
            size = size * config.num_experts_per_tok / config.num_local_experts
        matrices += size
    kda = sum(kind == "linear_attention" for kind in config.layer_types)
    width, heads = config.linear_head_dim, config.linear_num_heads
    delta_rule = heads * (6 * width * width + KDA_CHUNK * 5 * width)
    head_sizes = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    mla = len(config.layer_types) - kda
    return ForwardCost(
        per_token=2 * matrices + kda * delta_rule,
        per_pair=mla * 2 * config.num_attention_heads * head_sizes,
        per_score=2 * config.vocab_size * config.hidden_size,
    )
