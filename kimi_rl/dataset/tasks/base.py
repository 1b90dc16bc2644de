"""What every procedural task shares: seeded drawing, disjoint splits, parameters with good errors.

A problem belongs to exactly one split, decided by a hash of its own content and nothing else: not the seed,
not the index, not the parameters. So no held-out problem can be trained on, in this run or in any other, and
raising the difficulty or changing the seed never moves a problem across.
"""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kimi_rl.errors import InputError

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 8  # one problem in 8 is held out
_MAX_DRAWS = 2000  # a split that holds an eighth of all problems is missed this often with probability 1e-116
STALE_DRAWS = 500  # give up after so many problems in a row that were seen before: the space is used up


@dataclass(frozen=True)
class Problem:
    """What is asked, the worked solution to imitate (it ends in `#### answer`), and the gold answer."""

    question: str
    solution: str
    answer: str


class TaskParams(BaseModel):
    """Parameters of a task: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


@dataclass(frozen=True)
class Task:
    """A procedural task.

    `draw(rng, params)` makes a problem at random. `split_key(question)` is what the split is decided on: two
    questions with the same key (the same sum written in another order) always lie in the same split.
    `answer_kind` says how answers compare: "math" by value, "exact" as text (as maths, the sequences `a b`
    and `b a` are one product).
    """

    name: str
    params: type[TaskParams]
    draw: Callable[[random.Random, Any], Problem]
    answer_kind: Literal["math", "exact"]
    split_key: Callable[[str], str] = str
    # Used where the recipe names no size and no instruction; `form`: how solutions state the answer.
    train_size: int = 20_000
    held_out_size: int = 256
    instruction: str = ""
    form: str = "hash"

    def split_of(self, question: str) -> Split:
        """The one split that `question` belongs to."""
        return "held_out" if stable_hash(self.name, self.split_key(question)) % HELD_OUT_SHARE == 0 else "train"

    def generate(self, index: int, split: Split, seed: int, params: TaskParams) -> Problem:
        """Problem number `index` (from 0) of `split`: fixed by its arguments, the same in every process.

        Two indices may give the same problem; `problems` leaves repeats out. Raises InputError where the
        parameters leave no problem in the split.
        """
        rng = random.Random(stable_hash(self.name, split, seed, index))
        for _ in range(_MAX_DRAWS):
            problem = self.draw(rng, params)
            if self.split_of(problem.question) == split:
                return problem
        raise InputError(
            f"data.params: {self.name} with {_spelt(params)} found no {split} problem in {_MAX_DRAWS} draws; "
            f"allow more different problems (longer ones, or more symbols)"
        )

    def problems(self, size: int, split: Split, seed: int, params: TaskParams) -> list[Problem]:
        """The first `size` different problems of `split`; fewer where the parameters allow no more."""
        found: dict[str, Problem] = {}
        index = stale = 0
        while len(found) < size and stale < STALE_DRAWS:
            problem = self.generate(index, split, seed, params)
            index += 1
            stale = stale + 1 if problem.question in found else 0
            found.setdefault(problem.question, problem)
        return list(found.values())

    def parse_params(self, values: dict[str, Any]) -> TaskParams:
        """Checked parameters. Raises InputError naming the key, what was found and the nearest known key."""
        known = list(self.params.model_fields)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(
                    f"data.params.{key}: {self.name} has no such parameter{hint} (known: {', '.join(known)})"
                )
        try:
            return self.params.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(["data.params", *map(str, first["loc"])])
            reason = first["msg"].removeprefix("Value error, ")
            found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
            raise InputError(f"{place}: {reason}{found} (task {self.name})") from None


def spaced_answer(symbols: list[str]) -> tuple[str, str]:
    """(solution, answer) of a task whose answer is a sequence: `#### a b c` and `a b c`."""
    answer = " ".join(symbols)
    return f"#### {answer}", answer


def symbol_names(count: int) -> list[str]:
    """`count` different symbols of equal width: letters, then digits; more than 62: pairs of them."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    if count <= len(alphabet):
        return list(alphabet[:count])
    pairs = [first + second for first in alphabet for second in alphabet]
    return pairs[:count]


MAX_SYMBOLS = 62 * 62


def stable_hash(*parts: object) -> int:
    """64-bit hash that, unlike Python's own, is the same in every process."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _spelt(params: TaskParams) -> str:
    return ", ".join(f"{key}={value}" for key, value in params.model_dump().items() if value is not None)
