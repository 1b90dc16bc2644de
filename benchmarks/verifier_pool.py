"""Soak the verifier pool: many verdicts, some of which hang or crash, and print what came out as one JSON
object.

    python benchmarks/verifier_pool.py --verdicts 10000 --workers 2

Every completion is distinct, so the cache helps with none. Exit code 1 if any verdict is not the expected
one, or a process is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import time
from collections import Counter
from pathlib import Path

from kimi_rl.rewards import VerifierPool


def act(answer: str, gold: str) -> bool:
    """The comparison under test, run in the verifier child: `math`, except for two answers that misbehave."""
    if answer.startswith("hang"):
        while True:
            pass
    if answer.startswith("crash"):
        os._exit(1)
    from kimi_rl.rewards.math_equal import math_equal

    return math_equal(answer, gold)[0] == "correct"


def make_cases(count: int, hang_share: float, crash_share: float, seed: int) -> list[tuple[str, str, str]]:
    """(completion, gold, expected status) rows: fractions, roots, expressions and tuples, half of them
    right.
    """
    chosen = random.Random(seed)
    hangs, crashes = round(count * hang_share), round(count * crash_share)
    rows = [(f"\\boxed{{hang {i}}}", "1", "timeout") for i in range(hangs)]
    rows += [(f"\\boxed{{crash {i}}}", "1", "crashed") for i in range(crashes)]
    for i in range(count - hangs - crashes):
        n = i + 2
        right = chosen.random() < 0.5
        shown = n if right else n + 1
        answer, gold = [
            (f"\\frac{{{2 * shown}}}{{14}}", f"\\frac{{{n}}}{{7}}"),
            (f"2\\sqrt{{{shown}}}", f"\\sqrt{{{4 * n}}}"),
            (f"x^2 + {shown} x", f"x(x+{n})"),
            (f"\\left({shown}, \\frac{{\\pi}}{{2}}\\right)", f"({n}, 0.5\\pi)"),
        ][i % 4]
        rows.append((f"So the answer is \\boxed{{{answer}}}.", gold, "correct" if right else "wrong"))
    chosen.shuffle(rows)
    return rows


def descendants() -> list[int]:
    """Live or zombie processes below this one (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verdicts", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds a verdict may take")
    parser.add_argument("--memory-mb", type=int, default=2048)
    parser.add_argument("--hang", type=float, default=0.01, help="share of inputs that hang")
    parser.add_argument(
        "--crash", type=float, default=0.005, help="share of inputs that kill the verifier process"
    )
    parser.add_argument("--batch", type=int, default=128, help="verdicts asked for in one call")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    cases = make_cases(args.verdicts, args.hang, args.crash, args.seed)
    verdicts = []
    with VerifierPool(workers=args.workers, deadline_s=args.deadline, memory_mb=args.memory_mb) as pool:
        start = time.monotonic()
        pool.warm_up()
        started = time.monotonic()
        for at in range(0, len(cases), args.batch):
            batch = [(completion, gold) for completion, gold, _ in cases[at : at + args.batch]]
            verdicts += pool.verify_many(batch, kind="benchmarks.verifier_pool:act")
        seconds = time.monotonic() - started
    wrong = [(case, v) for case, v in zip(cases, verdicts, strict=True) if v.status != case[2]]
    left_over = descendants()
    hang_seconds = round(args.verdicts * args.hang) * args.deadline / args.workers
    result = {
        "verdicts": len(verdicts),
        "workers": args.workers,
        "deadline_s": args.deadline,
        "statuses": dict(Counter(verdict.status for verdict in verdicts)),
        "unexpected": len(wrong),
        "start_up_s": round(started - start, 3),
        "seconds": round(seconds, 3),
        "verdicts_per_s": round(len(verdicts) / seconds, 1),
        "seconds_that_hangs_cost_at_least": hang_seconds,
        "processes_left_over": len(left_over),
        "peak_memory_mb_parent": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_memory_mb_child": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    print(json.dumps(result))
    for case, verdict in wrong[:5]:
        print(case, verdict)
    raise SystemExit(1 if wrong or left_over else 0)


if __name__ == "__main__":
    main()
