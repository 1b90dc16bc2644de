"""How far the rollout engine is from the trainer, and the weights that make up for it: pure functions of the log-probs
of the same sampled tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kimi_rl.errors import RunError


@dataclass(frozen=True)
class Mismatch:
    """Differences between trainer and engine log-probs, d = trainer - engine, over the sampled tokens.

    `kl`: mean of exp(d) - 1 - d, the k3 estimate of KL(engine || trainer) per token, in nats
    (http://joschu.net/blog/kl-approx.html). `mean_abs`, `max_abs`: of |d|. `ratio_p01`, `ratio_p99`: percentiles of
    exp(d). `truncated_share`: share of tokens whose ratio exceeds the importance-sampling cap.
    """

    kl: float
    mean_abs: float
    max_abs: float
    ratio_p01: float
    ratio_p99: float
    truncated_share: float


def measure_mismatch(trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor, cap: float) -> Mismatch:
    """Compare log-probs of the same tokens.

    Args:
        trainer, engine: [B, T] natural log-probs. mask: [B, T], nonzero where a token was sampled.
        cap: truncation bound of the importance-sampling ratio.
    """
    d = (trainer - engine)[mask.bool()].double()
    d = d[~d.isnan()]
    if d.numel() == 0:
        return Mismatch(0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    ratio = d.exp()
    percentiles = torch.tensor([0.01, 0.99], dtype=ratio.dtype, device=ratio.device)
    low, high = torch.quantile(ratio[:1_000_000], percentiles).tolist()
    return Mismatch(
        kl=(torch.expm1(d) - d).mean().item(),
        mean_abs=d.abs().mean().item(),
        max_abs=d.abs().max().item(),
        ratio_p01=low,
        ratio_p99=high,
        truncated_share=(ratio > cap).double().mean().item(),
    )


def importance_ratio(
    trainer: torch.Tensor,
    engine: torch.Tensor,
    mask: torch.Tensor,
    *,
    mode: str,
    low: float | None,
    high: float | None,
) -> torch.Tensor:
    """Importance weights trainer / engine, as TRL's `GRPOTrainer` has them (truncated: Espeholt et al., 1802.01561).

    Args:
        trainer, engine: [B, T] natural log-probs; NaN from the engine: unknown, of weight one. mask: [B, T].
        mode: `token_truncate` or `sequence_truncate` clamp the weight to `low` and `high` (None: no bound);
            `token_mask` or `sequence_mask` make it zero outside of them. A sequence's is the product of its tokens'.

    Returns:
        [B, T], or [B, 1] for sequences; one where the mask is zero.
    """
    logs = torch.nan_to_num((trainer - engine) * mask, nan=0.0)
    ratio = (logs.sum(-1, keepdim=True) if mode.startswith("sequence") else logs).exp()
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


class MismatchBar:
    """Stops a run whose mismatch KL stays above `max_kl` for `patience` steps running."""

    def __init__(self, max_kl: float | None, patience: int):
        self.max_kl = max_kl
        self.patience = patience
        self.bad_steps = 0

    def check(self, mismatch: Mismatch, step: int) -> None:
        if self.max_kl is None:
            return
        self.bad_steps = self.bad_steps + 1 if not mismatch.kl <= self.max_kl else 0
        if self.bad_steps >= self.patience:
            raise RunError(
                f"step {step}: the rollout engine and the trainer disagree: mismatch KL {mismatch.kl:.3g} is above "
                f"mismatch.max_kl ({self.max_kl:g}) for the {self.bad_steps}th step running, max |dlogp| "
                f"{mismatch.max_abs:.3g}. Look first at top_p (below 1 the engine's log-probs are those of a cut "
                "distribution), then at the precision of both sides, then at the engine's version and kernels"
            )
