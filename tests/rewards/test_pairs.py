"""The documented rules of mathematical equality, on hand-made pairs, through the pool as a run uses it."""

import pytest
from pairs import DIFFERENT, SAME

from kimi_rl.rewards import VerifierPool


@pytest.fixture(scope="module")
def pool():
    with VerifierPool() as pool:
        yield pool


def _wrong_verdicts(pool, pairs, expected):
    verdicts = pool.verify_many([(answer, gold) for gold, answer in pairs], kind="math", extract=())
    return [
        (pair, v.status, v.reason) for pair, v in zip(pairs, verdicts, strict=True) if v.status != expected
    ]


@pytest.mark.parametrize("rule", SAME)
def test_same(pool, rule):
    assert _wrong_verdicts(pool, SAME[rule], "correct") == []


@pytest.mark.parametrize("rule", DIFFERENT)
def test_near_misses_are_wrong(pool, rule):
    assert _wrong_verdicts(pool, DIFFERENT[rule], "wrong") == []


def test_every_gold_of_the_pairs_is_itself(pool):
    golds = [gold for rules in (SAME, DIFFERENT) for pairs in rules.values() for gold, _ in pairs]
    assert _wrong_verdicts(pool, [(gold, gold) for gold in golds], "correct") == []


def test_there_are_enough_pairs():
    same, different = (sum(map(len, rules.values())) for rules in (SAME, DIFFERENT))
    assert same >= 100 and different >= 100


@pytest.mark.parametrize(
    "gold", ["", "   ", "\\frac{1}{", "???", "}{", "(1, 2", "\\foo", "1 2", "4\u06f2", "4\x002"]
)
def test_a_gold_that_cannot_be_read_has_no_value(pool, gold):
    verdict = pool.verify("\\boxed{1}", gold)
    assert (verdict.value, verdict.status) == (None, "unparseable_gold")
    assert verdict.reason


UNDEFINED = [
    "\\frac{1}{0}",
    "0/0",
    "0^{-1}",
    "\\frac{x}{0}",
    "\\frac{5}{3-3}",
    "(1, \\frac{1}{0})",
    "x = \\frac{5}{0}",
    "\\ln(0)",
    "\\frac{1}{\\sin(\\pi)}",
    "\\begin{pmatrix}1 & 1/0\\\\2 & 3\\end{pmatrix}",
]


@pytest.mark.parametrize("gold", UNDEFINED)
def test_a_gold_that_divides_by_zero_is_not_even_itself(pool, gold):
    for answer in (gold, "1"):
        verdict = pool.verify_many([(answer, gold)], extract=())[0]
        assert (verdict.value, verdict.status) == (None, "unparseable_gold")
        assert "no value" in verdict.reason


@pytest.mark.parametrize(
    "gold",
    [
        "05:00",
        "(\\gamma^{2}-1)c",
        "\\infty",
        "(-\\infty, 3]",
        "0^0",
        "\\frac{0}{3}",
        "(10^{-200})^{-1}",
        "\\frac{1}{e^{-300}}",
        "\\frac{1}{x}",
    ],
)
def test_a_gold_with_a_value_near_those_is_itself(pool, gold):
    assert pool.verify_many([(f" {gold} ", gold)], extract=())[0].status == "correct"
