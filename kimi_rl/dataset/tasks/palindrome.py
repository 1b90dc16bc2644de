"""`palindrome`: write a sequence backwards. Question `q w x<sep>`, answer `x w q`.

One of the three synthetic tasks of the Kimi Linear report: reversing needs the exact content of every
position, which a recurrent state of fixed size has to hold. The report draws from random tokens; here symbols
are letters (and digits past 52), so that one symbol is one token of the byte tokenizer.
"""

from __future__ import annotations

import random
from typing import Annotated

from pydantic import Field, model_validator

from kimi_rl.dataset.tasks.base import MAX_SYMBOLS, Problem, Task, TaskParams, spaced_answer, symbol_names


class PalindromeParams(TaskParams):
    """Parameters of `palindrome`."""

    length: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="Symbols in the sequence.")
    min_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Every problem draws its length from min_length..length; unset: always `length`."
    )
    symbols: Annotated[int, Field(ge=2, le=MAX_SYMBOLS)] = Field(26, description="Different symbols.")

    @model_validator(mode="after")
    def _range(self) -> PalindromeParams:
        if self.min_length is not None and self.min_length > self.length:
            raise ValueError(f"min_length ({self.min_length}) must not exceed length ({self.length})")
        return self


def _draw(rng: random.Random, params: PalindromeParams) -> Problem:
    length = rng.randint(params.min_length or params.length, params.length)
    sequence = rng.choices(symbol_names(params.symbols), k=length)
    return Problem(" ".join(sequence) + "<sep>", *spaced_answer(sequence[::-1]))


TASK = Task("palindrome", PalindromeParams, _draw, answer_kind="exact")
