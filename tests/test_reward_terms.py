"""The terms of a recipe's reward: what a recipe may say, and what a completion then gets."""

import pytest

from kimi_rl.errors import InputError
from kimi_rl.learner.reward import RecipeReward
from kimi_rl.pipeline import check_inputs
from kimi_rl.recipe_load import parse_recipe
from kimi_rl.rewards import Verdict

STAGE = "stages: [{kind: rlvr, steps: 1, prompts_per_step: 2, group_size: 2, rollout: {max_tokens: 10}}]"


def recipe(reward: str):
    return parse_recipe(f"data: {{task: arithmetic}}\nreward: {reward}\n{STAGE}")


def rewards(section, statuses, completions, lengths):
    reward = RecipeReward(section, max_length=10)
    verdicts = [Verdict.of(status, text, "stand-in") for status, text in zip(statuses, completions, strict=True)]
    reward.expect([verdict.value for verdict in verdicts], verdicts)
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    values = reward(
        prompts=["q"] * len(messages),
        completions=messages,
        completion_ids=[list(range(length)) for length in lengths],
        answer=["1"] * len(messages),
        trainer_state=None,
    )
    return values, reward


def test_a_recipe_without_terms_gives_the_verdict():
    values, reward = rewards(
        recipe("{}").reward, ["correct", "wrong", "unparseable_gold", "timeout"], ["a"] * 4, [1] * 4
    )
    assert values == [1.0, 0.0, None, 0.0] and reward.term_means() == {} and reward.columns(0) == {}


def test_terms_are_weighted_and_added():
    section = recipe(
        "{terms: [{use: think_format, weight: 0.5}, {use: overlong, params: {cache: 4}}, "
        "{use: 'trl.rewards.format_rewards:think_format_reward', weight: 100.0}]}"
    ).reward
    texts = ["<think>a</think> b", "b", "b", "<think>a</think> b"]
    values, reward = rewards(section, ["correct", "wrong", "correct", "unparseable_gold"], texts, [4, 8, 9, 9])
    # verdict, format x 0.5, overlong (from 6 to 10 tokens), TRL's format x 100
    assert values == [1 + 0.5 + 0 + 100, 0 + 0 - 0.5 + 0, 1 + 0 - 0.75 + 0, None]
    assert reward.columns(1) == {
        "reward_think_format": 0.0,
        "reward_overlong": -0.5,
        "reward_think_format_reward": 0.0,
    }
    assert reward.term_means()["reward_overlong"] == pytest.approx(-2.0 / 4)


def test_a_path_with_params_is_called_for_its_function():
    section = recipe(
        "{terms: [{use: 'trl.rewards.other_rewards:get_soft_overlong_punishment', "
        "params: {max_completion_len: 10, soft_punish_cache: 4}}, {use: repetition, params: {n: 1}}]}"
    ).reward
    values, reward = rewards(section, ["correct"], ["a"], [8])
    assert values == [0.5] and reward.columns(0)["reward_repetition"] == 0.0


def short(**_):
    return [1.0]


def nothing(completions, **_):
    return [None] * len(completions)


def test_a_term_that_says_none_leaves_the_completion_out_and_too_few_values_are_an_error():
    values, reward = rewards(recipe(f"{{terms: [{{use: '{__name__}:nothing'}}]}}").reward, ["correct"], ["a"], [1])
    assert values == [None] and reward.term_means() == {}
    with pytest.raises(InputError, match="short: returned 1 values for 2"):
        rewards(recipe(f"{{terms: [{{use: '{__name__}:short'}}]}}").reward, ["wrong"] * 2, ["a"] * 2, [1, 1])


@pytest.mark.parametrize(
    "terms,message",
    [
        ("[{use: overlongg, params: {cache: 4}}]", "did you mean 'overlong'"),
        ("[{use: whatever}]", "package.module:function"),
        ("[{use: overlong}]", "needs `cache`"),
        ("[{use: overlong, params: {cache: 11}}]", r"cache \(11\) must be in 1..max_length \(10\).*stage rlvr"),
        ("[{use: overlong, params: {cache: four}}]", "cache must be a number, found 'four'"),
        ("[{use: repetition, params: {k: 3}}]", "no parameter 'k'"),
        ("[{use: repetition, params: {n: 0}}]", "n >= 1"),
        ("[{use: think_format, params: {n: 3}}]", "known: none"),
        ("[{use: repetition}, {use: repetition}]", "'repetition' stands 2 times"),
        ("[{use: repetition, wieght: 1}]", "weight"),
    ],
)
def test_bad_terms_are_one_line_before_anything_loads(terms, message):
    with pytest.raises(InputError, match=message) as error:
        recipe(f"{{terms: {terms}}}")
    assert "\n" not in str(error.value)


def test_a_path_that_cannot_be_imported_shows_before_anything_loads():
    with pytest.raises(InputError, match="no_such.module:f.*cannot import"):
        check_inputs(recipe("{terms: [{use: 'no_such.module:f'}]}"))
