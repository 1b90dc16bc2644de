"""Figures and their errors, against brute force and simulations with a known truth."""

import itertools
import math

import numpy as np
import pytest

from kimi_rl.statistics import (
    Z95,
    bootstrap_interval,
    clustered_interval,
    estimate,
    majority,
    paired_gain,
    pass_at_k,
    standard_error,
    t_quantile,
)


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for correct in range(samples + 1):
        drawn = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in itertools.combinations(drawn, k)]
            assert pass_at_k(np.array([correct]), samples, k)[0] == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_closed_form_at_sizes_that_overflow_floats():
    n, c, k = 2000, 3, 500
    closed = 1 - math.prod((n - k - i) / (n - i) for i in range(c))  # the c right samples all missed
    assert pass_at_k(np.array([0, c, n]), n, k) == pytest.approx([0.0, closed, 1.0], abs=1e-12)
    assert pass_at_k(np.array([3]), 10, 1)[0] == pytest.approx(0.3)


def test_pass_at_k_is_unbiased():
    rng, p, n, k = np.random.default_rng(0), 0.3, 8, 4
    found = pass_at_k(rng.binomial(n, p, size=200_000), n, k)
    assert found.mean() == pytest.approx(1 - (1 - p) ** k, abs=5 * found.std() / math.sqrt(len(found)))
    naive = 1 - (1 - rng.binomial(n, p, size=200_000) / n) ** k
    assert abs(naive.mean() - (1 - (1 - p) ** k)) > 0.02  # the plug-in that the unbiased form replaces


@pytest.mark.parametrize("k", [0, 9])
def test_pass_at_k_refuses_k_outside_the_samples(k):
    with pytest.raises(ValueError, match="samples 8"):
        pass_at_k(np.array([1]), 8, k)


@pytest.mark.parametrize(
    "groups,chance",
    [
        ("rrw", 1.0),
        ("rww", 0.0),
        ("rwwrx", 0.5),
        ("rwx", 1 / 3),
        ("wwx", 0.0),
        ([None, None, "r"], 1.0),  # silence has no vote
        ([None, None], 0.0),
        ("", 0.0),
    ],
)
def test_majority(groups, chance):
    assert majority(list(groups), "r") == pytest.approx(chance)


def test_majority_is_what_a_fair_draw_gives():
    rng = np.random.default_rng(1)
    for groups in itertools.product("rwx", repeat=4):
        counts = {g: groups.count(g) for g in set(groups)}
        tied = [g for g, count in counts.items() if count == max(counts.values())]
        drawn = rng.choice(sorted(tied), size=4000)
        assert majority(groups, "r") == pytest.approx(np.mean(drawn == "r"), abs=0.04)


def test_t_quantile():
    for degrees, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (255, 1.969)):
        assert t_quantile(degrees) == pytest.approx(wanted, abs=2e-3)
    assert t_quantile(10**6) == pytest.approx(Z95, abs=1e-5)


def simulate(rng, repetitions, problems, samples, accuracy, spread):
    """Accuracies [repetitions, problems] of models whose solving chance on a problem is Beta of mean `accuracy`.

    `spread` -> 0: every problem is always or never solved; large: all problems are equally hard.
    """
    chance = rng.beta(accuracy * spread, (1 - accuracy) * spread, size=(repetitions, problems))
    return rng.binomial(samples, chance) / samples


def coverage(values, samples, accuracy):
    low, high = clustered_interval(values, samples)
    return float(np.mean((low <= accuracy) & (accuracy <= high)))


@pytest.mark.parametrize("samples,problems", [(4, 50), (4, 200), (16, 200)])
@pytest.mark.parametrize("accuracy,spread", [(0.1, 1), (0.1, 5), (0.3, 1), (0.5, 0.3), (0.5, 5), (0.9, 1)])
def test_coverage_of_avg_at_k(samples, problems, accuracy, spread):
    values = simulate(np.random.default_rng(2), 20_000, problems, samples, accuracy, spread)
    assert 0.93 <= coverage(values, samples, accuracy) <= 0.97


@pytest.mark.parametrize("accuracy", [0.02, 0.98])
def test_coverage_near_the_ends(accuracy):
    for problems in (200, 500):
        values = simulate(np.random.default_rng(3), 20_000, problems, 8, accuracy, 5)
        assert 0.93 <= coverage(values, 8, accuracy) <= 0.97


def test_coverage_of_one_answer_a_problem():
    """Greedy accuracy. A count takes few values, so coverage swings with the accuracy: its mean over a band counts."""
    rng = np.random.default_rng(4)
    for problems in (30, 100, 500):
        for low, high in ((0.02, 0.1), (0.3, 0.7), (0.9, 0.98)):
            covered = [
                coverage((rng.random((1000, problems)) < p).astype(float), 1, p) for p in np.linspace(low, high, 21)
            ]
            assert 0.93 <= np.mean(covered) <= 0.97, (problems, low)


def test_coverage_of_pass_at_k_between_1_and_all_samples():
    rng, samples, k, a, b = np.random.default_rng(5), 8, 4, 0.5, 1.5
    chance = rng.beta(a, b, size=(10_000, 100))
    values = pass_at_k(rng.binomial(samples, chance), samples, k)
    truth = 1 - math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(a + b + k))
    assert 0.93 <= coverage(values, samples, truth) <= 0.97


def test_coverage_of_the_bootstrap():
    rng, accuracy = np.random.default_rng(6), 0.4
    values = simulate(rng, 1500, 200, 4, accuracy, 1)
    covered = []
    for seed, row in enumerate(values):
        low, high = bootstrap_interval(row, seed=seed, resamples=400)
        covered.append(low <= accuracy <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_samples_are_not_taken_for_independent_problems():
    """Where every problem is always or never solved, 16 samples say no more than one."""
    solved = np.repeat([0.0, 1.0], 50)
    assert estimate(solved, samples=16).se == estimate(solved, samples=1).se
    wide, alone = clustered_interval(solved[None], 16), clustered_interval(solved[None], 1)
    assert wide[1] - wide[0] == pytest.approx(alone[1] - alone[0], rel=0.02)
    even = np.full(100, 0.5)  # as spread as can be: 1600 independent answers, less the pseudo-problem
    low, high = clustered_interval(even[None], 16)
    assert high - low < 0.4 * (wide[1] - wide[0])


def test_wilson_by_hand():
    low, high = clustered_interval(np.array([[1.0] * 7 + [0.0] * 3]), 1)
    assert (low[0], high[0]) == pytest.approx((0.3968, 0.8922), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_wrong_or_all_right_still_leaves_doubt(value):
    found = estimate(np.full(20, value), samples=4)
    assert found.value == value and found.se == 0
    low, high = found.interval
    assert low <= value <= high and high - low == pytest.approx(0.18, abs=0.01)


def test_estimate_of_one_problem_and_of_rewards_beyond_one():
    low, high = estimate(np.array([0.5]), samples=2).interval
    assert 0 <= low < 0.2 and 0.8 < high <= 1
    found = estimate(np.array([-1.0, 3.0, 2.0, 0.0]))
    half = t_quantile(3) * standard_error(np.array([-1.0, 3.0, 2.0, 0.0]))
    assert found.interval == pytest.approx((1 - half, 1 + half))


def test_estimate_is_repeatable_and_its_bootstrap_is_near_the_normal_interval():
    values = np.random.default_rng(7).random(400)
    found = estimate(values, samples=4, seed=3)
    assert found == estimate(values, samples=4, seed=3)
    assert found.se == pytest.approx(values.std(ddof=1) / 20)
    assert found.bootstrap == pytest.approx((found.value - Z95 * found.se, found.value + Z95 * found.se), abs=0.004)


def test_the_interval_of_a_gain_holds_it_and_is_narrower_than_two_evaluations_apart():
    random = np.random.default_rng(0)
    for gain, n in ((0.0, 100), (0.05, 300), (0.0, 300)):
        hits, widths, apart = 0, [], []
        for _ in range(1000):
            ease = random.beta(0.3, 2.0, n)  # most problems are hard
            before, after = random.random(n) < ease, random.random(n) < ease + gain * (1 - ease)
            found = paired_gain(before, after)
            assert found.value == pytest.approx(after.mean() - before.mean())
            hits += found.interval[0] <= (gain * (1 - ease)).mean() <= found.interval[1]
            widths.append(found.interval[1] - found.interval[0])
            apart.append(2 * Z95 * np.hypot(standard_error(before * 1.0), standard_error(after * 1.0)))
        assert 0.94 <= hits / 1000 <= 0.99, (gain, n, hits)
        assert np.mean(widths) < 0.9 * np.mean(apart)


def test_a_gain_of_problems_that_all_stayed_is_not_certain():
    found = paired_gain([0.0, 1.0] * 50, [0.0, 1.0] * 50)
    assert found.value == 0.0 and found.interval[0] == -found.interval[1] == pytest.approx(-0.0198, abs=1e-4)
    assert paired_gain([0.0], [1.0]).interval[1] == 1.0
