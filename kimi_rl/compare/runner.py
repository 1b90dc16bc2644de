"""Makes the runs of a comparison: each a whole pipeline in its own folder, placed by Ray, never made twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kimi_rl.card_share import part
from kimi_rl.compare.plan import Plan, Run
from kimi_rl.compare.watch import Watch
from kimi_rl.errors import InputError
from kimi_rl.pipeline import check_inputs, local_ray, train
from kimi_rl.recipe_load import dump_recipe, first_difference, parse_recipe, parse_yaml
from kimi_rl.run_dir import RunDir, only_one

Train = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` is complete or failed; `kept`: it had been made before."""

    run: Run
    status: str
    error: str | None = None
    kept: bool = False
    seconds: float = 0.0


@ray.remote(num_cpus=0)
class RunSlot:
    """A process that makes runs one after another. The actors of a run are placed in the slot's own resources."""

    def make(self, recipe_yaml: str, folder: str, resume: bool, make_run: Train) -> str | None:
        """Make or go on with a run. Returns None, or in one line why it failed."""
        try:
            make_run(parse_recipe(recipe_yaml), Path(folder), resume=resume)
        except Exception as error:  # whatever it is, the other runs go on
            return " ".join(f"{type(error).__name__}: {error}".split())
        return None


def is_finished(folder: Path) -> bool:
    run = RunDir(folder)
    return run.summary().get("status") == "complete" and run.load_state().get("status") == "finished"


def check_plan(plan: Plan, out: Path) -> None:
    """Data, models, and runs that are there already, before anything is written. Raises InputError."""
    for arm in plan.file.arms:
        try:
            check_inputs(plan.recipe(arm))
        except InputError as error:
            raise InputError(f"comparison {plan.file.name}: arms.{arm}: {error}") from None
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    for run in plan.runs:
        folder = out / run.folder
        stored = RunDir(folder).recipe_path
        if stored.is_file():
            old = parse_yaml(stored.read_text(encoding="utf-8"), str(stored))
            difference = first_difference(old, parse_yaml(dump_recipe(run.recipe), "the recipe given"))
            if difference:
                key, was, now = difference
                raise InputError(
                    f"{folder}: was made with another recipe: {key or 'the recipe'} is {was!r} there and {now!r} now; "
                    "use the same comparison file, or a new --out"
                )


def make_runs(
    plan: Plan,
    out: Path,
    *,
    parallel: int = 1,
    watch: Watch | None = None,
    on_done: Callable[[list[Outcome]], None] = lambda outcomes: None,
    make_run: Train = train,
) -> list[Outcome]:
    """Make every run of `plan` that is not finished in `out`, `parallel` of them at a time; go on with half-done ones.

    A run that fails is an outcome, not an exception. `on_done` gets the outcomes so far after each run. `make_run` is
    `kimi_rl.pipeline.train`, or a stand-in of its form.
    """
    outcomes = [Outcome(run, "complete", kept=True) for run in plan.runs if is_finished(out / run.folder)]
    kept = {outcome.run.folder for outcome in outcomes}
    todo = [run for run in plan.runs if run.folder not in kept]
    if watch is not None:
        for outcome in outcomes:
            watch.ended(outcome.run, "complete", kept=True)
    if not todo:
        return outcomes
    with only_one(out, "another comparison is running there"), local_ray(), _slots(min(parallel, len(todo))) as slots:
        pending: dict[ray.ObjectRef, tuple[Run, int, float]] = {}
        free = list(range(len(slots)))
        while todo or pending:
            while todo and free:
                run, index = todo.pop(0), free.pop(0)
                folder = out / run.folder
                resume = (folder / "recipe.yaml").is_file()
                reference = slots[index].make.remote(dump_recipe(run.recipe), str(folder), resume, make_run)
                pending[reference] = (run, index, time.monotonic())
                if watch is not None:
                    watch.started(run, folder / "metrics.jsonl", resume)
            ready, _ = ray.wait(list(pending), timeout=0.5)
            if watch is not None:
                watch.refresh()
            for reference in ready:
                run, index, start = pending.pop(reference)
                try:
                    error = ray.get(reference)
                except RayError as fault:
                    error = f"its process died ({' '.join(str(fault).split())[:200]})"
                    slots.replace(index)
                seconds = time.monotonic() - start
                outcomes.append(Outcome(run, "failed" if error else "complete", error, seconds=seconds))
                free.append(index)
                if watch is not None:
                    watch.ended(run, outcomes[-1].status, error, seconds=seconds)
                on_done(outcomes)
    return outcomes


class _Slots:
    """Slot actors. Where there are cards, several have a placement group each, of a card or a part of one; one alone
    may use all."""

    def __init__(self, count: int):
        cards = int(ray.cluster_resources().get("GPU", 0))
        bundle = {"GPU": part(1 / -(-count // cards))} if cards and count > 1 else None
        self._groups = [placement_group([bundle]) if bundle else None for _ in range(count)]
        self._actors = [self._start(group) for group in self._groups]

    def _start(self, group: Any) -> Any:
        if group is None:
            return RunSlot.remote()
        # The learner and the rollout workers that a run starts land in the same group, so on the same card.
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        return RunSlot.options(scheduling_strategy=strategy).remote()

    def __len__(self) -> int:
        return len(self._actors)

    def __getitem__(self, index: int) -> Any:
        return self._actors[index]

    def replace(self, index: int) -> None:
        ray.kill(self._actors[index])
        self._actors[index] = self._start(self._groups[index])

    def close(self) -> None:
        for actor, group in zip(self._actors, self._groups, strict=True):
            ray.kill(actor)
            if group is not None:
                remove_placement_group(group)


@contextlib.contextmanager
def _slots(count: int) -> Iterator[_Slots]:
    slots = _Slots(count)
    try:
        yield slots
    finally:
        slots.close()
