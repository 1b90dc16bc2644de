"""Plain form of the log-probs: all logits at once."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype


def token_logprobs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same signature and shapes as `token_logprobs`."""
    dtype = compute_dtype(hidden, weight)
    if matmul_dtype is not None:
        hidden, weight = hidden.to(matmul_dtype), weight.to(matmul_dtype)
    logps = ((hidden.to(dtype) @ weight.to(dtype).T) / temperature).log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1) if with_entropy else None
    return logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropies
