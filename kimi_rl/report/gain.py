"""What a stage changed in accuracy, problem by problem: sharper than what its two evaluations tell apart."""

from __future__ import annotations

from typing import Any

from kimi_rl.run_dir import RunDir
from kimi_rl.statistics import PairedGain, paired_gain


def stage_gains(run: RunDir, before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, PairedGain]:
    """`greedy` and, where both have samples, `avg`: the gain from one evaluation of a run to another.

    Empty where there are not two, where the answers of one are not on disk, or where they are of different problems.
    """
    if before is None or after is None:
        return {}
    tables = [_answers(run, evaluation) for evaluation in (before, after)]
    if None in tables or tables[0]["question"] != tables[1]["question"]:
        return {}
    kept = [status != "unparseable_gold" for status in tables[0]["status"]]
    if kept != [status != "unparseable_gold" for status in tables[1]["status"]] or not any(kept):
        return {}
    found = {"greedy": paired_gain(*([s == "correct" for s in _only(t["status"], kept)] for t in tables))}
    if before["k"] and before["k"] == after["k"]:
        shares = [_only(table.get("solved_share") or [None], kept) for table in tables]
        if all(share is not None for part in shares for share in part):
            found["avg"] = paired_gain(*shares)
    return found


def _only(values: list, kept: list[bool]) -> list:
    return [value for value, keep in zip(values, kept, strict=False) if keep]


def _answers(run: RunDir, evaluation: dict[str, Any]) -> dict[str, list] | None:
    import pyarrow as pa  # not with the module: the terminal's commands start without it
    import pyarrow.parquet as pq

    path = run.rollouts_path(f"{evaluation['stage']}_eval_{evaluation['when']}", evaluation["step"])
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):  # a damaged file is named where its samples are shown
        return None
    wanted = {"question", "status"}
    if not wanted <= set(table.column_names):
        return None
    return table.select([*wanted, *({"solved_share"} & set(table.column_names))]).to_pydict()
