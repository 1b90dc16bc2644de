"""`stack`: push to and pop from several stacks. Question `0+a 1+b 0+c 0- 1-=?`, answer `c b`.

One of the three synthetic tasks of the Kimi Linear report (there with 64 stacks): `S+x` pushes x on stack S,
`S-` pops it, and the answer is every popped element, in order. A stack is popped only while it holds
something.
"""

from __future__ import annotations

import random
from typing import Annotated

from pydantic import Field, model_validator

from kimi_rl.dataset.tasks.base import MAX_SYMBOLS, Problem, Task, TaskParams, spaced_answer, symbol_names


class StackParams(TaskParams):
    """Parameters of `stack`."""

    length: Annotated[int, Field(ge=2, le=4096)] = Field(10, description="Operations.")
    min_length: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Every problem draws its operations from min_length..length; unset: always `length`.",
    )
    stacks: Annotated[int, Field(ge=1, le=64)] = Field(4, description="Stacks.")
    symbols: Annotated[int, Field(ge=2, le=MAX_SYMBOLS)] = Field(26, description="Different elements.")

    @model_validator(mode="after")
    def _range(self) -> StackParams:
        if self.min_length is not None and self.min_length > self.length:
            raise ValueError(f"min_length ({self.min_length}) must not exceed length ({self.length})")
        return self


def _draw(rng: random.Random, params: StackParams) -> Problem:
    length = rng.randint(params.min_length or params.length, params.length)
    symbols = symbol_names(params.symbols)
    stacks: list[list[str]] = [[] for _ in range(params.stacks)]
    operations, popped = [], []
    for step in range(length):
        filled = [number for number, stack in enumerate(stacks) if stack]
        # The last operation is a pop (something is on a stack by then: see below), so that no answer is
        # empty.
        last = step == length - 1
        if filled and (last or (rng.random() < 0.5 and not _would_strand(stacks, length - step))):
            number = rng.choice(filled)
            popped.append(stacks[number].pop())
            operations.append(f"{number}-")
        else:
            number = rng.randrange(params.stacks)
            element = rng.choice(symbols)
            stacks[number].append(element)
            operations.append(f"{number}+{element}")
    return Problem(" ".join(operations) + "=?", *spaced_answer(popped))


def _would_strand(stacks: list[list[str]], left: int) -> bool:
    """True where a pop now would leave the last operation, next after it, nothing to pop."""
    return left == 2 and sum(map(len, stacks)) == 1


TASK = Task("stack", StackParams, _draw, answer_kind="exact")
