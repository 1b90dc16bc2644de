"""The K1.5 objective: online policy mirror descent, as pure functions of tensors.

Each iteration i maximises the reward under a KL penalty against the policy that drew the samples (Kimi k1.5 technical
report, arXiv 2501.12599, section 2.3.2; the Kimi Linear report trains with "the same algorithm as K1.5")::

    max_pi  E_{y ~ pi}[r(x, y)] - tau KL(pi || pi_i)            optimum: pi*(y) = pi_i(y) exp(r(x, y) / tau) / Z

At the optimum r - tau log Z - tau log(pi* / pi_i) = 0 for every y; pi is fitted by least squares on samples of pi_i::

    L(pi) = E_{y ~ pi_i}[(r - b - tau log(pi / pi_i))^2] / (2 tau),        b ~ tau log Z
    grad L = - E_{y ~ pi_i}[grad log pi(y) (r - b) - (tau / 2) grad (log pi(y) / pi_i(y))^2]

which needs no value network, no ratio clipping, and no samples of pi itself. The report takes b = the mean reward of
the group (`baseline="mean"`), which tau log Z tends to for a large tau; the sample estimate of tau log Z itself
(`baseline="log_partition"`) has pi* as its exact fixed point. Advantages are neither divided by a standard deviation
nor by a length.

Symbols: r reward of a completion, b baseline, tau `tau`, pi the policy trained, pi_i the policy of this iteration's
samples ("old"), w importance weight trainer / engine of a token (truncated importance sampling), j index of a sample.
"""

from __future__ import annotations

import math
from typing import Literal

import torch


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, baseline: Literal["mean", "log_partition"] = "mean", tau: float = 1.0
) -> torch.Tensor:
    """Reward minus the group's baseline, r_j - b.

    Args:
        rewards: [B], groups adjacent, B a multiple of `group_size`. NaN: no reward (left out of the baseline).

    Returns:
        [B]; 0 where the reward is NaN.
    """
    groups = rewards.view(-1, group_size)
    if baseline == "mean":
        b = groups.nanmean(dim=1, keepdim=True)
    else:
        counts = (~groups.isnan()).sum(dim=1, keepdim=True)
        scaled = (groups / tau).masked_fill(groups.isnan(), -math.inf)
        b = tau * (scaled.logsumexp(dim=1, keepdim=True) - counts.log())
    return torch.nan_to_num(groups - b, nan=0.0).reshape(-1)


def k15_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    *,
    tau: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The surrogate whose gradient is that of the K1.5 objective, averaged over the samples.

    ``mean_j [ - sum_t w_jt log pi(y_jt) (r_j - b) + (tau / 2) (log pi(y_j) / pi_i(y_j))^2 ]``

    Args:
        logps: [B, T] log-probs of the sampled tokens under the policy trained; carries the gradient.
        old_logps: [B, T] the same under the policy that drew them (in the trainer's numerics).
        mask: [B, T], nonzero at sampled tokens.
        advantages: [B], r_j - b (see `group_advantages`).
        tau: strength of the KL penalty, > 0. Multiplies the squared log-ratio of whole sequences.
        weights: [B, T] or [B, 1] truncated importance weights, taken as constants; None: all one.

    Returns:
        scalar.
    """
    mask = mask.to(logps.dtype)
    weighted = logps if weights is None else logps * weights.detach()
    gain = (weighted * mask).sum(-1) * advantages
    log_ratio = ((logps - old_logps.detach()) * mask).sum(-1)
    return (0.5 * tau * log_ratio.square() - gain).mean()


def ptx_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per labelled token, the supervised term of the objective (before its weight).

    Its denominator is its own: the number of labelled tokens of the supervised batch, whatever the rollouts hold.

    Args:
        logits: [B, T, V]. labels: [B, T], the token at each position, -100 where it is not to be learned.

    Returns:
        scalar, in nats.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def drift_kl(old_logps: torch.Tensor, new_logps: torch.Tensor, mask: torch.Tensor) -> float:
    """KL(old || new) per token in nats, the k3 estimate on tokens that `old` drew.

    The mean of exp(d) - 1 - d with d = new - old.

    Args:
        old_logps, new_logps, mask: [B, T].
    """
    d = (new_logps - old_logps)[mask.bool()].double()
    return (torch.expm1(d) - d).mean().item() if d.numel() else 0.0
