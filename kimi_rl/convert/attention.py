"""The attention of a source's layer as plain matrices, the same attention written out, and what it does on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.modeling_utils import PreTrainedModel

from kimi_rl.errors import InputError


@dataclass(frozen=True)
class SourceAttention:
    """Grouped softmax attention with a rotary embedding; all tensors float64.

    query [H, D, d], key and value [G, D, d], out [d, H, D] for H heads of size D in G groups and a model of width d:
    head h reads the keys and values of group h // (H / G). Biases [H, D], [G, D], [G, D] or None. query_norm and
    key_norm [D]: weights of the per-head RMS norms of Qwen3, or None. `scale` multiplies the scores. frequencies [D/2]:
    radians by which the rotary embedding turns each pair (p, p + D/2) a token, or None in a layer without it.
    input_norm [d]: weight of the norm in front of the attention.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    norm_eps: float
    scale: float
    frequencies: torch.Tensor | None
    input_norm: torch.Tensor

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def head_dim(self) -> int:
        return self.query.shape[1]


def read_attention(model: PreTrainedModel, index: int) -> SourceAttention:
    """The attention of layer `index` (from 0). Raises InputError on one that has no Kimi Linear counterpart."""
    layer, config = model.base_model.layers[index], model.config
    module = layer.self_attn
    if module.o_proj.bias is not None:
        raise InputError(
            f"SOURCE: layer {index} has a bias on the attention's output, which Kimi Linear has not; choose another"
        )
    size = module.head_dim
    rotary = model.base_model.rotary_emb
    scale = module.scaling
    frequencies = None
    if getattr(module, "use_rope", True):  # SmolLM3 leaves it out in some layers
        frequencies = rotary.inv_freq.double()
        scale *= rotary.attention_scaling**2
        if 2 * len(frequencies) != size:
            raise InputError(
                f"SOURCE: the rotary embedding turns {2 * len(frequencies)} of the heads' {size} channels; "
                "only whole heads can be converted"
            )

    def weight(linear: torch.nn.Linear) -> torch.Tensor:
        return linear.weight.detach().double().view(-1, size, config.hidden_size)

    def bias(linear: torch.nn.Linear) -> torch.Tensor | None:
        return None if linear.bias is None else linear.bias.detach().double().view(-1, size)

    def norm(name: str) -> torch.Tensor | None:
        found = getattr(module, name, None)
        return None if found is None else found.weight.detach().double()

    return SourceAttention(
        query=weight(module.q_proj),
        key=weight(module.k_proj),
        value=weight(module.v_proj),
        out=module.o_proj.weight.detach().double().view(config.hidden_size, -1, size),
        query_bias=bias(module.q_proj),
        key_bias=bias(module.k_proj),
        value_bias=bias(module.v_proj),
        query_norm=norm("q_norm"),
        key_norm=norm("k_norm"),
        norm_eps=config.rms_norm_eps,
        scale=scale,
        frequencies=frequencies,
        input_norm=layer.input_layernorm.weight.detach().double(),
    )


def expand_groups(x: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Groups along `dim` repeated so that there is one per head: exact, since heads of a group read the same keys."""
    return x.repeat_interleave(heads // x.shape[dim], dim=dim)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with its pairs (p, p + D/2) turned by `angles` [T, D/2], as the rotary embedding does."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().unsqueeze(-2).to(x), angles.sin().unsqueeze(-2).to(x)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def source_heads(source: SourceAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T, G, D] of the attention's inputs x [T, d], before the rotary embedding, in x's dtype."""

    def project(weight, bias, norm):
        y = torch.einsum("td,hkd->thk", x, weight.to(x))
        if bias is not None:
            y = y + bias.to(x)
        if norm is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + source.norm_eps) * norm.to(x)
        return y

    return (
        project(source.query, source.query_bias, source.query_norm),
        project(source.key, source.key_bias, source.key_norm),
        project(source.value, source.value_bias, None),
    )


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, frequencies: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one text: weights [H, T, T] and outputs [T, H, V].

    q [T, H, K], k [T, G, K], v [T, G, V]; with `frequencies` [K/2] queries and keys are turned by their positions.
    """
    length, heads = q.shape[:2]
    if frequencies is not None:
        angles = torch.arange(length)[:, None] * frequencies
        q, k = rotate(q, angles), rotate(k, angles)
    k, v = expand_groups(k, heads, 1), expand_groups(v, heads, 1)
    scores = torch.einsum("ihk,jhk->hij", q, k) * scale
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    weights = scores.softmax(-1)
    return weights, torch.einsum("hij,jhv->ihv", weights, v)


@dataclass(frozen=True)
class Looks:
    """What a layer's heads do on texts.

    turn complex [H, D/2]: the mean of exp(i θ (t - s)) over the tokens s that a head looks at from t, by attention
    weight and without a text's first token (heads with nothing to say rest there). read_spread [H]: mean square of
    what an error of 1 in a score can change in the layer's output. query_moment [H, D, D]: mean of q q^T.
    """

    turn: torch.Tensor | None
    read_spread: torch.Tensor
    query_moment: torch.Tensor


def watch_heads(source: SourceAttention, x: torch.Tensor, bounds: Sequence[int]) -> Looks:
    """Looks over the texts of a packed row x [T, d], which `bounds` [0, end_1, ..., T] separates."""
    frequencies = source.frequencies
    pairs = source.head_dim // 2
    turn, looked = torch.zeros(source.heads, pairs, dtype=torch.complex128), 0.0
    spread = torch.zeros(source.heads, dtype=torch.float64)
    moment = torch.zeros(source.heads, source.head_dim, source.head_dim, dtype=torch.float64)
    for start, end in zip(bounds, bounds[1:], strict=False):
        q, k, v = source_heads(source, x[start:end])
        weights, o = softmax_attention(q, k, v, source.scale, frequencies)
        written = torch.einsum("jhv,dhv->jhd", expand_groups(v, source.heads, 1), source.out.to(x))
        read = torch.einsum("ihv,dhv->ihd", o, source.out.to(x))
        mean_power = torch.einsum("hij,jh->ih", weights, written.square().sum(-1))
        spread += (mean_power - read.square().sum(-1)).sum(0).double()
        moment += torch.einsum("thk,thl->hkl", q, q).double()
        if frequencies is not None:
            phases = torch.exp(1j * torch.arange(end - start)[:, None] * frequencies)
            weights[:, :, 0] = 0.0
            turn += torch.einsum("hij,ip,jp->hp", weights.to(phases.dtype), phases, phases.conj())
            looked = looked + weights.sum((1, 2)).double()
    tokens = bounds[-1] - bounds[0]
    return Looks(
        turn=None if frequencies is None else turn / (looked[:, None] + 1e-12),
        read_spread=spread.clamp(min=0) / tokens,
        query_moment=moment / tokens,
    )
