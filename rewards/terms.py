"""Further terms of a recipe's reward (`reward.terms`), each a reward function in TRL's calling convention:

    f(prompts=..., completions=..., completion_ids=..., verdicts=..., **columns) -> one float or None a completion

`verdicts` are ours; columns are those of the data set. Completions of one prompt stand together. A term is named here,
or is any function of TRL's convention by import path, TRL's own ones unchanged.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_rl.errors import InputError
from kimi_rl.rewards.format import think_answer_format, think_format
from kimi_rl.rewards.kinds import load_function
from kimi_rl.rewards.shaping import repetition_penalty, soft_overlong_punishment
from kimi_rl.rewards.trl_functions import RewardFunction, per_completion

# Name -> its parameters.
NAMED: dict[str, tuple[str, ...]] = {
    "think_format": (),
    "think_answer_format": (),
    "overlong": ("cache",),
    "repetition": ("n", "max_penalty"),
}


def check_name(use: str) -> None:
    """Raises InputError unless `use` is a name of `NAMED` or looks like an import path."""
    if use in NAMED or (":" in use and all(part.strip() for part in use.split(":"))):
        return
    near = difflib.get_close_matches(use, NAMED, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMED)}, or package.module:function"
    raise InputError(f"reward term: unknown {use!r}; {hint}")


def build_term(use: str, params: Mapping[str, Any], *, max_length: int) -> RewardFunction:
    """The reward function of a term.

    `params`: of a named term its parameters (`overlong`: `cache` tokens before `max_length`, over which the
    punishment grows; `repetition`: `n`, `max_penalty`); with an import path they are passed once to the function
    there, which then returns the reward function, as TRL's `get_...` functions do. `max_length`: the most tokens of a
    completion. Raises InputError on an unknown name or parameter and on a path that cannot be imported.
    """
    check_name(use)
    if use not in NAMED:
        function = load_function(use)
        return function(**params) if params else function
    for key in params:
        if key not in NAMED[use]:
            known = ", ".join(NAMED[use]) or "none"
            raise InputError(f"reward term {use}: no parameter {key!r} (known: {known})")
        if isinstance(params[key], bool) or not isinstance(params[key], int if key != "max_penalty" else int | float):
            raise InputError(f"reward term {use}: {key} must be a number, found {params[key]!r}")
    if use in ("think_format", "think_answer_format"):
        return per_completion({"think_format": think_format, "think_answer_format": think_answer_format}[use])
    if use == "overlong":
        if "cache" not in params:
            raise InputError("reward term overlong: needs `cache`, the tokens before max_tokens that are punished")

        def of_tokens(tokens: Sequence[int]) -> float:
            return soft_overlong_punishment(len(tokens), max_length=max_length, cache=params["cache"])
    else:

        def of_tokens(tokens: Sequence[int]) -> float:
            return repetition_penalty(tokens, **params)

    of_tokens([])  # wrong values show now

    def term(*, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [of_tokens(tokens) for tokens in completion_ids]

    return term


def term_name(use: str) -> str:
    """The name of a term in metrics and records: the name, or the function's."""
    return use.rpartition(":")[2]


def call_term(
    name: str, function: RewardFunction, completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """The values of a term. Raises InputError where it is no function of TRL's convention or returns too few."""
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward term {name}: is an async function; give a plain one")
    values = function(completions=completions, **columns)
    if not isinstance(values, Sequence) or len(values) != len(completions):
        found = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
        raise InputError(f"reward term {name}: returned {found} for {len(completions)} completions; return one each")
    return [None if value is None else float(value) for value in values]

