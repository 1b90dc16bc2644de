"""Charts of one stage, as plain plotly figures (dicts of `data` and `layout`) built from metrics rows.

Plain dicts keep plotly's large Python package out of the driver; the page's own script adds the theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

BLUE, ORANGE, GREEN, RED, PURPLE, GREY, YELLOW, TEAL = (
    "#3b7dd8", "#e07b39", "#2e9e6b", "#d64550", "#8a63d2", "#8b93a1", "#d9a514", "#1f9aa8"
)  # fmt: skip

VERDICTS = {
    "correct": GREEN, "wrong": RED, "no_answer": GREY, "timeout": ORANGE, "crashed": PURPLE,
    "unparseable_gold": YELLOW,
}  # fmt: skip

# From this many points on, noisy curves are drawn faint under their running mean.
_SMOOTH_FROM = 40


@dataclass(frozen=True)
class Chart:
    """A titled plotly figure; `note` says what is drawn."""

    title: str
    note: str
    figure: dict[str, Any]


@dataclass(frozen=True)
class Lines:
    """A chart of one or more columns of the train rows over steps: column -> (legend, colour)."""

    title: str
    note: str
    columns: dict[str, tuple[str, str]]
    axis: str = ""
    smooth: bool = False
    log: bool = False
    percent: bool = False
    from_zero: bool = False


_RLVR = [
    Lines("Reward", "mean over the step's completions", {"reward": ("reward", BLUE)}, smooth=True),
    Lines("Completion length", "mean", {"completion_length": ("length", BLUE)}, "tokens", smooth=True),
    Lines(
        "Shares to watch",
        "cut off at max_tokens; groups of one reward (no gradient); tokens at the importance cap",
        {
            "truncated_share": ("cut off", ORANGE),
            "zero_std_share": ("groups without spread", GREY),
            "is_truncated_share": ("importance-capped", PURPLE),
        },
        percent=True,
    ),
    Lines("Entropy", "of the policy, mean per token", {"entropy": ("entropy", TEAL)}, "nats"),
    Lines("KL to the reference", "against the stage's starting model", {"kl": ("KL", PURPLE)}, "nats"),
    Lines(
        "Mismatch: KL",
        "trainer against rollout engine on the same tokens (k3 estimate); dashed: the recipe's bar",
        {"mismatch_kl": ("KL k3", RED)},
        "nats",
        log=True,
    ),
    Lines(
        "Mismatch: |Δ log p|",
        "of single tokens, trainer against rollout engine",
        {"mismatch_mean_abs": ("mean", BLUE), "mismatch_max_abs": ("max", RED)},
        "nats",
        log=True,
    ),
    Lines(
        "Importance ratio",
        "trainer / engine, per token",
        {
            "mismatch_ratio_p99": ("99th percentile", ORANGE),
            "is_ratio_mean": ("mean", BLUE),
            "mismatch_ratio_p01": ("1st percentile", TEAL),
        },
    ),
    Lines("Loss", "of the policy, the supervised term included", {"loss": ("loss", BLUE)}, smooth=True),
    Lines("Supervised (PTX) loss", "cross-entropy per token", {"ptx_loss": ("loss", GREEN)}, "nats", smooth=True),
    Lines(
        "Age of the tokens",
        "how many policy versions the tokens of a step's batch are older than the learner",
        {"staleness_mean": ("mean", BLUE), "staleness_max": ("oldest", RED)},
        "versions",
        from_zero=True,
    ),
    Lines(
        "Off-policy KL", "learner against the older policies that drew the batch", {"off_policy_kl": ("KL k3", RED)},
        "nats", log=True,
    ),
    Lines(
        "Movement per step", "KL of the policy before a step to the one after it", {"drift_kl": ("KL", PURPLE)}, "nats",
    ),
    Lines("KL coefficient", "tau or beta", {"kl_coefficient": ("coefficient", PURPLE)}, from_zero=True),
    Lines("Updates per step", "optimizer steps per rollout batch", {"updates": ("updates", TEAL)}, from_zero=True),
    Lines(
        "Replaced groups",
        "dynamic sampling: groups of one reward that gave way to others, and groups completed in all",
        {
            "sampling_replaced_right": ("all right", GREEN),
            "sampling_replaced_wrong": ("all wrong", RED),
            "sampling_groups": ("completed", GREY),
        },
        from_zero=True,
    ),
    Lines(
        "Idle workers", "share of the workers' time in which they generated nothing",
        {"worker_idle_share": ("idle", ORANGE)}, percent=True,
    ),
]  # fmt: skip
_SFT = [
    Lines("Loss", "cross-entropy per token", {"loss": ("loss", BLUE)}, "nats", smooth=True),
    Lines(
        "Token accuracy", "share of next tokens that are the model's first choice",
        {"mean_token_accuracy": ("token accuracy", GREEN)}, smooth=True, percent=True,
    ),
    Lines("Entropy", "of the model, mean per token", {"entropy": ("entropy", TEAL)}, "nats"),
]  # fmt: skip
_DISTILL = [
    Lines("Loss", "what is minimised", {"loss": ("loss", BLUE)}, smooth=True, log=True),
    Lines(
        "Error of the layers",
        "of a token mixer's output against the teacher's attention, relative to its power, on training texts",
        {"layer_error_mean": ("mean", BLUE), "layer_error_max": ("worst layer", RED)},
        log=True,
    ),
    Lines(
        "KL to the teacher", "of the training texts, per token", {"kl_to_teacher": ("KL", PURPLE)}, "nats", smooth=True,
    ),
    Lines(
        "Cross-entropy", "of the training texts, per token", {"cross_entropy": ("cross-entropy", GREEN)}, "nats",
        smooth=True,
    ),
]  # fmt: skip
_BOTH = [
    Lines("Gradient norm", "before clipping", {"grad_norm": ("norm", TEAL)}, smooth=True),
    Lines("Learning rate", "of the last update", {"learning_rate": ("learning rate", GREY)}, from_zero=True),
    Lines(
        "Throughput", "of the whole step, and of the rollout alone",
        {"tokens_per_s": ("step", BLUE), "rollout_tokens_per_s": ("rollout", ORANGE)}, "tokens/s",
        from_zero=True,
    ),
]  # fmt: skip
_VERDICT_BARS = {f"verdict_{name}": (name.replace("_", " "), colour) for name, colour in VERDICTS.items()}
_TIME_BARS = {
    "wait_s": ("waiting for rollouts", ORANGE), "sync_s": ("weight sync", PURPLE), "learner_s": ("learner", BLUE)
}  # fmt: skip
_STEP_TIME = Lines("Step time", "wall time", {"step_s": ("step", BLUE)}, "s", from_zero=True)


def stage_charts(kind: str, train: Sequence[Row], evals: Sequence[Row], recipe_stage: Row) -> list[Chart]:
    """The charts of one stage, those for which there are figures.

    `train` and `evals` are its rows in order of step; `recipe_stage` is its entry in the resolved recipe.
    """
    bar = (recipe_stage.get("mismatch") or {}).get("max_kl")
    charts = [_accuracy(train, evals), _perplexity(evals), _by_layer(evals)]
    own = {"sft": _SFT, "distill": _DISTILL}.get(kind, _RLVR)
    for lines in [*own, *_BOTH]:
        charts.append(_lines(lines, train, bar if "mismatch_kl" in lines.columns else None))
    charts.insert(4, _stacked("Verdicts", "of the step's completions", _VERDICT_BARS, train, "completions"))
    split = _stacked("Step time", "where the seconds of a step go", _TIME_BARS, train, "s")
    charts.append(split or _lines(_STEP_TIME, train))
    charts.append(_ages(train))
    return [chart for chart in charts if chart is not None]


def _accuracy(train: Sequence[Row], evals: Sequence[Row]) -> Chart | None:
    """Train accuracy, and held-out accuracy with one standard error either side."""
    traces = _traces("accuracy", "train", GREY, train, smooth=True, percent=True)
    k = next((row["k"] for row in evals if row.get("k")), "k")
    for column, error, name, colour in (
        ("held_out_accuracy", "held_out_se", "held-out, greedy", BLUE),
        ("avg_at_k", "avg_at_k_se", f"held-out, avg@{k}", ORANGE),
    ):
        rows = [row for row in evals if row.get(column) is not None]
        if rows:
            trace = _line([r["step"] for r in rows], [r[column] for r in rows], name, colour, percent=True)
            trace["mode"] = "lines+markers"
            trace["marker"] = {"size": 7}
            errors = [row.get(error) for row in rows]
            trace["error_y"] = {"type": "data", "array": errors, "thickness": 1.4, "width": 4}
            traces.append(trace)
    if not traces:
        return None
    layout = {"yaxis": {"tickformat": ".2~%", "rangemode": "tozero"}}
    return Chart("Accuracy", "bars: one standard error", {"data": traces, "layout": _layout(layout)})


def _perplexity(evals: Sequence[Row]) -> Chart | None:
    """Held-out perplexities of student and teacher."""
    traces = []
    for column, name, colour in (
        ("student_perplexity", "student", BLUE), ("teacher_perplexity", "teacher", GREY)
    ):  # fmt: skip
        rows = [row for row in evals if row.get(column) is not None]
        if rows:
            trace = _line([r["step"] for r in rows], [r[column] for r in rows], name, colour, percent=False)
            traces.append(trace | {"mode": "lines+markers"})
    if not traces:
        return None
    layout = {"yaxis": {"type": "log"}}
    return Chart("Perplexity", "on held-out texts", {"data": traces, "layout": _layout(layout)})


def _by_layer(evals: Sequence[Row]) -> Chart | None:
    """The layers' errors at the first and the last evaluation that has them."""
    rows = [row for row in evals if row.get("layer_errors")]
    traces = [
        {"type": "bar", "x": list(range(len(row["layer_errors"]))), "y": [_short(v) for v in row["layer_errors"]],
         "name": f"step {row['step']}", "marker": {"color": colour}}
        for row, colour in zip(rows[:1] + rows[1:][-1:], (GREY, BLUE), strict=False)
    ]  # fmt: skip
    if not traces:
        return None
    layout = _layout({"barmode": "group", "yaxis": {"type": "log"}}) | {"xaxis": {"title": {"text": "layer"}}}
    note = "of a token mixer's output against the teacher's attention, relative to its power, on held-out texts"
    return Chart("Error by layer", note, {"data": traces, "layout": layout})


def _lines(lines: Lines, rows: Sequence[Row], bar: float | None = None) -> Chart | None:
    """`bar`: where to draw a dashed line across the chart."""
    traces: list[dict[str, Any]] = []
    values: list[float] = []
    for column, (name, colour) in lines.columns.items():
        traces += _traces(column, name, colour, rows, lines.smooth, lines.percent)
        values += [row[column] for row in rows if row.get(column) is not None]
    if not traces:
        return None
    if bar is not None:
        steps = [row["step"] for row in rows]
        trace = _line([0, max(steps)], [bar, bar], "bar", GREY, percent=False)
        trace["line"] |= {"dash": "dash", "width": 1.5}
        traces.append(trace)
        values.append(bar)
    axis: dict[str, Any] = {"title": {"text": lines.axis}} if lines.axis else {}
    if lines.percent:
        axis |= {"tickformat": ".2~%", "rangemode": "tozero"}
    if lines.from_zero:
        # Not plotly's "tozero", which draws a small constant on an axis from -1 to 1.
        axis["range"] = [0, 1.1 * max(values) or 1]
    if lines.log and min(values) > 0:
        axis |= {"type": "log", "exponentformat": "power"}
        if max(values) > 30 * min(values):
            axis["dtick"] = 1  # whole decades; a narrower range keeps plotly's own, finer choice
    layout = _layout({"yaxis": axis, "showlegend": len(lines.columns) > 1 or bar is not None})
    return Chart(lines.title, lines.note, {"data": traces, "layout": layout})


def _stacked(
    title: str, note: str, columns: dict[str, tuple[str, str]], rows: Sequence[Row], axis: str
) -> Chart | None:
    traces = []
    for column, (name, colour) in columns.items():
        values = [row.get(column) for row in rows]
        if any(values):
            traces.append(
                {"type": "bar", "x": [row["step"] for row in rows], "y": [_short(v) for v in values],
                 "name": name, "marker": {"color": colour}}
            )  # fmt: skip
    if not traces:
        return None
    layout = _layout({"barmode": "stack", "bargap": 0, "yaxis": {"title": {"text": axis}}})
    return Chart(title, note, {"data": traces, "layout": layout})


def _ages(rows: Sequence[Row]) -> Chart | None:
    """Tokens of each step's batch by age; only where some are older than the learner."""
    counts = [{int(age): n for age, n in (row.get("staleness_tokens") or {}).items()} for row in rows]
    ages = sorted({age for row in counts for age in row})
    if not any(ages):
        return None
    colours = (BLUE, TEAL, YELLOW, ORANGE, RED)
    columns = {f"age_{age}": (f"{age} old", colours[min(age, len(colours) - 1)]) for age in ages}
    flat = [
        {"step": row["step"], **{f"age_{age}": n for age, n in count.items()}}
        for row, count in zip(rows, counts, strict=True)
    ]
    return _stacked("Tokens by age", "in policy versions", columns, flat, "tokens")


def _traces(
    column: str, name: str, colour: str, rows: Sequence[Row], smooth: bool, percent: bool
) -> list[dict[str, Any]]:
    steps = [row["step"] for row in rows]
    values = [row.get(column) for row in rows]
    present = [v for v in values if v is not None]
    if not present:
        return []
    if not smooth or len(present) < _SMOOTH_FROM:
        return [_line(steps, values, name, colour, percent)]
    window = max(5, len(values) // 20)
    raw = _line(steps, values, f"{name}, single steps", colour, percent)
    raw |= {"opacity": 0.35, "showlegend": False}
    raw["line"]["width"] = 1
    return [raw, _line(steps, running_mean(values, window), f"{name} (mean of {window})", colour, percent)]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` values, those that are None left out."""
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        inside = [v for v in values[max(0, end - window) : end] if v is not None]
        means.append(sum(inside) / len(inside) if inside else None)
    return means


def _line(
    steps: Sequence[int], values: Sequence[Any], name: str, colour: str, percent: bool
) -> dict[str, Any]:
    return {
        "type": "scatter",
        # A single point makes no line.
        "mode": "lines" if sum(v is not None for v in values) > 1 else "markers",
        "x": list(steps),
        "y": [_short(v) for v in values],
        "name": name,
        "line": {"color": colour, "width": 2},
        "hovertemplate": "%{y:.1%}" if percent else "%{y:.4~g}",
    }


def _short(value: Any) -> Any:
    """Six significant digits are more than a screen shows, and make the page a third of the size."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _layout(more: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {"xaxis": {"title": {"text": "step"}, "rangemode": "tozero"}, "showlegend": True}
    return base | more
