"""The reward of a completion in training: what its verdict is worth, and the recipe's further terms, weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimi_rl.recipe import RewardSection
from kimi_rl.rewards import Verdict
from kimi_rl.rewards.shaping import weighted_sum
from kimi_rl.rewards.terms import build_term, call_term, term_name


class RecipeReward:
    """TRL reward function for the batch at hand, whose verdicts were passed by `expect` before.

    A completion whose gold answer cannot be parsed, or for which a term says None, gets no reward at all (None), so
    that it leaves the batch instead of being scored 0. Keeps what it gave, for metrics and records.
    """

    __name__ = "verified"

    def __init__(self, section: RewardSection, *, max_length: int):
        self._weights = [1.0, *(term.weight for term in section.terms)]
        self._functions = {
            term_name(term.use): build_term(term.use, term.params, max_length=max_length) for term in section.terms
        }
        self._values: list[float | None] = []
        self._verdicts: list[Verdict] = []
        self.terms: dict[str, list[float | None]] = {}
        self.rewards: list[float | None] = []

    def expect(self, values: list[float | None], verdicts: list[Verdict]) -> None:
        """The next batch's verdicts and what they are worth, one a completion."""
        self._values, self._verdicts = values, verdicts

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        columns["verdicts"] = self._verdicts
        self.terms = {
            name: call_term(name, function, completions, **columns) for name, function in self._functions.items()
        }
        self.rewards = weighted_sum([self._values, *self.terms.values()], self._weights)
        return self.rewards

    def term_means(self) -> dict[str, float]:
        """The mean of each term over the completions that have one, by `reward_<name>`."""
        found = {name: [v for v in values if v is not None] for name, values in self.terms.items()}
        return {f"reward_{name}": sum(values) / len(values) for name, values in found.items() if values}

    def columns(self, at: int) -> dict[str, float | None]:
        """The terms of completion `at`, for its record."""
        return {f"reward_{name}": values[at] for name, values in self.terms.items()}
