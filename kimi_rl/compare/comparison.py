"""`kimi-rl compare`: check a plan, make its runs, and write what they show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from kimi_rl.compare.analysis import compare_arms, measured
from kimi_rl.compare.curves import read_stages, records_of
from kimi_rl.compare.fairness import Check, arm_costs, check_parameters, check_records, check_settings
from kimi_rl.compare.page import write_csv, write_page, write_png
from kimi_rl.compare.panels import Panel, curve_panels, decode_panels, memory_panels
from kimi_rl.compare.plan import Plan
from kimi_rl.compare.runner import Outcome, check_plan, is_finished, make_runs
from kimi_rl.compare.watch import Watch
from kimi_rl.errors import InputError, RunError, one_line
from kimi_rl.report.report import describe_machine
from kimi_rl.run_dir import RunDir, atomic_write_text, describe_environment, jsonable


def compare(plan: Plan, out: Path, *, parallel: int = 1, watch: Watch | None = None) -> dict[str, Any]:
    """Make the runs of `plan` in `out` and write compare.html, compare.json, curves.csv and curves.png.

    Called again it goes on where it was; the report (but for the PNG) is brought up to date after every run.

    Returns what compare.json holds; `status` is "failed" where runs failed.

    Raises:
        InputError: before anything is written.
    """
    costs = arm_costs(plan)
    equal_size = check_parameters(plan, costs)
    check_plan(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "comparison.yaml", yaml.safe_dump(plan.file.model_dump(), sort_keys=False))

    def report(outcomes: Sequence[Outcome]) -> None:
        write_comparison(plan, out, outcomes, costs, equal_size)

    outcomes = make_runs(plan, out, parallel=parallel, watch=watch, on_done=report)
    warnings = _measure_decoding(plan, out, watch) if plan.file.efficiency else []
    result, panels = write_comparison(plan, out, outcomes, costs, equal_size, warnings)
    write_png(out / "curves.png", panels, plan.file.name)
    return result


def _measure_decoding(plan: Plan, out: Path, watch: Watch | None) -> list[str]:
    """`bench decode` of each arm's model, once; its figures go to decode.json. Returns what went wrong."""
    from kimi_rl.bench.decode import bench_decode

    asked = plan.file.efficiency
    models = {}
    for run in plan.runs:
        if is_finished(out / run.folder):
            models.setdefault(run.arm, str(out / run.folder / "model"))
    target = out / "decode.json"
    stored = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    if not models or (stored.get("asked") == asked.model_dump() and stored.get("arms") == list(models)):
        return []
    if watch is not None:
        watch.say("measuring how the arms decode")
    try:
        found = bench_decode(
            models, context=asked.context, tokens=asked.tokens, repeats=asked.repeats, batch=asked.batch,
            engine=asked.engine,
        )  # fmt: skip
    except (InputError, RunError, RuntimeError) as error:  # the curves are there all the same
        return [f"decoding was not measured: {one_line(error)}"]
    for model in found["models"]:
        model["model"] = str(Path(model["model"]).relative_to(out))
    found |= {"asked": asked.model_dump(), "arms": list(models)}
    atomic_write_text(target, json.dumps(found, indent=2) + "\n")
    return []


def write_comparison(
    plan: Plan,
    out: Path,
    outcomes: Sequence[Outcome],
    costs: dict[str, Any],
    equal_size: Check,
    warnings: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Panel]]:
    """Write compare.html, curves.csv and compare.json of the runs that are there; returns what is in them."""
    ended = {outcome.run.folder: outcome for outcome in outcomes}
    runs, curves, records, environments = [], {}, {}, []
    for run in plan.runs:
        folder = out / run.folder
        stored = RunDir(folder)
        outcome = ended.get(run.folder)
        entry: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "status": "waiting", "error": None}
        if outcome is not None:
            entry |= {"status": outcome.status, "error": outcome.error}
        entry |= {"folder": run.folder, "held_out": {}, "seconds": None}
        if entry["status"] == "complete":
            summary = stored.summary()
            environments += stored.environments()
            known = [stage for stage in summary["stages"] if "held_out_accuracy" in stage]  # not of a distill stage
            entry["held_out"] = {stage["name"]: stage["held_out_accuracy"] for stage in known}
            entry["seconds"] = summary["seconds"]
            curves[run.arm, run.seed] = read_stages(stored)
            records[run.arm, run.seed] = records_of(stored, curves[run.arm, run.seed])
        runs.append(entry)
    fairness = [equal_size, *check_settings(plan), *check_records(records, plan.reference)]
    arms = list(plan.file.arms)
    complete = sum(run["status"] == "complete" for run in runs)
    failed = any(run["status"] == "failed" for run in runs)
    figures = measured(curves, arms)
    stages = [stage.name for stage in plan.runs[0].recipe.stages]
    result = {
        "name": plan.file.name,
        "status": "failed" if failed else "complete" if complete == len(runs) else "running",
        "arms": arms,
        "reference": plan.reference,
        "seeds": plan.file.seeds,
        "stage": plan.stage,
        "stages": stages,
        "complete": complete,
        "comparisons": compare_arms(
            {key: own[plan.stage] for key, own in curves.items()},
            arms,
            plan.reference,
            primary=plan.file.primary,
            thresholds=plan.file.thresholds,
        ),
        "fairness": [asdict(check) for check in fairness],
        "unequal": [check.what for check in fairness if not check.equal],
        "context": plan.file.context,
        "costs": {arm: asdict(cost) for arm, cost in costs.items()},
        "measured": figures,
        "measured_names": {
            stage: list(dict.fromkeys(name for arm in figures.values() for name in arm.get(stage, {})))
            for stage in stages
        },
        "runs": runs,
        "warnings": list(warnings),
        "machine": describe_machine(environments or [describe_environment()]),  # where the runs were made
    }
    panels: list[Panel] = [*curve_panels(curves, arms, plan.reference), *memory_panels(costs)]
    if (out / "decode.json").is_file():
        result["decode"] = json.loads((out / "decode.json").read_text(encoding="utf-8"))
        panels += decode_panels(result["decode"])
    text = (out / "comparison.yaml").read_text(encoding="utf-8")
    write_page(out / "compare.html", result | {"file_text": text}, panels)
    write_csv(out / "curves.csv", panels)
    result = jsonable(result)
    atomic_write_text(out / "compare.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result, panels


def text_summary(result: dict[str, Any]) -> str:
    """The comparison in a few lines for a terminal."""
    lines = [f"{result['name']}: {result['complete']} of {len(result['runs'])} runs complete"]
    lines += [f"  {run['arm']} seed {run['seed']} failed: {run['error']}" for run in result["runs"]
              if run["status"] == "failed"]  # fmt: skip
    lines += [f"  warning: {warning}" for warning in result["warnings"]]
    if result["unequal"]:
        lines.append(f"  not equal between the arms: {', '.join(result['unequal'])}")
    return "\n".join(lines + [f"  {one['conclusion']}" for one in result["comparisons"]])
