"""What a verifier answers: a value, a status, what it read, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["correct", "wrong", "no_answer", "unparseable_gold", "timeout", "crashed"]
STATUSES: tuple[Status, ...] = ("correct", "wrong", "no_answer", "unparseable_gold", "timeout", "crashed")


@dataclass(frozen=True)
class Verdict:
    """One verdict.

    `value` is the reward: 1.0 for `correct`, 0.0 for `wrong`, `no_answer`, `timeout` and `crashed` (an
    answer that hangs or kills the verifier earns nothing), and None for `unparseable_gold`: nothing was
    measured, so the sample has to leave the batch instead of counting as wrong. A user's own function may
    give any other float. `parsed` is the final answer found in the completion, None if there was none.
    `reason` is one line for a person.
    """

    value: float | None
    status: Status
    parsed: str | None
    reason: str

    @classmethod
    def of(cls, status: Status, parsed: str | None, reason: str) -> Verdict:
        """A verdict whose value follows from its status."""
        value = None if status == "unparseable_gold" else float(status == "correct")
        return cls(value, status, parsed, reason)
