"""Length, repetition and format terms, and TRL-style functions, against values worked out by hand."""

import pytest

from kimi_rl.errors import InputError
from kimi_rl.rewards import VerifierPool
from kimi_rl.rewards.format import think_answer_format, think_format
from kimi_rl.rewards.shaping import (
    k15_length_rewards,
    repetition_penalty,
    soft_overlong_punishment,
    weighted_sum,
)
from kimi_rl.rewards.trl_functions import VerifiedReward, WeightedReward, per_completion


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (500, -1)]
)
def test_soft_overlong_punishment(length, expected):
    assert soft_overlong_punishment(length, max_length=100, cache=20) == expected


def test_soft_overlong_punishment_is_trls():
    other_rewards = pytest.importorskip("trl.rewards.other_rewards")
    theirs = other_rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = list(range(0, 140, 3))
    ours = [soft_overlong_punishment(n, max_length=100, cache=20) for n in lengths]
    assert ours == pytest.approx(theirs(completion_ids=[[0] * n for n in lengths]))


def test_k15_length_rewards():
    assert k15_length_rewards([10, 20, 30], [True, True, True]) == [0.5, 0.0, -0.5]
    # A short wrong answer earns nothing; a long wrong one is punished.
    assert k15_length_rewards([10, 20, 30], [False, False, False]) == [0.0, 0.0, -0.5]
    assert k15_length_rewards([7, 7], [True, False]) == [0.0, 0.0]
    assert k15_length_rewards([], []) == []
    with pytest.raises(InputError, match="2 lengths but 1"):
        k15_length_rewards([1, 2], [True])


def test_repetition_penalty():
    assert repetition_penalty([1, 2, 3, 4]) == 0.0
    assert repetition_penalty([1, 1, 1, 1]) == -0.5
    assert repetition_penalty(["a", "b", "a", "b", "a", "b"], n=2, max_penalty=-2.0) == pytest.approx(
        -2 * (1 - 2 / 5)
    )
    assert repetition_penalty([1, 1], n=3) == 0.0
    with pytest.raises(InputError):
        repetition_penalty([1], max_penalty=1.0)


def test_weighted_sum():
    assert weighted_sum([[1.0, 0.0, None], [-1.0, -0.5, 0.0]], [1.0, 0.5]) == [0.5, -0.25, None]
    with pytest.raises(InputError, match="2 terms but 1 weights"):
        weighted_sum([[1.0], [1.0]], [1.0])
    with pytest.raises(InputError, match=r"\[1, 2\]"):
        weighted_sum([[1.0], [1.0, 2.0]], [1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "think", "think_answer"),
    [
        ("<think>a</think> b", 1.0, 0.0),
        ("a</think> b", 1.0, 0.0),
        ("<think>a</think><answer>b</answer>", 0.0, 1.0),
        (" <think>a</think>\n<answer>b</answer>\n", 0.0, 1.0),
        ("<think></think> b", 0.0, 0.0),
        ("<think>a</think>", 0.0, 0.0),
        ("x <think>a</think> b", 0.0, 0.0),
        ("<think>a</think><think>a</think> b", 0.0, 0.0),
        ("<think>a</think><answer></answer>", 0.0, 0.0),
        ("<think>a</think>x<answer>b</answer>", 0.0, 0.0),
        ("<answer>b</answer><think>a</think>", 0.0, 0.0),
        ("a", 0.0, 0.0),
    ],
)
def test_formats(text, think, think_answer):
    assert (think_format(text), think_answer_format(text)) == (think, think_answer)


def test_verified_reward_in_trls_convention():
    with VerifierPool() as pool:
        reward = VerifiedReward(pool)
        completions = ["\\boxed{1}", [{"role": "assistant", "content": "\\boxed{3}"}], "\\boxed{1}"]
        columns = {"prompts": ["q"] * 3, "completion_ids": [[1]] * 3, "answer": ["1", "2", "\\frac{1}{"]}
        assert reward(completions=completions, **columns) == [1.0, 0.0, None]
        assert [v.status for v in reward.last_verdicts] == ["correct", "wrong", "unparseable_gold"]
        with pytest.raises(InputError, match="'answer'"):
            reward(completions=completions)


def test_weighted_reward_takes_our_functions_paths_and_trls():
    format_rewards = pytest.importorskip("trl.rewards.format_rewards")
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
    trl_function = format_rewards.think_format_reward
    total = WeightedReward(
        [per_completion(think_format), trl_function, "trl.rewards.format_rewards:think_format_reward"],
        [1.0, 2.0, 4.0],
    )
    assert total(prompts=["", ""], completions=completions) == [7.0, 0.0]
    assert total.__name__ == "think_format+think_format_reward+think_format_reward"
    with pytest.raises(InputError, match="no_such"):
        WeightedReward(["no_such.module:f"], [1.0])
