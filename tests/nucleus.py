"""How far log-probs are from those of a plain forward, where the border of a nucleus is a matter of rounding."""

import torch

from kimi_rl.rollout.sampling import processed_logprobs


def logprob_error(logits, token_ids, logprobs, temperature, top_p) -> float:
    """Largest |difference| over the tokens; infinite where a token could not have been sampled. logits [T, V].

    Rounding decides whether a token on the nucleus's border belongs to it: with or without it is right.
    """
    borders = [top_p] if top_p == 1.0 else [top_p - 1e-5, top_p, top_p + 1e-5]
    tokens = torch.tensor(token_ids)[:, None]
    expected = [processed_logprobs(logits, temperature, border).gather(-1, tokens).squeeze(-1) for border in borders]
    return (torch.tensor(logprobs) - torch.stack(expected)).abs().amin(dim=0).max().item()
