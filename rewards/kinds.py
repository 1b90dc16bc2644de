"""How an answer is compared, by name: `math`, `exact`, `integer`, `choice`, or a function of the user's
own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from kimi_rl.errors import InputError
from kimi_rl.rewards.exact import Outcome, choice_equal, exact_equal, integer_equal, integer_value

# Longer answers are wrong unread: no gold answer of the known data sets comes near (the longest has 210
# characters).
LONGEST_ANSWER = 2_000
KINDS = ("math", "exact", "integer", "choice")

_CHEAP: dict[str, Callable[[str, str], Outcome]] = {
    "exact": exact_equal,
    "integer": integer_equal,
    "choice": choice_equal,
}


def check_kind(kind: str) -> None:
    """Raises InputError unless `kind` is one of `KINDS` or looks like an import path
    `package.module:function`.
    """
    if kind not in KINDS and not all(part.strip() for part in (kind.split(":") if ":" in kind else [""])):
        raise InputError(
            f"reward kind: unknown {kind!r}; use one of {', '.join(KINDS)} "
            "or an import path package.module:function"
        )


def load_function(path: str) -> Callable:
    """The function at `package.module:function`. Raises InputError if it cannot be imported or called."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"reward function {path!r}: cannot import it ({error}); write package.module:function"
        ) from error
    if not callable(function):
        raise InputError(f"reward function {path!r}: is a {type(function).__name__}, not a function")
    return function


def decide_here(answer: str, gold: str, kind: str) -> Outcome | None:
    """The verdict if it needs no child process: cheap kinds, and `math` between two whole numbers. Else
    None.
    """
    if kind in _CHEAP:
        return _CHEAP[kind](answer, gold)
    if kind != "math":
        return None
    if len(answer) > LONGEST_ANSWER:
        return "wrong", f"the answer has {len(answer)} characters, more than {LONGEST_ANSWER}"
    wanted, got = integer_value(gold), integer_value(answer)
    # A grouped number such as 1,234 could also be a list; only the full comparison reads it both ways.
    if wanted is None or got is None or (wanted != got and ("," in answer or "," in gold)):
        return None
    if wanted == got:
        return "correct", f"{got} = {wanted}" if len(answer) < 60 else "the same whole number"
    return "wrong", "a different whole number"
