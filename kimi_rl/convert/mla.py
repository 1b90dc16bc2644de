"""A NoPE MLA layer from the softmax attention that it replaces: closed forms only.

MLA keeps one latent z = RMSNorm(A x) of `kv_lora_rank` numbers a token, from which all heads' keys and values are
B z; a query meets a key of `qk_nope_head_dim` channels, made of z, and `qk_rope_head_dim` more that all heads share.
Kimi Linear rotates neither.

- Position is dropped. Of the rotary embedding there remains its mean over the distances at which a head looks
  (`Looks.turn`), which is one turn and one factor per head and pair of channels, and is written into the query.
- A and B: where `kv_lora_rank` covers all keys and values (2 G D numbers), they are reproduced. Where it does not,
  the best ones of that rank: errors of keys weigh what they change in scores (the moment of the queries) and scores in
  the output, errors of values what the output projection makes of them.
- The latent's norm is not linear. But x itself comes from a norm: y = x / input_norm has the same length for every
  token. A is therefore written as an orthonormal set of directions in y, and directions that keys and values leave
  over are filled with those where y is largest. The latent's length is then nearly constant, and the norm's weight is
  its mean, the best constant in least squares. At full width (`kv_lora_rank` = d) the norm changes nothing at all.
- The shared key starts at 0 (its queries stay random, so that it learns from the first step on). So do the values'
  channels beyond the source's (`v_head_dim` is what vLLM's kernels know), and what `o_proj` makes of them stays random.
- Biases: of the keys' nothing is left (the same for all keys: a softmax does not see it); those of queries and
  values are written into the weights through the states' constant part. Per-head norms of queries and keys (Qwen3)
  become their weights times the mean of what the norm divides by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_rl.convert.attention import Looks, SourceAttention, expand_groups, softmax_attention, source_heads


@dataclass(frozen=True)
class Factors:
    """Keys and values of all groups from a latent, float64: down A [R, d], up B [2 G D, R] (keys, then values).

    `lost`: share of the weighted power of keys and values that the rank leaves out.
    """

    down: torch.Tensor
    up: torch.Tensor
    lost: float


def absorb(source: SourceAttention, x: torch.Tensor, constant: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """query [H, D, d], key [G, D, d] and value [G, D, d] without biases and per-head norms, fitted on x [T, d]."""
    query, key, value = source.query, source.key, source.value
    if source.query_bias is not None:
        query = query + source.query_bias.unsqueeze(-1) * constant
    if source.value_bias is not None:
        value = value + source.value_bias.unsqueeze(-1) * constant
    return _absorb_norm(query, source.query_norm, source, x), _absorb_norm(key, source.key_norm, source, x), value


def _absorb_norm(weight: torch.Tensor, norm: torch.Tensor | None, source: SourceAttention, x: torch.Tensor):
    """Least squares: c_h y closest to y / rms(y) over y = W_h x."""
    if norm is None:
        return weight
    y = torch.einsum("td,hkd->thk", x.double(), weight)
    rms = (y.square().mean(-1) + source.norm_eps).sqrt()
    power = y.square().sum(-1)
    factor = (power / rms).sum(0) / power.sum(0)
    return weight * factor[:, None, None] * norm[:, None]


def turn_queries(query: torch.Tensor, turn: torch.Tensor | None) -> torch.Tensor:
    """Rows of query [H, D, d] with the pairs (p, p + D/2) multiplied by the complex `turn` [H, D/2]."""
    if turn is None:
        return query
    first, second = query.chunk(2, dim=1)
    real, imaginary = turn.real.unsqueeze(-1), turn.imag.unsqueeze(-1)
    return torch.cat([first * real - second * imaginary, second * real + first * imaginary], dim=1)


def factorise(
    source: SourceAttention, key: torch.Tensor, value: torch.Tensor, x: torch.Tensor, looks: Looks, rank: int
) -> Factors:
    """Keys and values [G, D, d] through a latent of `rank` (at most d) numbers; x [T, d], the calibration inputs."""
    stacked = torch.cat([key.flatten(0, 1), value.flatten(0, 1)])
    moment = x.double().T @ x.double() / len(x)
    down, up, lost = stacked, torch.eye(len(stacked), dtype=torch.float64), 0.0
    if len(stacked) > rank:
        root = _block_roots(source, looks)
        values, vectors = torch.linalg.eigh(moment)
        spread = vectors * values.clamp(min=0).sqrt()
        left, sizes, _ = torch.linalg.svd(root @ stacked @ spread, full_matrices=False)
        up = torch.linalg.solve(root, left[:, :rank])
        down = left[:, :rank].T @ root @ stacked
        lost = float(sizes[rank:].square().sum() / sizes.square().sum())
    lengths = _lengths(source)
    directions, coordinates = _orthonormal(down * lengths)
    up = up @ coordinates
    if len(directions) < rank:
        directions = _fill(directions, moment / lengths / lengths[:, None], rank)
        up = torch.cat([up, up.new_zeros(len(up), rank - up.shape[1])], dim=1)
    return Factors(directions / lengths, up, lost)


def _lengths(source: SourceAttention) -> torch.Tensor:
    """What x is divided by, [d]: the weight of the norm in front, but no less than a tenth of its median.

    A few channels have weights near 0; dividing by those would give `kv_a_proj` entries hundreds of times the others.
    """
    norm = source.input_norm
    floor = (norm.abs().median() / 10).clamp(min=1e-6)
    return torch.where(norm < 0, -1.0, 1.0) * norm.abs().clamp(min=floor)


def _orthonormal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows = coordinates @ directions with orthonormal directions; as many as there are independent rows."""
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    kept = sizes > sizes[0] * 1e-12
    return right[kept], left[:, kept] * sizes[kept]


def _fill(directions: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """`directions` and the orthogonal ones, up to `rank`, in which y has most power; moment [d, d] of y."""
    rest = torch.eye(len(moment), dtype=torch.float64) - directions.T @ directions
    power = rest @ moment @ rest
    # The directions that are taken must come last, whatever rounding makes of their zeros.
    _, vectors = torch.linalg.eigh(power - directions.T @ directions * power.diagonal().sum())
    return torch.cat([directions, vectors[:, len(directions) - rank :].T.flip(0)])


def _block_roots(source: SourceAttention, looks: Looks) -> torch.Tensor:
    """Square root [2 G D, 2 G D] of the weights of errors in keys and values (see the top of this file).

    An output is sum_j a_j v_j. An error e in key j moves score j by q · e scale, and the output by a_j (v_j - o) times
    that; an error in value j moves it by a_j. Both carry a_j, which drops out.
    """
    groups, share = source.key.shape[0], source.heads // source.key.shape[0]
    heads = looks.read_spread[:, None, None] * looks.query_moment * source.scale**2
    keys = heads.view(groups, share, *heads.shape[1:]).sum(1)
    written = torch.einsum("dhk,dhl->hkl", source.out, source.out)
    values = written.view(groups, share, *written.shape[1:]).sum(1)
    return torch.block_diag(*(_root(block) for block in [*keys, *values]))


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.max().clamp(min=1e-30) * 1e-8  # the root must have an inverse
    return vectors * values.clamp(min=floor).sqrt() @ vectors.T


def latent_size(x: torch.Tensor, down: torch.Tensor, eps: float = 1e-6) -> tuple[float, float]:
    """Mean over tokens of the latent's root mean square, and its standard deviation relative to that."""
    size = ((x.double() @ down.T).square().mean(-1) + eps).sqrt()
    return float(size.mean()), float(size.std() / size.mean())


def mla_tensors(
    source: SourceAttention,
    query: torch.Tensor,
    factors: Factors,
    size: float,
    state: dict[str, torch.Tensor],
    shared: int,
) -> dict[str, torch.Tensor]:
    """Everything under the names of transformers' MLA layer.

    query [H, D, d] after `absorb` and `turn_queries`; `size` the latent's mean (`latent_size`); `state` the module's
    random start, from which the queries of the shared key (`shared` channels) stay, and the output projection of those
    channels of the values that the source has not.
    """
    heads, head_dim, width = query.shape
    groups, rank = source.key.shape[0], factors.up.shape[1]
    # The module divides scores by the root of all its channels, those of the shared key included.
    query = query * source.scale * (head_dim + shared) ** 0.5
    of_shared = state["q_proj.weight"].double().view(heads, head_dim + shared, width)[:, head_dim:]
    key, value = (expand_groups(part.view(groups, head_dim, rank), heads, 0) for part in factors.up.chunk(2))
    of_more = state["o_proj.weight"].double().view(width, heads, -1)[..., head_dim:]
    more = torch.zeros(heads, of_more.shape[-1], rank, dtype=torch.float64)
    return {
        "q_proj.weight": torch.cat([query, of_shared], dim=1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([factors.down, torch.zeros(shared, width, dtype=torch.float64)]),
        "kv_a_layernorm.weight": torch.full((rank,), size),
        "kv_b_proj.weight": torch.cat([key, value, more], dim=1).flatten(0, 1),
        "o_proj.weight": torch.cat([source.out, of_more], dim=-1).flatten(1),
    }


def reference_mla(source: SourceAttention, factors: Factors, x: torch.Tensor) -> torch.Tensor:
    """The layer's output [T, d] of one text x [T, d], with the rotary part kept and the latent's norm left out.

    At full rank this is the source's attention; the tests hold the factorisation to it in float64.
    """
    q = source_heads(source, x)[0]
    groups = source.key.shape[0]
    key, value = (x @ factors.down.T @ factors.up.T).view(len(x), 2, groups, -1).unbind(1)
    _, o = softmax_attention(q, key, value, source.scale, source.frequencies)
    return torch.einsum("thv,dhv->td", o, source.out)
