"""Kinds that compare what is written: exact, integer, choice."""

import pytest

from kimi_rl.rewards.exact import choice_equal, exact_equal, integer_equal
from kimi_rl.rewards.kinds import decide_here

CORRECT, WRONG, BAD_GOLD = "correct", "wrong", "unparseable_gold"


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        ("c b a", "c b a", CORRECT),
        (" c  b\na ", "c b a", CORRECT),
        ("c b", "c b a", WRONG),
        ("C b a", "c b a", WRONG),
        ("cba", "c b a", WRONG),
        ("4.0", "4", WRONG),
        ("a", " ", BAD_GOLD),
    ],
)
def test_exact(answer, gold, status):
    assert exact_equal(answer, gold)[0] == status


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        ("42", "42", CORRECT),
        ("+042", "42", CORRECT),
        ("1,234", "1234", CORRECT),
        ("$42$", "42", CORRECT),
        ("-42", "42", WRONG),
        ("42.0", "42", WRONG),
        ("x=42", "42", WRONG),
        ("12,34", "1234", WRONG),
        ("٤٢", "42", WRONG),
        ("4_2", "42", WRONG),
        ("0,042", "42", WRONG),
        ("9" * 5000, "42", WRONG),
        ("42", "forty", BAD_GOLD),
        ("42", "", BAD_GOLD),
    ],
)
def test_integer(answer, gold, status):
    assert integer_equal(answer, gold)[0] == status


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        ("B", "B", CORRECT),
        ("(B)", "B", CORRECT),
        ("b.", "B", CORRECT),
        ("\\text{(B)}", "B", CORRECT),
        ("B", "(B)", CORRECT),
        ("C", "B", WRONG),
        ("B or C", "B", WRONG),
        ("AB", "B", WRONG),
        ("", "B", WRONG),
        ("B: 7", "B", WRONG),
        ("B", "7", BAD_GOLD),
    ],
)
def test_choice(answer, gold, status):
    assert choice_equal(answer, gold)[0] == status


def test_what_math_decides_without_a_child():
    assert decide_here("007", "7", "math")[0] == CORRECT
    assert decide_here("8", "7", "math")[0] == WRONG
    assert decide_here("x" * 3000, "7", "math")[0] == WRONG
    # 1,234 may be a number or a list: only the full comparison may call it wrong.
    assert decide_here("1,234", "1234", "math")[0] == CORRECT
    for answer, gold in [("1,234", "7"), ("1/2", "1/2"), ("7", "x"), ("x", "7")]:
        assert decide_here(answer, gold, "math") is None
