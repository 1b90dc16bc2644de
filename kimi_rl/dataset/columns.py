"""From a row in any of the usual formats to (id, question, solution, answer).

- GSM8K: `question`, `answer` = worked solution that ends in `#### 72`;
- MATH: `problem`, `solution` with the answer in its last `\\boxed{}`, `answer` optional;
- plain: a question column and an `answer`;
- DAPO: `prompt[0].content` and `reward_model.ground_truth`;
- SVAMP: `Body`, `Question` and `Answer`; OlympiadBench: `question`, `final_answer` and `solution` as lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUESTION_COLUMNS = ("question", "problem", "prompt.0.content", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model.ground_truth", "ground_truth", "Answer")
SOLUTION_COLUMNS = ("solution.0", "solution")
ID_COLUMNS = ("id", "unique_id", "ID")

# Placeholders that stand where a data set has no final answer (NuminaMath-1.5).
NO_ANSWER = frozenset({"proof", "notfound"})

# DAPO's prompts ask for an `Answer:` line. The plain problem is kept, so that the instruction can be the
# recipe's.
_PROMPT_WRAPPERS = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
    'Remember to put your answer on its own line after "Answer:".',
)

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class RowError(ValueError):
    """A row that cannot be used; the message says what is missing. The caller adds file and row number."""


class EmptyGold(RowError):
    """A row in the right format whose gold answer is empty in the data set itself: left out, with a count."""


@dataclass(frozen=True)
class Columns:
    """Where a row's parts lie: dotted column names (`prompt.0.content`). Empty: not present."""

    question: tuple[str, ...]
    answer: str = ""
    solution: str = ""
    id: str = ""


@dataclass(frozen=True)
class Row:
    """One problem. `solution` ends in the final answer in `form` (`hash` or `boxed`); `id` may be empty."""

    id: str
    question: str
    solution: str
    answer: str
    form: str


def find_columns(row: Mapping[str, Any]) -> Columns:
    """The columns of a row, found by name. Raises RowError naming what is missing."""
    question = _first(row, QUESTION_COLUMNS)
    if not question and "Body" in row and "Question" in row:
        return Columns(("Body", "Question"), _first(row, ANSWER_COLUMNS), "", _first(row, ID_COLUMNS))
    answer, solution = _first(row, ANSWER_COLUMNS), _first(row, SOLUTION_COLUMNS)
    present = f"found {', '.join(map(str, row)) or 'an empty row'}"
    if not question:
        raise RowError(f"no question ({present}); needs a column `question` or `problem`")
    if not answer and not solution:
        raise RowError(
            f"no answer ({present}); needs a column `answer`, or `solution` with a \\boxed{{}} answer"
        )
    return Columns((question,), answer, solution, _first(row, ID_COLUMNS))


def parse_row(row: Mapping[str, Any], columns: Columns, form: str | None = None) -> Row:
    """The problem in a row. `form`: how the solution states its answer; None: `hash` where it
    is a GSM8K one or ends in `#### answer`, else `boxed`.

    Raises RowError for a row without question or answer, EmptyGold for one whose answer is empty at its
    source.
    """
    question = " ".join(_text(look_up(row, name)).strip() for name in columns.question).strip()
    for wrapper in _PROMPT_WRAPPERS:
        question = question.removeprefix(wrapper).removesuffix(wrapper).strip()
    if not question:
        raise RowError(f"the question is empty (column `{columns.question[0]}`)")
    own_id = _text(look_up(row, columns.id)) if columns.id else ""
    solution = _text(look_up(row, columns.solution)).strip() if columns.solution else ""
    stated = _text(look_up(row, columns.answer)).strip() if columns.answer else ""
    if columns.answer and not stated and not solution:
        raise RowError(f"no answer (column `{columns.answer}` is empty or missing)")

    if "####" in stated:  # GSM8K: the answer column is the worked solution
        work, _, final = stated.rpartition("####")
        answer = _plain_number(final)
        solution = f"{_CALCULATOR.sub('', work)}#### {answer}"
        form = form or "hash"
    elif stated:
        answer = _without_dollars(stated)
    else:
        found = last_boxed(solution)
        if found is None:
            raise RowError(f"no answer: `{columns.solution}` holds no \\boxed{{}}")
        answer = found.strip()
    if not answer or answer.lower() in NO_ANSWER:
        raise EmptyGold(f"the gold answer is {answer!r}" if answer else "the gold answer is empty")
    if form is None and "####" in solution and _plain_number(solution.rpartition("####")[2]) == answer:
        form = "hash"
    form = form or "boxed"
    return Row(own_id, question, _ending_in(solution, answer, form), answer, form)


def look_up(row: Any, dotted: str) -> Any:
    """Value at a dotted name (`prompt.0.content`) or at a plain one; None where any part is missing."""
    if isinstance(row, Mapping) and dotted in row:
        return row[dotted]
    value = row
    for part in dotted.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, `\\fbox{...}` or `\\boxed x`; braces may nest. Or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        start = match.end()
        if not text.startswith("{", start):
            word = re.match(r"[^\s$.,{}]+", text[start:])
            if word:
                return word.group()
            continue
        depth = 0
        for position in range(start, len(text)):
            if text[position] in "{}" and not _escaped(text, position):
                depth += 1 if text[position] == "{" else -1
                if depth == 0:
                    return text[start + 1 : position]
    return None


def _escaped(text: str, position: int) -> bool:
    """Whether a backslash (itself not escaped) stands before `position`."""
    before = text[:position]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _ending_in(solution: str, answer: str, form: str) -> str:
    """The solution, with the final answer added where it does not end in one that the rewards read."""
    if form == "hash":
        stated = solution.rpartition("####")[2] if "####" in solution else ""
        missing, ending = _plain_number(stated) != answer, f"#### {answer}"
    else:
        complete = re.search(r"\\boxed\{", solution)
        missing = complete is None or (last_boxed(solution) or "").strip() != answer
        ending = f"\\boxed{{{answer}}}"
    return "\n".join(part for part in (solution, ending) if part) if missing else solution


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first name that the row has a usable value for; else the first it has at all."""
    present = [name for name in names if look_up(row, name) is not None]
    return next(
        (name for name in present if _text(look_up(row, name)).strip()), present[0] if present else ""
    )


def _text(value: Any) -> str:
    """A cell as text: whole floats without `.0`, lists (several answers) joined by commas, None as empty."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(_without_dollars(_text(item)) for item in value)
    return str(value)


def _plain_number(text: str) -> str:
    """` 1,234` as `1234`: GSM8K writes thousands with commas. Anything but a number is left as it is."""
    number = text.strip().removeprefix("$")
    return number.replace(",", "") if re.fullmatch(r"-?\d[\d,]*(\.\d+)?", number) else text.strip()


def _without_dollars(text: str) -> str:
    """`$x+1$` as `x+1`, where one pair of dollars encloses the whole."""
    inner = text.strip()
    if len(inner) > 2 and inner[0] == inner[-1] == "$" and inner.count("$") == 2:
        return inner[1:-1].strip()
    return inner
