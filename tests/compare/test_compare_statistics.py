"""Statistics of a comparison, against simulations with a known truth and brute force."""

import math

import numpy as np
import pytest

from kimi_rl.compare.statistics import (
    area,
    common_grid,
    curve_band,
    first_crossing,
    half_width,
    paired_difference,
    seeds_needed,
    sign_flip_p,
    t_quantile,
)

COMPARISONS = 1000
PROBLEMS = 150


def simulate(seeds: int, *, effect: float, problem_sd: float, seed_sd: float, rng: int) -> np.ndarray:
    """Right minus right [comparisons, seeds, problems] of two arms whose log-odds differ by `effect`.

    Problems differ in difficulty, each arm has its own strengths among them (`problem_sd`), and its own luck with every
    seed (`seed_sd`): what the arms share cancels in the pairs, the rest does not.
    """
    draw = np.random.default_rng(rng)
    shape = (COMPARISONS, seeds, PROBLEMS)
    difficulty = draw.normal(0, 1.5, (COMPARISONS, 1, PROBLEMS))

    def arm(shift: float) -> np.ndarray:
        strength = draw.normal(0, problem_sd, (COMPARISONS, 1, PROBLEMS))
        luck = draw.normal(0, seed_sd, (COMPARISONS, seeds, 1))
        return draw.random(shape) < 1 / (1 + np.exp(-(difficulty + strength + luck + shift)))

    return arm(effect).astype(np.float64) - arm(0.0)


def excludes_zero(differences: np.ndarray) -> float:
    means = differences.reshape(COMPARISONS, -1).mean(axis=1)
    return float((np.abs(means) > half_width(differences)).mean())


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("problem_sd,seed_sd", [(0.0, 0.3), (0.35, 0.3), (0.7, 0.1), (0.0, 0.7)])
def test_without_an_effect_one_comparison_in_twenty_shows_one(seeds, problem_sd, seed_sd):
    found = simulate(seeds, effect=0.0, problem_sd=problem_sd, seed_sd=seed_sd, rng=3)
    assert 0.03 <= excludes_zero(found) <= 0.07


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_same_without_problems(seeds):
    found = np.random.default_rng(1).normal(0, 2.0, (COMPARISONS, seeds))
    assert 0.03 <= excludes_zero(found) <= 0.07


def test_a_percentile_bootstrap_over_three_seeds_has_not_that_coverage():
    """Why the intervals are Student's: the plain bootstrap cries wolf in far over 7 % of comparisons."""
    draw = np.random.default_rng(2)
    values = draw.normal(0, 1, (COMPARISONS, 3))
    means = values[:, draw.integers(0, 3, size=(500, 3))].mean(axis=2)
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    assert ((low > 0) | (high < 0)).mean() > 0.15


def test_seeds_alone_would_not_speak_of_other_problems():
    """Where arms have their own strengths among the problems, an interval that leaves them out is too short."""
    found = simulate(8, effect=0.0, problem_sd=0.7, seed_sd=0.1, rng=5)
    assert excludes_zero(found.mean(axis=2)) > 0.07


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_planted_effect_is_estimated_without_bias(seeds):
    found = simulate(seeds, effect=0.8, problem_sd=0.35, seed_sd=0.3, rng=4)
    # The true difference, from a million draws of everything that the arms do not share.
    draw = np.random.default_rng(0)
    spread = math.sqrt(1.5**2 + 0.35**2 + 0.3**2)
    ability = draw.normal(0, spread, 1_000_000)
    truth = float((1 / (1 + np.exp(-(ability + 0.8))) - 1 / (1 + np.exp(-ability))).mean())
    values = np.array([paired_difference(one).value for one in found])
    assert values.mean() == pytest.approx(truth, abs=3 * values.std() / math.sqrt(COMPARISONS))
    covered = np.mean(np.abs(values - truth) <= half_width(found))
    assert 0.93 <= covered <= 0.975
    assert excludes_zero(found) > 0.25


@pytest.mark.parametrize("seeds", [3, 5])
def test_bands_hold_the_true_curve(seeds):
    draw = np.random.default_rng(6)
    steps = np.linspace(0, 1, 8)
    truth_of = np.stack([
        (1 / (1 + np.exp(-(draw.normal(0, math.sqrt(1 + 0.4**2), 400_000) + 3 * x - 1.5)))).mean() for x in steps
    ])  # fmt: skip
    pointwise, together = [], []
    for repetition in range(300):
        luck = draw.normal(0, 0.4, (seeds, 1, 1))
        problem = draw.normal(0, 1, (1, 100, 1))
        solved = draw.random((seeds, 100, 8)) < 1 / (1 + np.exp(-(luck + problem + 3 * steps - 1.5)))
        band = curve_band(solved, resamples=400, seed=repetition)
        missed = np.abs(band.mean - truth_of)
        pointwise.append((missed <= band.pointwise).mean())
        together.append((missed <= band.simultaneous).all())
    assert 0.92 <= np.mean(pointwise) <= 0.985
    assert np.mean(together) >= 0.95


def test_bands_of_one_seed_have_no_width():
    band = curve_band(np.array([[0.1, 0.4]]))
    assert band.mean.tolist() == [0.1, 0.4] and band.pointwise is None and band.simultaneous is None


def test_a_band_that_holds_everywhere_is_wider_than_one_that_holds_somewhere():
    band = curve_band(np.random.default_rng(0).normal(size=(5, 12)))
    assert band.simultaneous > band.pointwise.max()


def test_sign_flips_by_hand():
    # Of the 8 patterns, +++ and --- have a mean as far from zero as 2; all others are nearer.
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip_p(np.array([1.0, -1.0])) == 1.0
    assert sign_flip_p(np.zeros(4)) == 1.0
    many = np.random.default_rng(0).normal(1.0, 0.5, 20)
    assert 0 < sign_flip_p(many) < 0.01  # drawn, not enumerated, and never 0


def test_permutation_p_values_are_uniform_without_an_effect():
    draw = np.random.default_rng(7)
    found = np.array([sign_flip_p(draw.normal(size=6)) for _ in range(400)])
    assert np.mean(found <= 0.25) == pytest.approx(0.25, abs=0.06)


def test_nothing_is_shown_without_a_spread():
    for values in ([0.1], [0.1, 0.1, 0.1], [0.0, 0.0]):
        found = paired_difference(np.array(values))
        assert found.interval is None and not found.shown and found.seeds_needed is None
    assert paired_difference(np.array([0.1, 0.1 + 1e-18, 0.1])).interval is None
    assert math.isnan(paired_difference(np.zeros(0)).value)


def test_interval_by_hand():
    found = paired_difference(np.array([1.0, 2.0, 3.0]))
    assert found.value == 2.0 and found.se == pytest.approx(1 / math.sqrt(3)) and found.pairs == 3
    assert found.interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-4)
    assert not found.shown and found.smallest_p == 0.25
    assert paired_difference(np.array([2.0, 2.1, 2.2])).shown


def test_power_holds_what_it_promises():
    n = seeds_needed(0.05, 0.06**2, 0.0)
    drawn = np.random.default_rng(8).normal(0.05, 0.06, (20_000, n))
    power = np.mean(np.abs(drawn.mean(axis=1)) > half_width(drawn))
    assert 0.77 <= power <= 0.85
    assert seeds_needed(0.0, 1.0, 0.0) is None
    assert seeds_needed(0.05, 0.06**2, 0.03**2) is None  # the problems alone hide it
    assert seeds_needed(1e-6, 1.0, 0.0) is None


@pytest.mark.parametrize("df,q,value", [
    (1, 0.975, 12.70620), (2, 0.975, 4.302653), (4, 0.9875, 3.495406), (30, 0.975, 2.042272), (2, 0.8, 1.060660),
    (1, 0.9995, 636.6193),
])  # fmt: skip
def test_quantiles_of_student(df, q, value):
    assert t_quantile(df, q) == pytest.approx(value, rel=1e-5)


def test_curve_figures():
    x, y = np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.4, 0.8])
    assert area(x, y) == pytest.approx(0.4)
    assert area(x, np.stack([y, y + 0.1])) == pytest.approx([0.4, 0.5])
    assert area(np.array([3.0]), np.array([0.7])) == 0.7
    assert first_crossing(x, y, 0.5) == pytest.approx(12.5)
    assert first_crossing(x, y, 0.9) is None
    assert first_crossing(x, np.array([0.6, 0.1, 0.9]), 0.5) == 0.0
    grid, both = common_grid([(x, y), (np.array([0.0, 40.0]), np.array([0.0, 1.0]))], points=3)
    assert grid.tolist() == [0, 10, 20] and both.tolist() == [[0.0, 0.4, 0.8], [0.0, 0.25, 0.5]]
