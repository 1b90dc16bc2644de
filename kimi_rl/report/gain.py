"""What a stage changed in accuracy, problem by problem: sharper than what its two evaluations tell apart."""

from __future__ import annotations

from typing import Any

from kimi_rl.report.answers import Answers, read_answers
from kimi_rl.run_dir import RunDir
from kimi_rl.statistics import PairedGain, paired_gain


def stage_gains(run: RunDir, before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, PairedGain]:
    """`greedy` and, where both have samples, `avg`: the gain from one evaluation of a run to another.

    Without what cannot be told: where there are not two, where the answers of one are not on disk or do not give its
    accuracy, or where they are of different problems.
    """
    first, last = _answers(run, before), _answers(run, after)
    if first is None or last is None or (first.questions, first.measured) != (last.questions, last.measured):
        return {}
    found = {}
    if first.right is not None and last.right is not None:
        found["greedy"] = paired_gain(first.right, last.right)
    if before["k"] and before["k"] == after["k"] and first.shares is not None and last.shares is not None:
        found["avg"] = paired_gain(first.shares, last.shares)
    return found


def _answers(run: RunDir, evaluation: dict[str, Any] | None) -> Answers | None:
    if evaluation is None:
        return None
    try:
        return read_answers(run, *(evaluation[key] for key in ("stage", "when", "step", "accuracy")))
    except Exception:  # whatever pyarrow makes of a damaged file; it is named where its samples are shown
        return None
