"""Answers to `reasoning-gym` problems, scored by their own data set. Runs in a worker process.

The gold answer is a line of JSON: the stated answer, the data set's name and parameters, and what else its
`score_answer` reads.

    {"answer": "(9 - 3) * 4", "question": "...", "dataset": "puzzle24", "params": {}, "metadata": "{'numbers': [...]}"}

`metadata` is a Python literal: JSON would turn tuples into lists and keys that are whole numbers into text.
"""

from __future__ import annotations

import ast
import contextlib
import json
from functools import lru_cache
from typing import Any

from kimi_rl.rewards.verdict import Verdict

KIND = "kimi_rl.rewards.reasoning_gym:score"  # as `reward.kind`


def encode_gold(dataset: str, params: dict[str, Any], entry: dict[str, Any]) -> str:
    """The gold of an entry of reasoning-gym. Metadata that no literal can state are left out."""
    metadata = {}
    for key, value in entry["metadata"].items():
        with contextlib.suppress(TypeError):
            metadata[key] = _plain(value)
    gold = {"answer": str(entry["answer"]), "question": entry["question"], "dataset": dataset, "params": params}
    return json.dumps({**gold, "metadata": repr(metadata)}, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """`value` of Python's own types, so that it survives `repr` and `literal_eval`. Raises TypeError."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):  # numpy's
        return str(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_plain(item) for item in value)
    raise TypeError(f"{type(value).__name__} has no literal")


def score(answer: str, gold: str) -> Verdict:
    """`correct` where the data set gives its full score. Part of it is `wrong`: many give some for the right answer
    among others, which would pay for a list of guesses.
    """
    try:
        entry = json.loads(gold)
        entry["metadata"] = ast.literal_eval(entry["metadata"])
        dataset = _dataset(entry.pop("dataset"), json.dumps(entry.pop("params")))
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        reason = f"the gold answer is none of reasoning-gym's ({type(error).__name__})"
        return Verdict.of("unparseable_gold", None, reason)
    value = float(dataset.score_answer(answer, entry))
    return Verdict.of("correct" if value >= 1 else "wrong", None, f"reasoning-gym scores it {value:.4g} of 1")


def preload(gold: str) -> None:
    """Import reasoning-gym and build the data set of `gold`. It takes seconds, so a worker does it before it forks."""
    with contextlib.suppress(Exception):  # what is wrong becomes a verdict in `score`
        entry = json.loads(gold)
        _dataset(entry["dataset"], json.dumps(entry["params"]))


def is_loaded(gold: str) -> bool:
    """Whether `preload` has been called for golds of this data set and these parameters."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        entry = json.loads(gold)
        return (entry["dataset"], json.dumps(entry["params"])) in _loaded
    return True  # no gold of ours: nothing to load


_loaded: set[tuple[str, str]] = set()


@lru_cache(maxsize=64)
def _dataset(name: str, params: str) -> Any:
    _loaded.add((name, params))
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, **json.loads(params))
