"""Which problems are drawn: a function of the seed, the draws before and the success rates reported."""

from collections import Counter

import pytest

from kimi_rl.dataset.prompt_order import PromptSampler


def draws(sampler, count=3, steps=5):
    return [sampler.draw(count, step) for step in range(1, steps + 1)]


def test_shuffle_goes_round_and_round():
    rows = [row for drawn in draws(PromptSampler(7, seed=4), steps=7) for row in drawn]
    for start in (0, 7, 14):
        assert sorted(rows[start : start + 7]) == list(range(7)), "no prompt comes twice before all have come once"
    assert rows[:7] != rows[7:14]
    assert rows == [row for drawn in draws(PromptSampler(7, seed=4), steps=7) for row in drawn]
    assert rows != [row for drawn in draws(PromptSampler(7, seed=5), steps=7) for row in drawn]


@pytest.mark.parametrize("order", ["shuffle", "prioritized", "curriculum"])
def test_goes_on_from_its_state_as_if_undisturbed(order):
    def make():
        return PromptSampler(20, seed=1, order=order, curriculum_steps=6)

    def play(sampler, steps):
        out = []
        for step in steps:
            drawn = sampler.draw(4, step)
            for row in drawn:
                sampler.report(row, row / 20)
            out.append(drawn)
        return out

    undisturbed = play(make(), range(1, 9))
    first = make()
    before = play(first, range(1, 4))
    second = make()
    second.load(first.state())
    assert before + play(second, range(4, 9)) == undisturbed


def test_rows_given_back_come_first_and_once():
    sampler = PromptSampler(10, seed=0)
    first, second = sampler.draw(4, 1), sampler.draw(4, 2)
    resumed = PromptSampler(10, seed=0)
    resumed.load(sampler.state())
    resumed.give_back(second)
    assert resumed.draw(4, 2) == second
    assert sorted(first + second + resumed.draw(2, 3)) == list(range(10))


def test_prioritized_draws_what_is_not_yet_solved():
    sampler = PromptSampler(4, seed=0, order="prioritized")
    for row, rate in enumerate((1.0, 0.5, 0.0)):
        sampler.report(row, rate)
    counts = Counter(row for step in range(2000) for row in sampler.draw(1, step))
    weights = [0.05, 0.5, 1.0, 1.0]  # the fourth was never seen
    for row, weight in enumerate(weights):
        assert counts[row] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)


def test_running_rate_follows_the_newest():
    sampler = PromptSampler(2, seed=0, order="prioritized")
    sampler.report(0, 0.0)
    sampler.report(0, 1.0)
    assert sampler.weights(1) == [0.5, 1.0]


def test_curriculum_starts_easy_and_opens_up():
    sampler = PromptSampler(10, seed=0, order="curriculum", curriculum_steps=8, prior=[-row for row in range(10)])
    assert [row for row, w in enumerate(sampler.weights(1)) if w] == [0, 1], "the shortest solutions"
    sampler.report(0, 0.0)  # turned out hard
    sampler.report(1, 1.0)
    sampler.report(2, 1.0)
    assert [row for row, w in enumerate(sampler.weights(1)) if w] == [1, 2]
    assert sum(sampler.weights(5)) == 6
    assert sum(sampler.weights(9)) == sum(sampler.weights(100)) == 10


def test_draws_differ_within_a_step_while_there_are_enough():
    sampler = PromptSampler(6, seed=0, order="prioritized")
    assert len(set(sampler.draw(6, 1))) == 6
    assert not set(sampler.draw(3, 2, avoid=[0, 1, 2])) & {0, 1, 2}
    assert sorted(Counter(sampler.draw(12, 3)).values()) == [2] * 6
