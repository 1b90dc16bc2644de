"""Drawing tokens: pure functions of logits and of one uniform number a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """One row of `length` numbers in [0, 1) for each seed, float64.

    A completion's randomness depends on its own seed alone, so it does not change with what else is in the batch,
    with the worker it runs on, or when it is generated again after a crash.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def processed_logprobs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Log-probs after temperature and top-p, as they are sampled from.

    Args:
        logits: [B, V]. temperature: > 0, or 0 for greedy decoding (log-probs are then those at temperature 1).
        top_p: keep the smallest set of most likely tokens whose mass reaches `top_p`; the most likely one always stays.

    Returns:
        [B, V] float32; `-inf` for tokens that top-p removed.
    """
    logits = logits.float()
    if temperature > 0 and temperature != 1.0:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    if temperature == 0 or top_p >= 1.0:
        return logprobs
    ordered, order = logprobs.sort(-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    removed = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return logprobs.masked_fill(removed, float("-inf")).log_softmax(-1)


def draw(logprobs: torch.Tensor, uniform: torch.Tensor, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logprobs: [B, V] from `processed_logprobs`. uniform: [B] in [0, 1).

    Returns:
        tokens [B] int64, their log-probs [B] float32.
    """
    if greedy:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        # Scaling by the total keeps the point inside the distribution when rounding leaves the sum below 1.
        point = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logprobs.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
