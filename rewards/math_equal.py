"""Mathematical equality of two final answers, on math-verify. Runs in a worker process only: it may take forever."""

from __future__ import annotations

from math_verify import parse
from math_verify import verify as math_verify

from kimi_rl.rewards.exact import Outcome


def math_equal(answer: str, gold: str) -> Outcome:
    """Compare `answer` with `gold`."""
    wanted = parse(f"${gold}$", parsing_timeout=None)
    if not wanted:
        return "unparseable_gold", "the gold answer cannot be read"
    same = math_verify(wanted, parse(f"${answer}$", parsing_timeout=None), timeout_seconds=None)
    return ("correct", "equal") if same else ("wrong", "not equal")
