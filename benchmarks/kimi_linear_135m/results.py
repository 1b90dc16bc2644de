"""What came out: results.json, from which a document can be written, and the comparison of the runs, rendered."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from kimi_linear_135m.graph import HERE, NAME, SETS, Settings, comparison_file, run_folder, run_overrides
from kimi_linear_135m.scheduler import read_state
from kimi_rl.run_dir import RunDir, atomic_write_text, describe_environment, jsonable

PARTS_OF_A_SCORE = ("n", "held_out_accuracy", "held_out_interval", "k", "avg_at_k", "avg_at_k_interval", "pass_at_k",
                    "pass_at_k_interval", "truncated_share", "mean_length")  # fmt: skip


def write_results(settings: Settings) -> Path:
    """Write results.json of what there is in the folder, finished or not; renders the comparison where it can."""
    out, state = settings.out, read_state(settings.out)
    arms, names = settings.arms, {card["id"]: card["name"] for card in state["cards"]}
    steps = {
        name: {key: row[key] for key in ("status", "seconds", "error")}
        | {"command": _shown(row["command"]), "card": _card_names(row["card"], names), "card_id": row["card"] or None}
        for name, row in state["steps"].items()
    }
    found: dict[str, Any] = {
        "command": state.get("command"),
        "calls": state.get("calls"),
        "environment": describe_environment() | {"cards": sorted(set(names.values()))},
        "settings": state.get("settings"),
        "decisions": state.get("decisions"),
        "steps": steps,
        "step_seconds": sum(row["seconds"] for row in steps.values()),
        "conversion": {arm: _conversion(out / "models" / arm / "convert.json") for arm in arms},
        "probes": {arm: _read(out / "probes" / f"{arm}.json") for arm in arms},
        "samples": _read(out / "samples.json"),
        "distillation": {
            arm: {kind: distillation(RunDir(out / f"runs/{kind}_{arm}")) for kind in ("layers", "logits")}
            for arm in arms
        },
        "training": _training(settings),
        "scores": scores(out),
        "comparison": _render(settings),
    }
    target = out / "results.json"
    atomic_write_text(target, json.dumps(jsonable(found), indent=1) + "\n")
    return target


def _card_names(ids: str | None, names: dict[str, str]) -> str | None:
    """Of a step's card, or of its cards."""
    found = [names[card] for card in (ids or "").split(",") if card in names]
    return ", ".join(found) if found else None


def _shown(command: list[str]) -> str:
    """As one would type it."""
    words = shlex.join(command)
    for long, short in ((f"{sys.executable} -m kimi_rl.cli", "kimi-rl"), (sys.executable, "python"), (str(HERE), NAME)):
        words = words.replace(long, short)
    return words


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _conversion(path: Path) -> dict[str, Any] | None:
    report = _read(path)
    keys = ("command", "parameters", "perplexity", "calibration_tokens", "layers")
    return {key: report[key] for key in keys if key in report} if report else None


def distillation(run: RunDir) -> dict[str, Any] | None:
    """A distill stage: tokens and seconds of its steps, and the held-out figures against tokens."""
    rows = run.read_metrics()
    train = [row for row in rows if row["type"] == "train"]
    if not rows:
        return None
    # A logged row stands for the steps since the row before it.
    tokens, seconds, last = {0: 0.0}, 0.0, 0
    for row in train:
        passed = (row["step"] - last) * row["step_s"]
        tokens[row["step"]] = tokens[last] + (row.get("tokens_per_s") or 0.0) * passed
        seconds, last = seconds + passed, row["step"]
    keys = ("step", "when", "student_perplexity", "teacher_perplexity", "layer_error_mean", "layer_errors")
    curve = []
    for row in (row for row in rows if row["type"] == "eval"):
        at = max(step for step in tokens if step <= row["step"])
        curve.append({"tokens": tokens[at]} | {key: row[key] for key in keys if key in row})
    (stage,) = run.recipe()["stages"]
    losses = ("step", "loss", "kl_to_teacher", "cross_entropy", "layer_error_mean")
    return {
        "steps": last,
        "planned_steps": stage["steps"],
        "batch_tokens": stage["batch_tokens"],
        "pack_tokens": stage["pack_tokens"],
        "texts": stage["texts"],
        "tokens": tokens[last],
        "step_seconds": seconds,
        "notes": [row["text"] for row in rows if row["type"] == "note"],
        "curve": curve,
        "train": [{key: row[key] for key in losses if key in row} for row in train],
    }


def _training(settings: Settings) -> dict[str, Any]:
    """Tokens and seconds of the stages of every tuning run, and what each changed in accuracy."""
    from kimi_rl.compare.curves import read_stages
    from kimi_rl.report.report import describe_run

    folders = {f"source_sft_{seed}": f"runs/source_sft_{seed}" for seed in settings.seeds}
    folders |= {f"{arm}_{seed}": run_folder(arm, seed) for arm in settings.arms for seed in settings.seeds}
    found = {}
    for name, folder in folders.items():
        run = RunDir(settings.out / folder)
        if not run.read_metrics():
            continue
        stages = {}
        gains = {stage["name"]: stage["gains"] for stage in describe_run(run)["stages"]}
        for stage, curves in read_stages(run).items():
            if len(curves.train["seconds"]):
                stages[stage] = {
                    "steps": int(curves.train["step"][-1]),
                    "tokens": curves.train["tokens"][-1],
                    "step_seconds": curves.train["seconds"][-1],
                    "mean_step_s": curves.train["seconds"][-1] / len(curves.train["seconds"]),
                    "gains": {kind: asdict(gain) for kind, gain in gains[stage].items()},
                }
        if stages:
            found[name] = {"status": run.summary().get("status", "cut off"), "stages": stages}
    return found


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Model to set to figures with 95 % intervals. GSM8K of tuned models: the rlvr stage's own evaluations."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "scores").glob("*.json")):
        name, data = path.stem.rsplit("_", 1)
        row = _read(path)
        found.setdefault(name, {})[data] = _score(row) | {"command": row["command"], "seconds": row["seconds"]}
    for run in sorted(folder.glob(run_folder("*", "*"))):
        name = f"{run.parent.name}_{run.name.removeprefix('seed_')}"
        for row in RunDir(run).read_metrics():
            if row["stage"] == "rlvr" and row["type"] == "eval" and row["when"] in ("before", "after"):
                model = {"before": "sft", "after": "rlvr"}[row["when"]]
                figures = _score(row) | {"run": str(run.relative_to(folder)), "seconds": row["eval_s"]}
                found.setdefault(f"{model}_{name}", {}).setdefault("gsm8k", figures)
    return found


def _score(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in PARTS_OF_A_SCORE if row.get(key) is not None}


def _render(settings: Settings) -> dict[str, Any] | None:
    """compare.html, compare.json and the curves of the finished runs; nothing is run."""
    from kimi_rl.compare import load_plan, text_summary
    from kimi_rl.compare.comparison import write_comparison
    from kimi_rl.compare.fairness import arm_costs, check_parameters
    from kimi_rl.compare.page import write_png
    from kimi_rl.compare.runner import Outcome, check_plan, is_finished

    out, target = settings.out, settings.out / "compare"
    file = out / "recipes" / "compare.yaml"
    atomic_write_text(file, yaml.safe_dump(comparison_file(settings), sort_keys=False))
    plan = load_plan(file, run_overrides(settings))
    finished = [run for run in plan.runs if is_finished(target / run.folder)]
    if {run.arm for run in finished} != set(plan.file.arms):
        return None
    check_plan(plan, target)
    costs = arm_costs(plan)
    atomic_write_text(target / "comparison.yaml", yaml.safe_dump(plan.file.model_dump(), sort_keys=False))
    outcomes = [Outcome(run, "complete", kept=True) for run in finished]
    result, panels = write_comparison(plan, target, outcomes, costs, check_parameters(plan, costs))
    write_png(target / "curves.png", panels, plan.file.name)
    return {"page": "compare/compare.html", "figures": "compare/compare.json", "summary": text_summary(result)}


def score_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each model."""
    lines = []
    for name, sets in found.items():
        words = [f"{data} {_percent(sets[data])}" for data in SETS if data in sets]
        lines.append(f"  {name}: " + "; ".join(words))
    return lines


def _percent(row: dict[str, Any]) -> str:
    low, high = (100 * end for end in row["held_out_interval"])
    text = f"{100 * row['held_out_accuracy']:.1f} % ({low:.1f} to {high:.1f})"
    return text + (f", avg@{row['k']} {100 * row['avg_at_k']:.1f} %" if row.get("avg_at_k") is not None else "")
