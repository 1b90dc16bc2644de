"""Verify the gold answers of data sets against themselves and against each other; print one JSON object a file.

    python benchmarks/gold_answers.py ../shared/data

Every gold must be right in a box of its own (`self`). Shuffled, each row's gold is judged against the gold of
another row that is another number, or where one of them is no plain number, another text (`shuffled`): these
verify only where two spellings mean the same. `examples` shows such pairs, so that a person can tell.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

from kimi_rl.dataset.columns import EmptyGold, find_columns, parse_row
from kimi_rl.dataset.files import read_rows
from kimi_rl.rewards import VerifierPool


def read_golds(file: Path) -> list[str]:
    """The gold answers of a data file in any of the known formats; rows without one are skipped."""
    golds = []
    for row in filter(None, read_rows(file)):
        try:
            golds.append(parse_row(row, find_columns(row)).answer)
        except EmptyGold:
            continue
    return golds


def plain_value(gold: str) -> Fraction | str:
    """The value of a plain number (20 and 20.0 are one answer), else the text without spaces."""
    text = gold.replace("^\\circ", "").replace(",", "").strip("$ .")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return "".join(gold.split())


def shuffled_pairs(golds: list[str], seed: int) -> list[tuple[str, str]]:
    """One (answer, gold) pair a row, the answer drawn from the rows whose gold is a different one."""
    chosen = random.Random(seed)
    values = [plain_value(gold) for gold in golds]
    pairs = []
    for gold, value in zip(golds, values, strict=True):
        if not any(other != value for other in values):
            continue
        at = chosen.randrange(len(golds))
        while values[at] == value:
            at = chosen.randrange(len(golds))
        pairs.append((golds[at], gold))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="every .jsonl and .parquet file below it is read")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = sorted(file for file in args.folder.rglob("*") if file.suffix in (".jsonl", ".parquet"))
    total = Counter()
    with VerifierPool(workers=args.workers) as pool:
        for file in files:
            start = time.monotonic()
            golds = read_golds(file)
            own = pool.verify_many([(f"The answer is \\boxed{{{gold}}}.", gold) for gold in golds])
            pairs = shuffled_pairs(golds, args.seed)
            crossed = pool.verify_many(pairs, extract=())
            right = sum(verdict.status == "correct" for verdict in own)
            equal = [pair for pair, verdict in zip(pairs, crossed, strict=True) if verdict.status == "correct"]
            total.update(golds=len(golds), right=right, pairs=len(pairs), equal=len(equal))
            row = {
                "file": str(file.relative_to(args.folder)),
                "golds": len(golds),
                "self": round(right / len(golds), 5),
                "failed": [(g, v.status) for g, v in zip(golds, own, strict=True) if v.status != "correct"],
                "pairs": len(pairs),
                "shuffled": round(len(equal) / max(1, len(pairs)), 5),
                "shuffled_statuses": dict(Counter(verdict.status for verdict in crossed)),
                "examples": equal[:20],
                "seconds": round(time.monotonic() - start, 1),
            }
            print(json.dumps(row), flush=True)
    print(json.dumps({"all": dict(total), "self": total["right"] / total["golds"],
                      "shuffled": total["equal"] / total["pairs"]}))  # fmt: skip


if __name__ == "__main__":
    main()
