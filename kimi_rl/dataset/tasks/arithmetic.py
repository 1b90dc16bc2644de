"""`arithmetic`: whole-number sums with worked solutions, in five levels.

| level | question (2 digits) | worked solution |
| --- | --- | --- |
| 1 | `47+38=?` | `47+38=85. #### 85` |
| 2 | `47+38-19=?` | `47+38=85. 85-19=66. #### 66` |
| 3 | `(47+38)*3=?` | `47+38=85. 85*3=255. #### 255` |
| 4 | `(47+38)*3-19=?` | `47+38=85. 85*3=255. 255-19=236. #### 236` |
| 5 | `(47+38)*3-(25+14)*2=?` | ... |

Numbers stay non-negative throughout, and products have a one-digit factor, so that every step can be done
digit by digit. With `steps: digits` the solution spells those digit steps out, units first, with the carry or
borrow: `7+8=15 4+3+1=8 47+38=85. #### 85`.

With `slip_share` that share of the demonstrations is worked out correctly but then states an answer that is one too
high. Supervised training imitates such slips; reinforcement learning against the true answer unlearns them.
"""

from __future__ import annotations

import random
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kimi_rl.dataset.tasks.base import Problem, Task, TaskParams

Level = Annotated[int, Field(ge=1, le=5)]


class ArithmeticParams(TaskParams):
    """Parameters of `arithmetic`."""

    level: Level = Field(2, description="Difficulty, 1 to 5.")
    min_level: Level | None = Field(
        None, description="Every problem draws its level from min_level..max_level; unset: `level`."
    )
    max_level: Level | None = Field(None, description="See `min_level`; unset: `level`.")
    digits: Annotated[int, Field(ge=1, le=6)] = Field(
        2, description="Digits of every number in the question."
    )
    terms: Annotated[int, Field(ge=2, le=12)] | None = Field(
        None, description="Numbers in a chain of level 1 (default 2) or 2 (default 3)."
    )
    steps: Literal["plain", "digits"] = Field(
        "plain", description="`digits`: solutions show carries and borrows."
    )
    slip_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of the worked solutions whose stated answer is one too high."
    )

    @model_validator(mode="after")
    def _range(self) -> ArithmeticParams:
        low, high = self.levels
        if low > high:
            raise ValueError(f"min_level ({low}) must not exceed max_level ({high})")
        if self.terms is not None and high > 2:
            raise ValueError(
                f"terms ({self.terms}) needs levels 1 and 2, whose chains it sizes; found level {high}"
            )
        return self

    @property
    def levels(self) -> tuple[int, int]:
        """Lowest and highest level drawn."""
        low = self.level if self.min_level is None else self.min_level
        high = self.level if self.max_level is None else self.max_level
        return low, high


class _Work:
    """Carries out operations one by one and writes them down."""

    def __init__(self, steps: str) -> None:
        self.show_digits = steps == "digits"
        self.lines: list[str] = []

    def do(self, a: int, operator: str, b: int) -> int:
        result = a + b if operator == "+" else a - b if operator == "-" else a * b
        shown = f"{a}{operator}{b}={result}"
        columns = _columns(a, operator, b) if self.show_digits else []
        self.lines.append(" ".join([*columns, shown]) + ".")
        return result

    def solution(self, answer: int) -> str:
        return " ".join([*self.lines, f"#### {answer}"])


def _columns(a: int, operator: str, b: int) -> list[str]:
    """The digit steps of `a operator b`, units first; none where the operation is a single digit step itself.

    Sums write a carry as `+1`; differences write a borrow taken as `-1` and one made as ten added to the
    upper digit; products (`b` has one digit) write the carry as `+c`.
    """
    upper, lower = str(a)[::-1], str(b)[::-1]
    if len(upper) == 1 and len(lower) == 1:
        return []
    columns, carry = [], 0
    for place in range(len(upper) if operator == "*" else max(len(upper), len(lower))):
        x = int(upper[place]) if place < len(upper) else 0
        y = int(b) if operator == "*" else int(lower[place]) if place < len(lower) else 0
        if operator == "-":
            borrow = 1 if x - carry < y else 0
            value = x + 10 * borrow - y - carry
            columns.append(f"{x + 10 * borrow}-{y}{'-1' if carry else ''}={value}")
            carry = borrow
        else:
            value = (x * y if operator == "*" else x + y) + carry
            columns.append(f"{x}{operator}{y}{f'+{carry}' if carry else ''}={value}")
            carry = value // 10
    return columns


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _sign(rng: random.Random, total: int, term: int) -> str:
    """`+` or `-` at random, but never below zero."""
    return rng.choice("+-") if total >= term else "+"


def _chain(
    rng: random.Random, params: ArithmeticParams, work: _Work, terms: int, signed: bool
) -> tuple[str, int]:
    total = _number(rng, params.digits)
    text = str(total)
    for _ in range(terms - 1):
        term = _number(rng, params.digits)
        operator = _sign(rng, total, term) if signed else "+"
        text += f"{operator}{term}"
        total = work.do(total, operator, term)
    return text, total


def _product(rng: random.Random, params: ArithmeticParams, work: _Work) -> tuple[str, int]:
    """A sum or difference in parentheses times a digit from 2 to 9."""
    inner, total = _chain(rng, params, work, terms=2, signed=True)
    factor = rng.randrange(2, 10)
    return f"({inner})*{factor}", work.do(total, "*", factor)


def _draw(rng: random.Random, params: ArithmeticParams) -> Problem:
    level = rng.randint(*params.levels)
    work = _Work(params.steps)
    if level == 1:
        text, total = _chain(rng, params, work, params.terms or 2, signed=False)
    elif level == 2:
        text, total = _chain(rng, params, work, params.terms or 3, signed=True)
    else:
        text, total = _product(rng, params, work)
        if level == 4:
            term = _number(rng, params.digits)
            operator = _sign(rng, total, term)
            text, total = f"{text}{operator}{term}", work.do(total, operator, term)
        elif level == 5:
            other_text, other = _product(rng, params, work)
            operator = _sign(rng, total, other)
            text, total = f"{text}{operator}{other_text}", work.do(total, operator, other)
    # Drawn only when asked for, so that the problems of other settings stay what they were.
    slip = bool(params.slip_share) and rng.random() < params.slip_share
    return Problem(f"{text}=?", work.solution(total + slip), str(total))


def _same_numbers(question: str) -> str:
    """Sums of the same numbers, in any order and with any signs, share a split: 47+38 tells what 38+47 is."""
    return " ".join(sorted(re.findall(r"\d+", question)))


TASK = Task("arithmetic", ArithmeticParams, _draw, answer_kind="math", split_key=_same_numbers)
