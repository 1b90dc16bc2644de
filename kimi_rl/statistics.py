"""Figures of an evaluation and how sure they are: pass@k, maj@k, means, standard errors, intervals.

Problems are the independent units: samples of one problem resemble each other, so every error here is taken between
problems, never between samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_T975 = {1: 12.7062, 2: 4.3027, 3: 3.1824}  # of Student's t with few degrees of freedom
BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over problems. `se`: its standard error. `interval`: 95 %, the one to quote. `bootstrap`: 95 %, percentile
    bootstrap over problems, for comparison with other tools; too narrow where few problems are solved or missed.
    """

    value: float
    se: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]


@dataclass(frozen=True)
class PairedGain:
    """A mean change over problems that were measured twice, and its 95 % interval."""

    value: float
    interval: tuple[float, float]


def estimate(per_problem: np.ndarray, samples: int = 1, seed: int = 0) -> Estimate:
    """The mean of one value per problem [n], each the mean of `samples` answers (1: a figure of the whole problem)."""
    values = np.asarray(per_problem, dtype=np.float64)
    low, high = clustered_interval(values[None], samples)
    return Estimate(
        float(values.mean()),
        float(standard_error(values)),
        (float(low[0]), float(high[0])),
        bootstrap_interval(values, seed=seed),
    )


def standard_error(per_problem: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis, with problems as the independent units; 0 for one problem."""
    n = per_problem.shape[-1]
    return per_problem.std(axis=-1, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(per_problem.shape[:-1])


def clustered_interval(per_problem: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean accuracy: Wilson's, at the effective number of independent answers.

    Args:
        per_problem: [repetitions, n], the mean of `samples` answers to each of n problems.

    Returns:
        Lower and upper ends [repetitions].

    For values in [0, 1] the variance between problems is at most m(1-m), which n independent answers have; the ratio
    of the two, between 1 and `samples`, says how many answers each problem counts for (the inverse of Kish's design
    effect; Wilson intervals for clustered data: Dean & Pagano, J. Surv. Stat. Methodol. 3, 2015). One pseudo-problem
    with the largest variance keeps that ratio honest where few problems differ from the rest. With one sample a
    problem this is Wilson's interval itself. Rewards outside [0, 1] get Student's t.
    """
    n = per_problem.shape[-1]
    mean = per_problem.mean(axis=-1)
    z = Z95 if samples == 1 else t_quantile(n - 1)
    if per_problem.min() < 0 or per_problem.max() > 1:
        half = t_quantile(n - 1) * standard_error(per_problem)
        return mean - half, mean + half
    largest = mean * (1 - mean)
    variance = (((per_problem - mean[:, None]) ** 2).sum(axis=-1) + largest) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        answers = np.where(variance > 0, n * largest / variance, n)
    answers = np.clip(answers, n, n * samples)
    shrink = 1 + z * z / answers
    center = (mean + z * z / (2 * answers)) / shrink
    half = z / shrink * np.sqrt(largest / answers + z * z / (4 * answers**2))
    # Rounding may put an end a hair beyond 0, 1 or the mean itself.
    return np.clip(center - half, 0.0, mean), np.clip(center + half, mean, 1.0)


def bootstrap_interval(
    per_problem: np.ndarray, *, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems [n], drawn with replacement."""
    n = len(per_problem)
    drawn = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    low, high = np.quantile(per_problem[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def paired_gain(before: Sequence[float], after: Sequence[float]) -> PairedGain:
    """How much the mean of one value in [0, 1] per problem [n] changed, with problems as the independent units.

    Student's t over the differences, in which what makes a problem easy or hard cancels. One pseudo-problem with the
    largest change keeps the interval honest where few problems changed.
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    n, mean = len(change), float(change.mean())
    half = t_quantile(n - 1) * math.sqrt((((change - mean) ** 2).sum() + 1) / n**2)
    return PairedGain(mean, (max(mean - half, -1.0), min(mean + half, 1.0)))


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion; within 0.001 from 4 degrees on). Normal for 0."""
    if degrees in _T975 or degrees < 1:
        return _T975.get(degrees, Z95)
    z, d = Z95, degrees
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * d**4)
    )


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right, without bias: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    Args:
        correct: int [problems], right ones among the `samples` (n) drawn for each problem. k: at most `samples`.

    Returns:
        float64 [problems].
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples, found k {k}, samples {samples}")
    table = [1 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.array(table)[np.asarray(correct, dtype=np.int64)]


def majority(groups: Sequence[Hashable | None], right: Hashable) -> float:
    """Chance that the most frequent of k answers is right, where a draw among the most frequent decides ties.

    `groups`: one label per sample, the same for equal answers; None: no answer, which has no vote. `right`: the
    label of right answers. 0 where nobody voted.
    """
    votes: dict[Hashable, int] = {}
    for group in groups:
        if group is not None:
            votes[group] = votes.get(group, 0) + 1
    top = max(votes.values(), default=0)
    if votes.get(right, 0) < max(top, 1):
        return 0.0
    return 1 / sum(count == top for count in votes.values())
