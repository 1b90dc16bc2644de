"""Statistics of a comparison, as pure functions of arrays: paired differences, intervals, bands, power.

The unit is the pair: two arms that ran with the same seed, so with the same problems in the same order. There are few
of them, and that decides the method. A percentile bootstrap over 3 seeds draws from 10 different means, never reaches
beyond the observed values and takes the spread for (n-1)/n of what it is: its "95 %" interval misses the truth far
more often than one time in twenty (`tests/compare/test_compare_statistics.py` shows it). So intervals here are
Student's t.

Where every problem's result is known, seeds and problems are crossed random factors, and an interval speaks of other
seeds and of other problems of the same kind. The variance of the mean has then two parts, by the analysis of variance
of readers and cases in diagnostics: MS_seed / (n m), and what the problems add, max(MS_problem - MS_rest, 0) / (n m).
They have n - 1 and m - 1 degrees of freedom, and the half-width takes each with its own quantile,
sqrt((t_n-1 se_seed)^2 + (t_m-1 se_problem)^2) (Howe, J. Am. Stat. Assoc. 69, 1974). One quantile for the sum, with
Hillis's degrees of freedom (Stat. Med. 26, 2007), was too short here at 3 seeds: excluding zero in up to 8 % of
comparisons without an effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import mpmath
import numpy as np

from kimi_rl.statistics import Z95

RESAMPLES = 2000
_EXACT_FLIPS = 12  # up to so many pairs every sign pattern is tried


@dataclass(frozen=True)
class Difference:
    """A paired difference, arm minus reference, in the figure's own unit.

    `interval` is None where there is nothing to judge the spread by: fewer than 2 pairs, or all differences the same.
    `p_value`: permutation test (signs of the pairs flipped), at least `smallest_p` whatever the data.
    `seeds_needed`: pairs for a power of 80 % if the true difference and spread are those seen; None: no number of
    seeds will do on so few problems, or nothing was seen.
    """

    value: float
    se: float | None
    interval: tuple[float, float] | None
    p_value: float
    smallest_p: float
    pairs: int
    seeds_needed: int | None

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(differences: np.ndarray, level: float = 0.95) -> Difference:
    """The mean of per-pair differences.

    Args:
        differences: float [n], one per seed; or [n, m], one per seed and problem, which adds the chance of the
            problems to the interval.
        level: of the interval.
    """
    values = np.asarray(differences, dtype=np.float64)
    per_seed = values if values.ndim == 1 else values.mean(axis=1)
    n = len(per_seed)
    mean = float(per_seed.mean()) if n else math.nan
    p_value = sign_flip_p(per_seed) if n else 1.0
    smallest = 2.0 ** (1 - n) if n else 1.0
    if n < 2:
        return Difference(mean, None, None, p_value, smallest, n, None)
    by_seed, by_problem = (float(part[0]) for part in variance_parts(values[None]))
    # Rounding leaves a spread of 1e-17 where there is none.
    if by_seed + by_problem <= (1e-12 * max(1.0, float(np.abs(values).max()))) ** 2:
        return Difference(mean, None, None, p_value, smallest, n, None)
    half = float(half_width(values[None], level)[0])
    needed = seeds_needed(mean, n * by_seed, by_problem)
    return Difference(
        mean, math.sqrt(by_seed + by_problem), (mean - half, mean + half), p_value, smallest, n, needed
    )


def half_width(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Half-width of the interval of the mean [repetitions]; see the top of this file.

    `values`: [repetitions, n] or [repetitions, n, m], with n >= 2 seeds and m problems.
    """
    by_seed, by_problem = variance_parts(values)
    q = 0.5 + level / 2
    squared = t_quantile(values.shape[1] - 1, q) ** 2 * by_seed
    if values.ndim == 3 and values.shape[2] > 1:
        squared = squared + t_quantile(values.shape[2] - 1, q) ** 2 * by_problem
    return np.sqrt(squared)


def variance_parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The variance of the mean of [repetitions, n] or [repetitions, n, m]: the seeds' part, which falls with their
    number, and the problems' part, which does not. Both [repetitions]."""
    n = values.shape[1]
    if values.ndim == 2:
        return values.var(axis=1, ddof=1) / n, np.zeros(len(values))
    m = values.shape[2]
    seed, problem, rest = _mean_squares(values)
    return seed / (n * m), np.maximum(problem - rest, 0.0) / (n * m)


def _mean_squares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of seeds, problems and what is left, of [repetitions, n, m]."""
    _, n, m = values.shape
    by_seed, by_problem = values.mean(axis=2), values.mean(axis=1)
    grand = by_seed.mean(axis=1)
    seed = m * by_seed.var(axis=1, ddof=1)
    if m < 2:
        return seed, np.zeros_like(seed), np.zeros_like(seed)
    problem = n * by_problem.var(axis=1, ddof=1)
    rest = values - by_seed[:, :, None] - by_problem[:, None, :] + grand[:, None, None]
    return seed, problem, (rest**2).sum(axis=(1, 2)) / ((n - 1) * (m - 1))


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided permutation p-value of the mean of paired differences [n]: every pattern of flipped signs up to 12
    pairs, 20,000 random ones beyond. Needs no distribution, and cannot fall below 2^(1-n)."""
    n = len(differences)
    if n <= _EXACT_FLIPS:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(20_000, n))
        signs[0] = 1.0  # the observed pattern is one of them
    seen = abs(differences.mean())
    return float((np.abs(signs @ differences) / n >= seen - 1e-12 * max(1.0, seen)).mean())


def seeds_needed(effect: float, seed_variance: float, problem_variance: float, most: int = 10_000) -> int | None:
    """Pairs that give 80 % power at the 5 % level: the least n with |effect| >= (t_0.975 + t_0.8) se(n)."""
    for n in [*range(2, 200), *range(200, most, 50)]:
        se = math.sqrt(seed_variance / n + problem_variance)
        if abs(effect) >= (t_quantile(n - 1, 0.975) + t_quantile(n - 1, 0.8)) * se:
            return n if effect else None
        if abs(effect) < 2.8 * math.sqrt(problem_variance):  # 1.96 + 0.84: out of reach with any number of seeds
            return None
    return None


@dataclass(frozen=True)
class Band:
    """A mean curve [T] with a 95 % band around it: `pointwise` half-widths [T] hold at any one step, the
    `simultaneous` one (a number) at all steps together. Both None where there are fewer than 2 seeds."""

    mean: np.ndarray
    pointwise: np.ndarray | None
    simultaneous: float | None


def curve_band(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Band:
    """Bands of a mean curve by a bootstrap over seeds and problems.

    Args:
        values: [n, T], a curve for each seed; or [n, m, T], one for each seed and problem.

    The bootstrap gives every seed and every problem a normal weight (a two-way multiplier bootstrap) instead of
    drawing them with replacement: of 3 seeds there are too few draws. Its weights are scaled to the unbiased variances
    of `variance_parts`; the problems' part is what their mean squares exceed the rest by. A pointwise half-width is
    the 95 % quantile of |bootstrap mean - mean| at a step, the simultaneous one that of its largest over the steps.
    Normal weights know no uncertainty of the spread itself, so the seeds' are stretched by t_0.975(n-1) / 1.96: right
    at one step, and on the safe side for many. The simultaneous band has the same width everywhere: a width from 3
    values at each step would be tiny somewhere by chance, and the band would miss there.
    """
    values = np.asarray(values, dtype=np.float64)
    curves = values if values.ndim == 2 else values.mean(axis=1)
    n = len(curves)
    mean = curves.mean(axis=0)
    if n < 2:
        return Band(mean, None, None)
    rng = np.random.default_rng(seed)
    stretch = t_quantile(n - 1, 0.975) / Z95
    moved = rng.standard_normal((resamples, n)) @ (curves - mean) * stretch / math.sqrt(n * (n - 1))
    if values.ndim == 3 and values.shape[1] > 1:
        m = values.shape[1]
        _, problem, rest = _mean_squares(np.moveaxis(values, 2, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(problem > 0, np.sqrt(np.maximum(1 - rest / problem, 0)), 0.0)
        residual = (values.mean(axis=0) - mean) * share / math.sqrt(m * (m - 1))
        moved += rng.standard_normal((resamples, m)) @ residual
    size = np.abs(moved)
    return Band(mean, np.quantile(size, 0.95, axis=0), float(np.quantile(size.max(axis=1), 0.95)))


def area(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean of curves y [..., T] over x [T] (trapezoids), in the unit of y; the value itself where T is 1."""
    if len(x) == 1:
        return y[..., 0]
    return np.trapezoid(y, x, axis=-1) / (x[-1] - x[0])


def first_crossing(x: np.ndarray, y: np.ndarray, threshold: float) -> float | None:
    """Where the curve y [T] over x [T] first reaches `threshold`, between points by a straight line; None: never."""
    reached = np.flatnonzero(y >= threshold)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (threshold - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def common_grid(curves: list[tuple[np.ndarray, np.ndarray]], points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Curves (x, y) of different x on one grid: up to the shortest one's end, by straight lines. Returns x [T] and
    y [curves, T]."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, end, points) if end > start else np.array([start])
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


@cache
def t_quantile(df: int, q: float) -> float:
    """Quantile of Student's t with `df` degrees of freedom, 0.5 < q < 1."""
    tail = 2 * (1 - q)

    def excess(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.betainc(df / 2, 0.5, 0, df / (df + x * x), regularized=True) - tail

    high = 2.0
    while excess(high) > 0:
        high *= 2
    return float(mpmath.findroot(excess, (0.0, high), solver="anderson", tol=1e-12))
