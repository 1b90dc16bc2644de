"""Answers compared as they are written: text, whole numbers, multiple choice. All of it is cheap and cannot
hang.
"""

from __future__ import annotations

import re

from kimi_rl.rewards.verdict import Status

Outcome = tuple[Status, str]

_PLAIN = re.compile(r"[-+]?[0-9]{1,1000}")
_GROUPED = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3}){1,300}")
_CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\s*\(?\s*([A-Za-z])\s*\)?\s*\.?\s*\}?\s*\.?")


def exact_equal(answer: str, gold: str) -> Outcome:
    """The same text, runs of white space counting as one space and none at the ends. Case counts."""
    if not gold.split():
        return "unparseable_gold", "the gold answer is empty"
    same = answer.split() == gold.split()
    return ("correct", "the same text") if same else ("wrong", f"the text differs from {_short(gold)}")


def integer_value(text: str) -> int | None:
    """The whole number that `text` is (`42`, `-7`, `+3`, `007`, `1,234`, an outer `$`), ASCII digits only,
    or None.
    """
    text = text.strip().strip("$").strip()
    if _PLAIN.fullmatch(text):
        return int(text)
    return int(text.replace(",", "")) if _GROUPED.fullmatch(text) else None


def integer_equal(answer: str, gold: str) -> Outcome:
    """The same whole number. Anything that is not one (`4.0`, `x=4`, `four`) is wrong."""
    wanted, got = integer_value(gold), integer_value(answer)
    if wanted is None:
        return "unparseable_gold", f"the gold answer {_short(gold)} is not a whole number"
    if got is None:
        return "wrong", f"{_short(answer)} is not a whole number"
    return (
        ("correct", f"{got} = {wanted}")
        if got == wanted
        else ("wrong", f"{_short(answer)} is not {_short(gold)}")
    )


def choice_equal(answer: str, gold: str) -> Outcome:
    """The same letter: `B`, `(B)`, `b.`, `\\text{(B)}` are one; a letter with any other text is wrong."""
    wanted, got = _CHOICE.fullmatch(gold.strip()), _CHOICE.fullmatch(answer.strip())
    if wanted is None:
        return "unparseable_gold", f"the gold answer {_short(gold)} is not one letter"
    if got is None:
        return "wrong", f"{_short(answer)} is not one letter"
    same = got[1].upper() == wanted[1].upper()
    return ("correct" if same else "wrong"), f"chose {got[1].upper()}, the gold answer is {wanted[1].upper()}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
