"""`report.html` and the terminal summary of a run that is finished, going on, or broken.

A report is most wanted when something went wrong, so whatever is missing or damaged becomes a warning.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kimi_rl.errors import InputError
from kimi_rl.progress import duration
from kimi_rl.report.charts import stage_charts
from kimi_rl.report.gain import stage_gains
from kimi_rl.report.page import render_page
from kimi_rl.report.samples import stage_samples
from kimi_rl.run_dir import RunDir, atomic_write_text
from kimi_rl.statistics import PairedGain

Row = dict[str, Any]
T = TypeVar("T")

# A run without a new row for this long, and without a summary, is called interrupted.
_SILENT_S = 1800.0


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder: one file that needs no network. Returns its path."""
    run = describe_run(RunDir(run_dir), with_details=True)
    figures = []
    for stage in run["stages"]:
        for chart in stage["charts"]:
            chart["number"] = len(figures)
            figures.append(chart.pop("figure"))
    filters = {"percent": percent, "points": points, "between": between, "duration": duration}
    page = render_page(Path(__file__).with_name("page.html"), figures, filters, run=run)
    target = Path(run_dir) / "report.html"
    # Lone surrogates, which a broken completion may hold, are no UTF-8.
    atomic_write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def render_text_summary(run_dir: Path) -> str:
    """The run in a few lines for a terminal: status, and per stage the held-out accuracy before and after."""
    run = describe_run(RunDir(run_dir))
    facts = ", ".join(f"{name} {value}" for name, value in run["facts"])
    lines = [f"{run['name']}: {run['status']['word']}" + (f" ({facts})" if facts else "")]
    if run["status"]["detail"]:
        lines.append(f"  {run['status']['detail']}")
    width = max((len(stage["name"]) for stage in run["stages"]), default=0)
    for stage in run["stages"]:
        before, after = stage["before"], stage["after"]
        text = f"  {stage['name']:<{width}}  {stage['kind']:<4}  step {stage['step']}/{stage['total'] or '?'}"
        if found := stage["perplexity"]:
            text += f"  perplexity {found['before']:.3f} -> {found['after']:.3f} (teacher {found['teacher']:.3f})"
        gains = stage["gains"]
        if before or after:
            text += f"  held-out {_with_se(before)} -> {_with_se(after)}"
        if stage["change"] is not None:
            text += f"  ({points(stage['change'])}{between(gains.get('greedy'))})"
        if after and after["avg"] is not None:
            first = f"{percent(before['avg'])} ± {percent(before['avg_se'])} -> " if "avg" in gains else ""
            text += f"  avg@{after['k']} {first}{percent(after['avg'])} ± {percent(after['avg_se'])}"
        if "avg" in gains:
            text += f"  ({points(gains['avg'].value)}{between(gains['avg'])})"
        lines.append(text + (f"  {duration(stage['seconds'])}" if stage["seconds"] else ""))
    lines += [f"  {name}: {value} ({more})" for name, value, more in run["cards"]]
    lines += [f"  warning: {warning}" for warning in run["warnings"]]
    return "\n".join(lines)


def describe_run(run: RunDir, with_details: bool = False) -> dict[str, Any]:
    """Everything that is shown of a run, as plain values. `with_details` adds charts, samples and recipe."""
    warnings: list[str] = []

    def read(reader: Callable[[], T], default: T) -> T:
        try:
            return reader()
        except (InputError, OSError, UnicodeDecodeError) as error:
            warnings.append(str(error))
            return default

    recipe = read(run.recipe, {})
    summary = read(run.summary, {})
    rows = _deduplicate(read(lambda: run.read_metrics(on_broken=warnings.append), []))
    environments = read(run.environments, [])
    stages = []
    previous = None
    for name, recipe_stage in _stages(recipe, rows):
        own = [row for row in rows if row["stage"] == name]
        stage = _describe_stage(name, recipe_stage, own, summary, previous)
        previous = stage["after"] or previous
        stage |= {"charts": [], "samples": [], "gains": stage_gains(run, stage["before"], stage["after"])}
        if with_details:
            stage["charts"] = [
                {"title": c.title, "note": c.note, "figure": c.figure}
                for c in stage_charts(stage["kind"], stage["train"], stage["evals"], recipe_stage)
            ]
            stage["samples"] = stage_samples(run, name, warnings)
        stages.append(stage)
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    facts = [("seed", recipe["seed"])] if "seed" in recipe else []
    if (recipe.get("data") or {}).get("seed") is not None:
        facts.append(("data seed", recipe["data"]["seed"]))
    seconds = sum(stage["seconds"] or 0 for stage in stages)
    if seconds:
        facts.append(("stages took", duration(seconds)))
    if len(environments) > 1:
        facts.append(("started", f"{len(environments)} times"))
    if with_details and times:
        facts.append(("last row", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(times)))))
    return {
        "name": str(recipe.get("name") or summary.get("name") or run.path.name),
        "status": _status(summary, times, environments),
        "facts": facts,
        "stages": stages,
        "cards": _cards(stages),
        "recipe_text": read(lambda: run.recipe_path.read_text("utf-8"), "") if with_details else "",
        "machine": describe_machine(environments),
        "warnings": list(dict.fromkeys(warnings)),
    }


def _stages(recipe: Row, rows: list[Row]) -> list[tuple[str, Row]]:
    """(name, recipe entry) of every stage: those of the recipe, then any that only the metrics know."""
    entries = recipe.get("stages")
    known = {
        str(entry.get("name", entry.get("kind"))): entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    }
    return list((known | {row["stage"]: known.get(row["stage"], {}) for row in rows}).items())


def _describe_stage(
    name: str, entry: Row, rows: list[Row], summary: Row, previous: Row | None
) -> dict[str, Any]:
    """The stage `name`, whose recipe entry is `entry`; `previous` is the evaluation that it started from."""
    train = sorted((row for row in rows if row.get("type") == "train"), key=lambda row: row["step"])
    evals = sorted((row for row in rows if row.get("type") == "eval"), key=lambda row: row["step"])
    before = _evaluation([row for row in evals if row.get("when") == "before"])
    after = _evaluation([row for row in evals if row.get("when") != "before"])
    kind = str(entry.get("kind") or next((row["kind"] for row in rows if row.get("kind")), "?"))
    if kind != "distill":  # the stage starts from the model that the previous one ended with
        before = before or (previous if rows else None)
    step = max((row["step"] for row in train), default=0)
    total = entry.get("steps") or next((row["steps_total"] for row in rows if row.get("steps_total")), None)
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    reported = next((s.get("seconds") for s in summary.get("stages") or [] if s.get("name") == name), None)
    notes = [row["text"] for row in rows if row.get("type") == "note" and row.get("text")]
    return {
        "name": name,
        "kind": kind,
        "step": step,
        "total": total,
        "share": min(100, round(100 * step / total)) if total else 0,
        "before": before,
        "after": after,
        "change": after["accuracy"] - before["accuracy"] if before and after else None,
        "perplexity": _perplexities(evals),
        "seconds": reported or (max(times) - min(times) if times else None),
        "notes": list(dict.fromkeys(notes)),
        "train": train,
        "evals": evals,
    }


def _evaluation(rows: list[Row]) -> dict[str, Any] | None:
    """The latest of some evaluations that has a held-out accuracy."""
    row = next((row for row in reversed(rows) if row.get("held_out_accuracy") is not None), None)
    if row is None:
        return None
    inside = row.get("when") not in ("before", "after")
    return {
        "accuracy": row["held_out_accuracy"],
        "se": row.get("held_out_se"),
        "avg": row.get("avg_at_k"),
        "avg_se": row.get("avg_at_k_se"),
        "k": row.get("k"),
        "n": row.get("n"),
        "stage": row["stage"],
        "when": row.get("when"),
        "step": row["step"],
        "label": f"greedy, so far (step {row['step']})" if inside else "greedy",
    }


def _perplexities(evals: list[Row]) -> dict[str, float] | None:
    """Held-out perplexity of a distilled model at the first and the last evaluation, and its teacher's."""
    rows = [row for row in evals if row.get("student_perplexity") is not None]
    if not rows:
        return None
    first, last = rows[0]["student_perplexity"], rows[-1]["student_perplexity"]
    return {"before": first, "after": last, "teacher": rows[-1]["teacher_perplexity"]}


def _deduplicate(rows: list[Row]) -> list[Row]:
    """The last row of each kind, stage and step: a resumed run may have recorded one twice."""
    latest = {}
    for row in rows:
        if isinstance(row.get("stage"), str) and isinstance(row.get("step"), (int, float)):
            latest[row.get("type"), row["stage"], row["step"], row.get("when"), row.get("text")] = row
    return list(latest.values())


def _status(summary: Row, times: list[float], environments: list[Row]) -> dict[str, str]:
    if summary.get("status") == "failed":
        return {"word": "failed", "detail": str(summary.get("error") or "no reason was recorded")}
    if summary.get("status") == "stopped":
        return {"word": "stopped", "detail": "As it was asked to; --resume continues the run."}
    if summary:
        return {"word": "complete", "detail": ""}
    # A resumed run is alive before its first new row.
    signs = times + [e["started"] for e in environments if isinstance(e.get("started"), (int, float))]
    silent = time.time() - max(signs) if signs else 0.0
    if silent > _SILENT_S:
        detail = f"No new row for {duration(silent)}; --resume continues the run."
        return {"word": "interrupted", "detail": detail}
    return {"word": "running", "detail": ""}


def _cards(stages: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Run-wide figures as (name, value, explanation)."""
    rows = [row for stage in stages for row in stage["train"]]
    rlvr = [row for stage in stages if stage["kind"] == "rlvr" for row in stage["train"]]
    cards = []
    kls = [row["mismatch_kl"] for row in rlvr if row.get("mismatch_kl") is not None]
    if kls:
        cards.append(("Mismatch KL", f"{max(kls):.1e}", f"worst step; median {statistics.median(kls):.1e}"))
    speeds = [row["tokens_per_s"] for row in rlvr or rows if row.get("tokens_per_s") is not None]
    if speeds:
        where = "RLVR steps" if rlvr else "steps"
        cards.append(("Tokens per second", f"{statistics.median(speeds):,.0f}", f"median of the {where}"))
    troubles = ("timeout", "crashed", "unparseable_gold")
    verdicts = {name: sum(row.get(f"verdict_{name}") or 0 for row in rlvr) for name in troubles}
    if any(verdicts.values()):
        detail = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in verdicts.items() if count)
        cards.append(("Verdicts without a score", f"{sum(verdicts.values())}", detail))
    restarts = max((row.get("workers_restarted") or 0 for row in rlvr), default=0)
    if restarts:
        cards.append(("Rollout workers restarted", str(restarts), "the run went on with the same samples"))
    return cards


def describe_machine(environments: list[Row]) -> list[tuple[str, str]]:
    """Versions and machine of the last start, as (name, text)."""
    if not environments:
        return []
    last = environments[-1]
    rows = [("Python", last.get("python")), ("Platform", last.get("platform")), ("CPUs", last.get("cpus")),
            ("Memory", f"{last['memory_gib']} GiB" if last.get("memory_gib") else None),
            ("GPUs", ", ".join(last.get("gpus") or []) or "none")]  # fmt: skip
    rows += [(name, version or "not installed") for name, version in (last.get("versions") or {}).items()]
    return [(name, str(value)) for name, value in rows if value is not None]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def points(value: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * value:+.1f} pp"


def between(gain: PairedGain | None) -> str:
    """The interval of a change, to stand behind it."""
    return "" if gain is None else ", 95 %: {:+.1f} to {:+.1f}".format(*(100 * end for end in gain.interval))


def _with_se(evaluation: dict[str, Any] | None) -> str:
    return "–" if evaluation is None else f"{percent(evaluation['accuracy'])} ± {percent(evaluation['se'])}"
