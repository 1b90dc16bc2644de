"""`mqar`: multi-query associative recall. Question `a:Q b:D c:X? c a`, answer `X Q`.

One of the three synthetic tasks of the Kimi Linear report (after Zoology's MQAR): key-value pairs, then some
of the keys, to be answered with their values. Keys and values come from different symbols, each key stands
once.
"""

from __future__ import annotations

import random
from itertools import product
from string import ascii_lowercase, ascii_uppercase
from typing import Annotated

from pydantic import Field, model_validator

from kimi_rl.dataset.tasks.base import Problem, Task, TaskParams, spaced_answer


class MqarParams(TaskParams):
    """Parameters of `mqar`."""

    length: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="Key-value pairs.")
    min_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Every problem draws its pairs from min_length..length; unset: always `length`."
    )
    queries: Annotated[int, Field(ge=1)] = Field(4, description="Keys asked for, each once.")
    values: Annotated[int, Field(ge=2, le=26)] = Field(26, description="Different values (capital letters).")

    @model_validator(mode="after")
    def _range(self) -> MqarParams:
        shortest = self.min_length or self.length
        if shortest > self.length:
            raise ValueError(f"min_length ({shortest}) must not exceed length ({self.length})")
        if self.queries > shortest:
            raise ValueError(f"queries ({self.queries}) must not exceed the number of pairs ({shortest})")
        return self


# Keys are lower-case words of 1, 2 or 3 letters, each list at least twice as long as the pairs it serves: the
# set of keys then differs from problem to problem and cannot be learnt by heart.
_WORDS = [["".join(word) for word in product(ascii_lowercase, repeat=width)] for width in (1, 2, 3)]


def _draw(rng: random.Random, params: MqarParams) -> Problem:
    length = rng.randint(params.min_length or params.length, params.length)
    words = next(words for words in _WORDS if len(words) >= 2 * params.length)
    keys = rng.sample(words, length)
    values = rng.choices(ascii_uppercase[: params.values], k=length)
    asked = rng.sample(range(length), params.queries)
    pairs = " ".join(f"{key}:{value}" for key, value in zip(keys, values, strict=True))
    return Problem(f"{pairs}? {' '.join(keys[i] for i in asked)}", *spaced_answer([values[i] for i in asked]))


TASK = Task("mqar", MqarParams, _draw, answer_kind="exact")
