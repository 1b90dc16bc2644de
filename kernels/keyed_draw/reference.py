"""The plain form, which says what the Triton kernel computes, bit by bit in its random numbers."""

from __future__ import annotations

import torch

BLOCK = 1024  # tokens that one program of the Triton kernel takes; part of the order of the random numbers
_LOW = 0xFFFFFFFF


def keyed_draw_reference(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `keyed_draw`."""
    x = logits.float()
    if temperature is not None:
        x = x / temperature[:, None]
    tokens = (x - exponential(seeds, positions, x.shape[1]).log()).argmax(dim=-1, keepdim=True)
    logprobs = x.gather(-1, tokens) - x.logsumexp(dim=-1, keepdim=True)
    return tokens.squeeze(-1).int(), logprobs.squeeze(-1)


def exponential(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Exponentially distributed float32 [N, vocabulary], of rate 1."""
    token = torch.arange(vocabulary, device=seeds.device)
    quarter = BLOCK // 4
    counter = token // BLOCK * quarter + token % quarter  # four tokens of a block share a counter
    words = philox(seeds[:, None], counter[None, :], positions.long()[:, None])
    which = (token % BLOCK // quarter)[None, :]
    bits = torch.stack(words).gather(0, which.expand(len(seeds), -1)[None]).squeeze(0)
    u = (bits.float() + 0.5) * 2.0**-32
    # -log(1 - u): the smallest values win the draw, and 1 - u would round them off.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u / 5))))
    return torch.where(u < 1 / 64, series, -torch.log(1 - u))


def philox(seed: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four words of Philox4x32-10 with the key `seed` (64 bits) and the counter (first, second, 0, 0), as int64."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = torch.broadcast_tensors(first & _LOW, second & _LOW)
    c0, c1, _ = torch.broadcast_tensors(c0, c1, seed)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # int64 products wrap around, which keeps all 64 bits.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
