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
