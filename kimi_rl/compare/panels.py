"""What the report of a comparison plots, as plain numbers: page, PNG and CSV are all made from these panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimi_rl.compare.curves import StageCurves, on_one_axis, same_problems
from kimi_rl.compare.statistics import Band, curve_band
from kimi_rl.report.charts import BLUE, GREEN, ORANGE, PURPLE, RED, TEAL, YELLOW, running_mean

COLOURS = (ORANGE, BLUE, GREEN, PURPLE, TEAL, RED, YELLOW)
_SMOOTH_FROM = 40  # steps from which noisy curves are drawn as running means


@dataclass(frozen=True)
class Line:
    """One arm in a panel: its mean over x [T] and bands around it (half-widths, or None), and each seed's own curve
    over the same x."""

    arm: str
    colour: str
    x: np.ndarray
    band: Band
    seeds: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A chart. `section` groups panels; `percent`: y is a share; `log`: logarithmic y; `zero`: mark y = 0."""

    section: str
    title: str
    note: str
    x_label: str
    lines: list[Line]
    y_label: str = ""
    percent: bool = False
    log: bool = False
    log_x: bool = False
    zero: bool = False


@dataclass(frozen=True)
class _Column:
    """A metric to plot: of the train rows or of the evaluations, against which axes."""

    table: str
    column: str
    title: str
    axes: tuple[str, ...] = ("step",)
    y_label: str = ""
    percent: bool = False
    log: bool = False
    smooth: bool = True


_ALL = ("step", "tokens", "seconds")
_COLUMNS = (
    _Column("evals", "held_out_accuracy", "Held-out accuracy, greedy", _ALL, percent=True),
    _Column("evals", "avg_at_k", "Held-out accuracy, avg@k", _ALL, percent=True),
    _Column("train", "accuracy", "Train accuracy", _ALL, percent=True),
    _Column("train", "loss", "Loss", y_label="nats per token"),
    _Column("train", "mean_token_accuracy", "Token accuracy", percent=True),
    _Column("train", "entropy", "Entropy", y_label="nats per token"),
    _Column("train", "completion_length", "Completion length", y_label="tokens"),
    _Column("evals", "mean_length", "Completion length, held-out", y_label="tokens"),
    _Column("train", "mismatch_kl", "Mismatch of trainer and engine: KL (k3)", y_label="nats", log=True),
    _Column("train", "staleness_mean", "Staleness of the samples", y_label="updates behind", smooth=False),
    _Column("train", "truncated_share", "Completions cut off", percent=True),
)
_ONLY = {
    "sft": {"loss", "mean_token_accuracy", "held_out_accuracy", "avg_at_k", "entropy", "mean_length"},
    "distill": {"loss", "held_out_accuracy", "avg_at_k", "mean_length"},
}
_X_LABELS = {"step": "step", "tokens": "tokens read by the learner", "seconds": "seconds of training"}
BANDS_NOTE = "mean over seeds; dark band: 95 % at one step, light band: 95 % at all steps together; thin: single seeds"


def curve_panels(
    curves: dict[tuple[str, int], dict[str, StageCurves]], arms: Sequence[str], reference: str
) -> list[Panel]:
    """The panels of all stages: every metric that all runs of an arm have, and the paired differences."""
    if not curves:
        return []
    panels = []
    for stage in next(iter(curves.values())):
        own = {key: stages[stage] for key, stages in curves.items() if stage in stages}
        kind = next(iter(own.values())).kind
        for column in _COLUMNS:
            # A policy's loss says nothing; a supervised stage has no rollouts.
            if column.column not in _ONLY[kind] if kind in _ONLY else column.column == "loss":
                continue
            panels += _panels_of(own, column, arms, stage)
        panels += _difference_panels(own, arms, reference, stage)
    return panels


def _panels_of(
    own: dict[tuple[str, int], StageCurves], column: _Column, arms: Sequence[str], stage: str
) -> list[Panel]:
    panels = []
    for axis in column.axes:
        lines = []
        for number, arm in enumerate(arms):
            seeds = [seed for name, seed in own if name == arm]
            runs = [own[arm, seed] for seed in seeds]
            line = _line(arm, COLOURS[number % len(COLOURS)], seeds, runs, column, axis) if runs else None
            lines += [line] if line is not None else []
        if lines:
            panels.append(
                Panel(stage, column.title, f"against {_X_LABELS[axis]}", _X_LABELS[axis], lines, column.y_label,
                      column.percent, column.log)
            )  # fmt: skip
    return panels


def _line(
    arm: str, colour: str, seeds: list[int], runs: list[StageCurves], column: _Column, axis: str
) -> Line | None:
    found = on_one_axis(runs, column.table, column.column, axis)
    if found is None:
        return None
    x, y = found
    if column.table == "train" and column.smooth and len(x) >= _SMOOTH_FROM:
        window = max(5, len(x) // 20)
        y = np.array([running_mean(row.tolist(), window) for row in y], dtype=np.float64)
    values = y
    if column.column == "held_out_accuracy" and axis == "step" and same_problems(runs) and len(x) == len(
        runs[0].evals["step"]
    ):
        values = np.stack([run.solved for run in runs])
    return Line(arm, colour, x, curve_band(values), dict(zip(seeds, y, strict=True)))


def _difference_panels(
    own: dict[tuple[str, int], StageCurves], arms: Sequence[str], reference: str, stage: str
) -> list[Panel]:
    """Held-out accuracy of every arm minus the reference's, paired by seed."""
    lines = []
    for number, arm in enumerate(arms):
        seeds = [seed for name, seed in own if name == arm and (reference, seed) in own]
        if arm == reference or not seeds:
            continue
        ours, theirs = [own[arm, seed] for seed in seeds], [own[reference, seed] for seed in seeds]
        found = on_one_axis([*ours, *theirs], "evals", "held_out_accuracy", "step")
        if found is None:
            continue
        x, y = found
        single = y[: len(seeds)] - y[len(seeds) :]
        values = single
        if same_problems([*ours, *theirs]) and len(x) == len(ours[0].evals["step"]):
            values = np.stack([a.solved.astype(float) - b.solved for a, b in zip(ours, theirs, strict=True)])
        lines.append(
            Line(f"{arm} - {reference}", COLOURS[number % len(COLOURS)], x, curve_band(values),
                 dict(zip(seeds, single, strict=True)))
        )  # fmt: skip
    if not lines:
        return []
    return [
        Panel(stage, "Paired difference of held-out accuracy", "greedy, of runs with the same seed", "step", lines,
              percent=True, zero=True)
    ]  # fmt: skip


def memory_panels(costs: dict[str, Any]) -> list[Panel]:
    """Memory of one sequence by context length, from the configurations."""
    lines = []
    for number, (arm, cost) in enumerate(costs.items()):
        x = np.array(sorted(cost.bytes_at), dtype=np.float64)
        y = np.array([sum(cost.bytes_at[int(n)].values()) for n in x], dtype=np.float64) / 2**20
        lines.append(Line(arm, COLOURS[number % len(COLOURS)], x, Band(y, None, None)))
    note = "KV, state and convolution tails, bfloat16 cache, fp32 state; computed"
    return [Panel("efficiency", "Memory of one sequence", note, "context length", lines, "MiB", log=True, log_x=True)]


def decode_panels(decode: dict[str, Any]) -> list[Panel]:
    """Prefill time and time per output token by context length, as `kimi-rl bench decode` measured them."""
    panels = []
    for key, title in (("prefill_s", "Prefill"), ("token_s", "Time per output token")):
        lines = []
        for number, model in enumerate(decode["models"]):
            rows = [row for row in model["rows"] if "error" not in row]
            if not rows:
                continue
            x = np.array([row["context"] for row in rows], dtype=np.float64)
            colour = COLOURS[number % len(COLOURS)]
            lines.append(Line(model["name"], colour, x, Band(np.array([1e3 * row[key] for row in rows]), None, None)))
            if key == "token_s":
                floor = np.array([1e3 * row["floor_s"] for row in rows])
                lines.append(Line(f"{model['name']}: memory floor", colour, x, Band(floor, None, None)))
        note = f"{decode['device']}, {decode['engine']}, batch {decode['batch']}, best of {decode['repeats']}"
        if lines:
            panels.append(Panel("efficiency", title, note, "context length", lines, "ms", log=True, log_x=True))
    return panels


