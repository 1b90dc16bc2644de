"""Log-probs and entropies of given tokens from hidden states, without the [tokens, vocabulary] logits."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.logprob.reference import token_logprobs_reference
from kimi_rl.kernels.logprob.torch_logprob import token_logprobs_torch


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(hidden weight^T / temperature) at `tokens`; differentiable in hidden and weight.

    hidden [S, D], the states that predict; weight [V, D] of the output head; tokens int64 [S], the tokens predicted.
    Returns logps [S] and the entropies of the same distributions [S] (None without `with_entropy`), both in float32
    (float64 if an input is). Products and sums are taken in that dtype too: a head in bf16 is a large part of the
    difference between trainer and engine. `matmul_dtype`, say bf16, rounds hidden and weight (and in the backward the
    gradient of the logits) to it before they are multiplied, which on a card is several times as fast; sums and logits
    stay in the wide dtype. Raises `ValueError` if the shapes do not fit or temperature is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or tokens.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logprobs: shapes do not fit: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"tokens {tuple(tokens.shape)}; they must be [S, D], [V, D] and [S]"
        )
    if not temperature > 0:
        raise ValueError(f"token_logprobs: temperature must be above 0, found {temperature}")
    choice = choose("logprob", hidden, has_fla=weight.dtype != torch.float64)
    if choice == "fla":
        from kimi_rl.kernels.logprob.triton_rows import token_logprobs_triton as run
    else:
        run = token_logprobs_reference if choice == "reference" else token_logprobs_torch
    with torch.autocast(hidden.device.type, enabled=False):
        return run(
            hidden, weight, tokens, temperature=temperature, with_entropy=with_entropy, matmul_dtype=matmul_dtype
        )


__all__ = ["token_logprobs", "token_logprobs_reference", "token_logprobs_torch"]
