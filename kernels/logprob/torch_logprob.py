"""Log-probs in tiles of tokens: no more than one tile of logits exists at any time, in neither direction.

With z = hidden W^T / temperature, Z = sum_j exp(z_j), p = exp(z) / Z and H the entropy:

    log p_t = z_t - log Z                    d log p_t / dz_j = [j = t] - p_j
    H = log Z - sum_j p_j z_j                dH / dz_j        = -p_j (log p_j + H)

The forward keeps log Z and H, one number a token each; the backward computes each tile's logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.product import wide_product

# Elements of one tile of logits: 16 MiB in float32 on a CPU (about what its caches hold), 256 MiB on a card.
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


class Passes(NamedTuple):
    """The two passes over a tile of logits z [R, V], in the wide dtype and at temperature 1. Both may overwrite z.

    `forward(z, tokens, logps, log_z, entropies, temperature, with_entropy)` writes the three [R].
    `backward(z, tokens, log_z, entropies, d_logps, d_entropies, temperature, dtype)` returns dz [R, V] in `dtype`; a
    gradient that is None counts as zero.
    """

    forward: Callable[..., None]
    backward: Callable[..., torch.Tensor]


def _forward_rows(z, tokens, logps, log_z, entropies, temperature, with_entropy) -> None:
    z.div_(temperature)
    log_z.copy_(z.logsumexp(-1))
    logps.copy_(z.gather(-1, tokens[:, None]).squeeze(-1) - log_z)
    if with_entropy:
        p = (z - log_z[:, None]).exp_()
        entropies.copy_(log_z - p.mul_(z).sum(-1))


def _backward_rows(z, tokens, log_z, entropies, d_logps, d_entropies, temperature, dtype) -> torch.Tensor:
    log_p = z.div_(temperature).sub_(log_z[:, None])
    p = log_p.exp()
    dz = torch.zeros_like(p)
    if d_entropies is not None:
        dz -= d_entropies[:, None] * p * (log_p + entropies[:, None])
    if d_logps is not None:
        dz -= p.mul_(d_logps[:, None])
        dz.scatter_add_(-1, tokens[:, None], d_logps[:, None])
    return dz.div_(temperature).to(dtype)


PLAIN = Passes(_forward_rows, _backward_rows)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, tile, with_entropy, product, passes):
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(hidden, weight)
        product = product or dtype
        head = weight.to(product)
        logps = torch.empty(tokens.shape, dtype=dtype, device=hidden.device)
        log_z, entropies = torch.empty_like(logps), torch.empty_like(logps)
        for rows in tiles(len(tokens), tile):
            z = wide_product(hidden[rows].to(product), head.T, dtype)
            passes.forward(z, tokens[rows], logps[rows], log_z[rows], entropies[rows], temperature, with_entropy)
        ctx.save_for_backward(hidden, weight, tokens, log_z, entropies)
        ctx.temperature, ctx.tile, ctx.product, ctx.passes = temperature, tile, product, passes
        ctx.device_type = hidden.device.type
        return logps, entropies if with_entropy else None

    @staticmethod
    def backward(ctx, d_logps, d_entropies):
        # A backward inside autocast would multiply in its dtype.
        with torch.autocast(ctx.device_type, enabled=False):
            return _TokenLogprobs._backward(ctx, d_logps, d_entropies)

    @staticmethod
    def _backward(ctx, d_logps, d_entropies):
        hidden, weight, tokens, log_z, entropies = ctx.saved_tensors
        if d_logps is None and d_entropies is None:
            return (None,) * 8
        d_logps, d_entropies = (None if d is None else d.contiguous() for d in (d_logps, d_entropies))
        dtype = log_z.dtype
        head = weight.to(ctx.product)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        for rows in tiles(len(tokens), ctx.tile):
            x = hidden[rows].to(ctx.product)
            z = wide_product(x, head.T, dtype)
            given = [None if d is None else d[rows] for d in (d_logps, d_entropies)]
            dz = ctx.passes.backward(
                z, tokens[rows], log_z[rows], entropies[rows], *given, ctx.temperature, ctx.product
            )
            del z
            if d_hidden is not None:
                d_hidden[rows] = wide_product(dz, head, dtype)
            if d_weight is not None:
                d_weight += wide_product(dz.T, x, dtype)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *(None,) * 6


def default_tile(weight: torch.Tensor) -> int:
    """Tokens at once against a head [V, D]."""
    return max(1, TILE_ELEMENTS.get(weight.device.type, 1 << 22) // weight.shape[0])


def tiles(count: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, count)) for start in range(0, count, tile)]


def token_logprobs_torch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
    tile: int | None = None,
    passes: Passes = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same signature and shapes as `token_logprobs`. `tile`: tokens at once; unset: by the size of the vocabulary."""
    tile = default_tile(weight) if tile is None else tile
    return _TokenLogprobs.apply(hidden, weight, tokens, temperature, tile, with_entropy, matmul_dtype, passes)
