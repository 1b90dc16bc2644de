"""Curves of the runs of a comparison, read from their folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kimi_rl.compare.statistics import common_grid
from kimi_rl.report.answers import read_answers
from kimi_rl.run_dir import RunDir

AXES = ("step", "tokens", "seconds")
EVAL_COLUMNS = ("held_out_accuracy", "avg_at_k", "pass_at_k", "maj_at_k")


@dataclass(frozen=True)
class StageCurves:
    """One stage of one run.

    `train`: column -> float64 [steps], NaN where a step has none; with `step`, and `tokens` and `seconds` from the
    stage's start (evaluations left out). `evals`: the same for its evaluations. `solved`: bool [problems, evaluations],
    greedy answers; None where that does not give the held-out accuracy (rewards other than 0 and 1).
    """

    kind: str
    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    solved: np.ndarray | None
    questions: list[str] = field(default_factory=list)


def read_stages(run: RunDir) -> dict[str, StageCurves]:
    """The stages of a finished run, by name."""
    rows = run.read_metrics()
    return {name: _stage(run, name, [row for row in rows if row["stage"] == name]) for name in run.stage_names()}


def _stage(run: RunDir, name: str, rows: list[dict[str, Any]]) -> StageCurves:
    # The last row of a step counts: a resumed run may have written one twice.
    train = list({row["step"]: row for row in rows if row.get("type") == "train"}.values())
    evals = list({row["step"]: row for row in rows if row.get("type") == "eval"}.values())
    train.sort(key=lambda row: row["step"])
    evals.sort(key=lambda row: row["step"])
    evaluating = {row["step"]: row.get("eval_s", 0.0) for row in evals if row.get("when") == "during"}
    kind = next((row["kind"] for row in rows if row.get("kind")), "?")
    names = [key for key in dict.fromkeys(key for row in train for key in row) if _is_number(train, key)]
    columns = {key: _column(train, key) for key in names}
    spent = np.array([_number(row, "step_s") - evaluating.get(row["step"], 0.0) for row in train])
    tokens = np.array([_tokens(row) for row in train])
    columns["seconds"], columns["tokens"] = np.cumsum(np.maximum(spent, 0.0)), np.cumsum(tokens)
    columns["step_tokens"] = tokens
    at = {key: _column(evals, key) for key in ("step", *EVAL_COLUMNS, "mean_length", "truncated_share")}
    steps = np.concatenate([[0.0], columns.get("step", np.zeros(0))])
    for axis in ("tokens", "seconds"):
        at[axis] = np.interp(at["step"], steps, np.concatenate([[0.0], columns[axis]]))
    solved, questions = _solved(run, name, evals)
    return StageCurves(kind, columns, at, solved, questions)


def _tokens(row: dict[str, Any]) -> float:
    """Tokens that the learner read in a step: prompts and completions."""
    if row.get("learner_tokens_per_s") is not None:
        return _number(row, "learner_tokens_per_s") * _number(row, "learner_s")
    return _number(row, "tokens_per_s") * _number(row, "step_s")


def _number(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if value is not None else 0.0


def _is_number(rows: list[dict[str, Any]], key: str) -> bool:
    return all(isinstance(row.get(key), (int, float, type(None))) for row in rows)


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else float(row[key]) for row in rows], dtype=np.float64)


def _solved(run: RunDir, stage: str, evals: list[dict[str, Any]]) -> tuple[np.ndarray | None, list[str]]:
    columns, questions = [], []
    for row in evals:
        answers = read_answers(run, stage, row.get("when"), row["step"], row.get("held_out_accuracy"))
        if answers is None:
            return None, questions
        questions = questions or answers.questions
        if answers.right is None or answers.questions != questions:
            return None, questions
        columns.append(answers.right)
    if not columns or len({len(column) for column in columns}) != 1:
        return None, questions
    return np.array(columns, dtype=bool).T, questions


def records_of(run: RunDir, stages: dict[str, StageCurves]) -> dict[str, list]:
    """What a run really did, to be compared between arms (see `fairness.check_records`)."""
    found: dict[str, list] = {}
    for name, stage in stages.items():
        if stage.questions:
            found[f"{name}: evaluation prompts"] = list(stage.questions)
        if stage.kind in ("sft", "distill"):
            found[f"{name}: tokens of every step"] = np.round(stage.train["step_tokens"]).astype(int).tolist()
        steps = run.rollout_steps(name)
        if steps:
            found[f"{name}: prompts of every step"] = [
                pq.read_table(run.rollouts_path(name, step), columns=["id"]).column("id").to_pylist() for step in steps
            ]
    return found


def same_problems(stages: list[StageCurves]) -> bool:
    """Whether the same problems were evaluated at the same steps in all of them, each with a known result."""
    first = stages[0]
    return all(
        stage.solved is not None
        and stage.solved.shape == first.solved.shape
        and stage.questions == first.questions
        and np.array_equal(stage.evals["step"], first.evals["step"])
        for stage in stages
    )


def on_one_axis(stages: list[StageCurves], table: str, column: str, axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A column of several runs on one x axis: x [T] and y [runs, T], or None where no run has it.

    `table`: "train" or "evals". Against `step` the runs' common steps; against tokens and seconds, which differ from
    run to run, a grid up to where the shortest run ends.
    """
    pairs = []
    for stage in stages:
        columns = getattr(stage, table)
        if column not in columns:
            return None
        known = ~np.isnan(columns[column]) & ~np.isnan(columns[axis])
        if not known.any():
            return None
        pairs.append((columns[axis][known], columns[column][known]))
    if axis == "step":
        steps = sorted(set.intersection(*(set(x.tolist()) for x, _ in pairs)))
        if not steps:
            return None
        return np.array(steps), np.stack([y[np.isin(x, steps)] for x, y in pairs])
    return common_grid(pairs)
