"""Reward functions in TRL's calling convention: `f(prompts, completions, **columns) -> list[float | None]`.

TRL's own reward functions have it already, so they and ours go into one list or one `WeightedReward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kimi_rl.errors import InputError
from kimi_rl.rewards.kinds import load_function
from kimi_rl.rewards.pool import VerifierPool
from kimi_rl.rewards.shaping import weighted_sum
from kimi_rl.rewards.verdict import Verdict

RewardFunction = Callable[..., list]
Completion = str | list[dict[str, str]]


def completion_text(completion: Completion) -> str:
    """The text of a completion as TRL passes it: a string, or chat messages (the last one's content
    counts).
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


class VerifiedReward:
    """The verdict's value as a TRL reward function; the gold answer is a column of the data set.

    `last_verdicts` holds the verdicts of the latest call, for the metrics and the rollout log.
    """

    def __init__(
        self,
        pool: VerifierPool,
        *,
        kind: str = "math",
        extract: Sequence[str] = ("boxed", "hash"),
        gold_column: str = "answer",
    ):
        self.pool, self.kind, self.extract, self.gold_column = pool, kind, tuple(extract), gold_column
        self.__name__ = f"verified_{kind}"  # TRL logs rewards by this name.
        self.last_verdicts: list[Verdict] = []

    def __call__(self, *, completions: Sequence[Completion], **columns: object) -> list[float | None]:
        golds = columns.get(self.gold_column)
        if golds is None:
            raise InputError(
                f"{self.__name__}: the data set has no column {self.gold_column!r} with the gold answers"
            )
        pairs = [(completion_text(c), gold) for c, gold in zip(completions, golds, strict=True)]  # type: ignore[call-overload]
        self.last_verdicts = self.pool.verify_many(pairs, kind=self.kind, extract=self.extract)
        return [verdict.value for verdict in self.last_verdicts]


def per_completion(function: Callable[[str], float]) -> RewardFunction:
    """A function of one text, such as those of `format.py`, as a TRL reward function of the same name."""

    def reward(*, completions: Sequence[Completion], **_: object) -> list[float]:
        return [function(completion_text(completion)) for completion in completions]

    reward.__name__ = function.__name__
    return reward


class WeightedReward:
    """The weighted sum of TRL reward functions, given as functions or as import paths
    `package.module:function`.
    """

    def __init__(self, functions: Sequence[RewardFunction | str], weights: Sequence[float]):
        if len(functions) != len(weights):
            raise InputError(
                f"WeightedReward: {len(functions)} functions but {len(weights)} weights; give one each"
            )
        self.functions = [load_function(f) if isinstance(f, str) else f for f in functions]
        self.weights = list(weights)
        self.__name__ = "+".join(getattr(f, "__name__", type(f).__name__) for f in self.functions)

    def __call__(self, **columns: object) -> list[float | None]:
        return weighted_sum([function(**columns) for function in self.functions], self.weights)
