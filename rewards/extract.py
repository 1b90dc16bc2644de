"""Find the final answer of a completion. Pure functions in time linear in the text; no regular expression
backtracks.

Rules (docs/rewards.md has them with examples):

* Only what follows the last `</think>` counts; an opened and unclosed `<think>` has no final answer.
* Of the allowed markers the one that stands last in the text counts.
* Several boxes joined by nothing but `,`, `and`, `or`, `$` and white space are one answer: the list of their
  contents. So `\\boxed{7} or \\boxed{8}` is "7, 8": right for the gold "7, 8", wrong for 7 and for 8.
* A last box that is never closed, or an empty one, is no answer: the completion was cut off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from kimi_rl.errors import InputError

Marker = Literal["boxed", "hash", "answer"]
MARKERS: tuple[Marker, ...] = ("boxed", "hash", "answer")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_JOINER = re.compile(r"(?:\s|[$,;.]|\\[()\[\],;!]|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})*")
_ANSWER = re.compile(r"\banswer[*_]{0,2}\s{0,3}(?:is\s{0,3})?:", re.IGNORECASE)
_LONGEST_JOINER = 40
_MARKDOWN = "*_` \t\r"


def final_answer(completion: str, extract: Sequence[str] = ("boxed", "hash")) -> str | None:
    """The final answer of `completion`, stripped, or None.

    `extract` names the allowed markers: `boxed` (`\\boxed{...}`, nested braces), `hash` (`#### ...` to the
    end of the line), `answer` (`Answer: ...` to the end of the line, any case). An empty `extract` takes the
    whole completion as the answer. Raises InputError on an unknown marker.
    """
    for name in extract:
        if name not in MARKERS:
            raise InputError(f"extract: unknown marker {name!r}; the known ones are {', '.join(MARKERS)}")
    if not extract:
        return completion.strip() or None
    thought_end = completion.rfind("</think>")
    if thought_end >= 0:
        completion = completion[thought_end + len("</think>") :]
    elif "<think>" in completion:
        return None
    finders = {"boxed": _last_boxed, "hash": _last_hash, "answer": _last_answer_line}
    found = [hit for name in extract if (hit := finders[name](completion)) is not None]
    # One marker inside another ("Answer: \boxed{7}", "#### \boxed{7}") is the same final answer: the inner
    # one counts.
    return max(found, key=lambda hit: hit[0])[1] if found else None


def _last_boxed(text: str) -> tuple[int, str | None] | None:
    starts = [match.start() for match in _BOX.finditer(text)]
    if not starts:
        return None
    parts: list[str] = []
    after = None  # Where the box to the right of the present one starts.
    for start in reversed(starts):
        box = _box_at(text, start)
        if after is None:
            if box is None or not box[0]:
                return start, None
        elif (
            box is None
            or box[1] > after
            or after - box[1] > _LONGEST_JOINER
            or not _JOINER.fullmatch(text, box[1], after)
        ):
            break
        parts.append(box[0])
        after = start
    unique = list(dict.fromkeys(reversed(parts)))
    return starts[-1], ", ".join(part for part in unique if part) or None


def _box_at(text: str, start: int) -> tuple[str, int] | None:
    """Content and end of the box whose command starts at `start`; None if it is never closed."""
    match = _BOX.match(text, start)
    assert match is not None
    position = match.end()
    while position < len(text) and text[position] == " ":
        position += 1
    if position >= len(text):
        return None
    if text[position] != "{":  # "\boxed 7", as some MATH solutions write it.
        end = position
        while end < len(text) and text[end] not in " $\n":
            end += 1
        return text[position:end].strip(), end
    depth, index = 0, position
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[position + 1 : index].strip(), index + 1
        index += 1
    return None


def _last_hash(text: str) -> tuple[int, str | None] | None:
    at = text.rfind("####")
    return None if at < 0 else (at, _line_from(text, at + 4))


def _last_answer_line(text: str) -> tuple[int, str | None] | None:
    last = None
    for last in _ANSWER.finditer(text):  # noqa: B007 - the last match is what is wanted
        pass
    return None if last is None else (last.start(), _line_from(text, last.end()))


def _line_from(text: str, start: int) -> str | None:
    end = text.find("\n", start)
    line = text[start : len(text) if end < 0 else end].strip(_MARKDOWN)
    if line.endswith(".") and not line.endswith(".."):
        line = line[:-1]
    return line.strip(_MARKDOWN) or None
