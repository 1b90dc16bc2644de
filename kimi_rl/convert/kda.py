"""A KDA layer from the softmax attention that it replaces.

What each part starts as, and why:

- q, k, v: the source's own rows, one copy of a group's for each of its heads. A delta rule with l2-normalised keys
  needs no other scale: the norm takes it away. The rotary embedding is dropped: decay and convolution carry position.
  The SiLU behind the convolution bends v and makes q and k mostly positive, as a kernel of a softmax is.
- short convolutions: the identity (last tap 1, others 0), so that each token starts by reading itself.
- beta: one strength for all tokens, sigmoid(logit); there is no bias, so it is written into `b_proj` through the
  states' constant part.
- decay: the same for all tokens (`f_b_proj` is 0, so that `f_a_proj`, left random, learns from the first step on).
  Half-lives are spread evenly in the logarithm over a head's channels. Pairs that the rotary embedding turned fast
  matched near tokens only and forget fast; pairs that it hardly turned remember.
- output gate: sigmoid(0) = 1/2 everywhere (`g_b_proj` is 0), and `o_norm.weight` 2 takes that back.
- output projection: the source's, with one factor per head, since the norm in front of it has taken the heads' sizes
  away; then refitted (`calibration.fit_output`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kimi_rl.convert.attention import SourceAttention, expand_groups


@dataclass(frozen=True)
class KdaStart:
    """Half-lives, in tokens, of the fastest and of the slowest channel; the logit of beta."""

    fastest: float
    slowest: float
    beta_logit: float


# Tried on calibration text, layer by layer.
STARTS = tuple(KdaStart(a, b, logit) for a, b in ((2.0, 64.0), (8.0, 512.0)) for logit in (-1.5, 0.0))


def kda_tensors(source: SourceAttention, constant: torch.Tensor, conv_size: int) -> dict[str, torch.Tensor]:
    """What does not depend on a `KdaStart`, under the names of transformers' KDA layer; `constant` u [d]: u · x ≈ 1.

    Biases become part of the weights through `constant`, and per-head norms through their weights alone: KDA
    normalises queries and keys itself. Without either, q, k and v are the source's rows bit for bit.
    """

    def rows(weight, bias, norm) -> torch.Tensor:
        if bias is not None:
            weight = weight + bias.unsqueeze(-1) * constant
        if norm is not None:
            weight = weight * norm.unsqueeze(-1)
        return expand_groups(weight, source.heads, 0).flatten(0, 1)

    width = source.heads * source.head_dim
    taps = torch.zeros(3 * width, 1, conv_size)
    taps[..., -1] = 1.0
    return {
        "q_proj.weight": rows(source.query, source.query_bias, source.query_norm),
        "k_proj.weight": rows(source.key, source.key_bias, source.key_norm),
        "v_proj.weight": rows(source.value, source.value_bias, None),
        "conv1d.weight": taps,
        "forget_gate.f_b_proj.weight": torch.zeros(width, source.head_dim),
        "forget_gate.A_log": torch.zeros(1, 1, source.heads, 1),
        "g_b_proj.weight": torch.zeros(width, source.head_dim),
        "o_norm.weight": torch.full((source.head_dim,), 2.0),
        "o_proj.weight": source.out.flatten(1),
    }


def start_tensors(source: SourceAttention, constant: torch.Tensor, start: KdaStart) -> dict[str, torch.Tensor]:
    """What a `KdaStart` decides: `b_proj` and `dt_bias`."""
    rates = math.log(2) / half_lives(source.head_dim, start)
    return {
        "b_proj.weight": start.beta_logit * constant.expand(source.heads, -1),
        # The decay is exp(-exp(A_log) softplus(dt_bias)) with A_log = 0: the inverse of the softplus.
        "forget_gate.dt_bias": rates.expm1().log().repeat(source.heads),
    }


def half_lives(head_dim: int, start: KdaStart) -> torch.Tensor:
    """Tokens after which a channel has forgotten half, float64 [D]: equal for the two channels of a rotary pair."""
    pairs = head_dim // 2
    place = torch.arange(pairs, dtype=torch.float64) / max(pairs - 1, 1)
    return (start.fastest * (start.slowest / start.fastest) ** place).repeat(2)
