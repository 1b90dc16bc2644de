"""Final-answer extraction, marker by marker."""

import time

import pytest

from kimi_rl.errors import InputError
from kimi_rl.rewards import final_answer

BOXED = [
    ("so \\boxed{42}.", "42"),
    ("\\boxed{\\frac{1}{2^{3}}}", "\\frac{1}{2^{3}}"),
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{1}, \\boxed{2}", "1, 2"),
    ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
    ("\\(\\boxed{1}\\) or \\(\\boxed{2}\\)", "1, 2"),
    ("\\boxed{1}\n\n\\boxed{1}", "1"),
    ("\\boxed 7", "7"),
    ("\\boxed {7}", "7"),
    ("\\fbox{7}", "7"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{ }", None),
    ("\\boxed{", None),
    ("\\boxed", None),
    ("\\boxedtext{7}", None),
    ("7", None),
]
HASH = [
    ("a\n#### 18", "18"),
    ("#### 18\nmore", "18"),
    ("####18", "18"),
    ("#### 1\n#### 2", "2"),
    ("#### **18**.", "18"),
    ("####", None),
    ("### 18", None),
    ("#### \n18", None),
]
ANSWER = [
    ("Answer: 18", "18"),
    ("**Final answer:** 18", "18"),
    ("the answer is: $18$.", "$18$"),
    ("ANSWER : x=1\nok", "x=1"),
    ("Answer: 1\nAnswer: 2", "2"),
    ("The answer is 18", None),
    ("Answer:", None),
]


@pytest.mark.parametrize(("text", "expected"), BOXED)
def test_boxed(text, expected):
    assert final_answer(text, ["boxed"]) == expected


@pytest.mark.parametrize(("text", "expected"), HASH)
def test_hash(text, expected):
    assert final_answer(text, ["hash"]) == expected


@pytest.mark.parametrize(("text", "expected"), ANSWER)
def test_answer_line(text, expected):
    assert final_answer(text, ["answer"]) == expected


def test_the_last_allowed_marker_counts():
    text = "Answer: 1\n\\boxed{2}\n#### 3"
    assert final_answer(text, ["answer", "boxed", "hash"]) == "3"
    assert final_answer(text, ["hash", "boxed", "answer"]) == "3"
    assert final_answer(text, ["boxed", "answer"]) == "2"
    assert final_answer(text, ["answer"]) == "1"
    assert final_answer("Answer: \\boxed{7}", ["answer", "boxed"]) == "7"
    assert final_answer("#### \\boxed{7}", ["hash", "boxed"]) == "7"


def test_no_marker_takes_the_whole_text():
    assert final_answer("  x=1 \n", ()) == "x=1"
    assert final_answer("  \n", ()) is None


def test_only_what_follows_the_thought_counts():
    assert final_answer("<think>\\boxed{1}</think>\\boxed{2}") == "2"
    assert final_answer("\\boxed{1}</think>") is None
    assert final_answer("<think>\\boxed{1}") is None


def test_unknown_marker():
    with pytest.raises(InputError, match="boxed, hash, answer"):
        final_answer("1", ["latex"])


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "\\boxed{1}", "#### ", "Answer: ", "{", "}", "\\", "answer is ", " and ", "<think>"]
)
def test_linear_time_on_a_megabyte(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    final_answer(text, ("boxed", "hash", "answer"))
    assert time.process_time() - start < 2.0
