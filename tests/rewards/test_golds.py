"""Gold answers of the data sets: each verifies against itself, and against the others it does not."""

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from kimi_rl.rewards import VerifierPool

DATA = Path(__file__).parents[2] / "../shared/data"
# File -> smallest share of golds that must verify against themselves.
FILES = {
    "gsm8k/train.jsonl": 1.0,
    "gsm8k/test.jsonl": 1.0,
    "math/train.jsonl": 0.998,
    "math/train12k_extra.jsonl": 0.998,
    "math500/test.jsonl": 1.0,
    "aime2024.jsonl": 1.0,
    "aime2025.jsonl": 1.0,
    "amc23.jsonl": 1.0,
    "svamp/test.jsonl": 1.0,
    "olymmath_en/easy.jsonl": 1.0,
    "olymmath_en/hard.jsonl": 1.0,
    "minerva_math/test.jsonl": 0.98,
    "olympiadbench/test.jsonl": 0.995,
}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the repository")


@pytest.fixture(scope="module")
def pool():
    with VerifierPool() as pool:
        yield pool


def _rows(file: str) -> list[dict]:
    with open(DATA / file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _golds(file: str) -> list[str]:
    golds = [row["answer"] for row in _rows(file)]
    return [gold.rpartition("####")[2].strip() for gold in golds] if file.startswith("gsm8k") else golds


@pytest.mark.parametrize("file", FILES)
def test_golds_verify_against_themselves(pool, file):
    golds = _golds(file)
    # Boxed, as a completion would hold them, so that extraction is tested on all of them too.
    pairs = [(f"The answer is \\boxed{{{gold}}}.", gold) for gold in golds]
    verdicts = pool.verify_many(pairs)
    bad = [
        (gold, v.status, v.reason) for gold, v in zip(golds, verdicts, strict=True) if v.status != "correct"
    ]
    assert len(bad) <= (1 - FILES[file]) * len(golds), bad


def test_gsm8k_solutions_are_golds_and_completions(pool):
    rows = [row["answer"] for row in _rows("gsm8k/test.jsonl")]
    assert {verdict.status for verdict in pool.verify_many([(row, row) for row in rows])} == {"correct"}


def test_math500_solutions_are_right(pool):
    rows = _rows("math500/test.jsonl")
    verdicts = pool.verify_many([(row["solution"], row["answer"]) for row in rows])
    bad = [(row["answer"], v) for row, v in zip(rows, verdicts, strict=True) if v.status != "correct"]
    assert bad == []


def _plain(gold: str) -> Fraction | str:
    """The value of a plain number, so that 20 and 20.0 do not count as different answers; else the text."""
    text = gold.replace("^\\circ", "").replace(",", "").strip("$ .")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return gold


@pytest.mark.parametrize("file", ["math/train.jsonl", "olympiadbench/test.jsonl", "minerva_math/test.jsonl"])
def test_shuffled_golds_do_not_verify(pool, file):
    golds = _golds(file)
    chosen = random.Random(0)
    # Every gold that is no whole number, against another row's: pairs of whole numbers are decided by `int`.
    pairs = [(other, gold) for gold in golds if not gold.isdigit() for other in chosen.sample(golds, 1)]
    pairs = [pair for pair in pairs if _plain(pair[0]) != _plain(pair[1])][:1500]
    verdicts = pool.verify_many(pairs, extract=())
    equal = [(pair, v.reason) for pair, v in zip(pairs, verdicts, strict=True) if v.status == "correct"]
    # 0.2 % by the bar; the few left are the same number in two spellings ("50\\%" and "\\frac{1}{2}").
    assert len(equal) < max(1, 0.002 * len(pairs)), equal
