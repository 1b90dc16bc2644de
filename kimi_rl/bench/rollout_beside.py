"""`kimi-rl bench rollout MODEL --beside OTHER`: engines of two models on one device, timed in windows that alternate.

An engine's step is mostly Python, and two processes with the same code differ by more than the models do (where they
lie in memory, what else their cores do). So each model has several engines, and the median is over the windows of all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import torch

from kimi_rl.bench.decode import timed_folder
from kimi_rl.bench.rollout import all_on
from kimi_rl.bench.rollout_arm import ArmProcess, timed_together
from kimi_rl.bench.rollout_model import TimedModel, circumstances

OFF = "KIMI_RL_STEADY_GROUPS"  # the switch that models with one cache group hardly feel
UNDISTURBED = 0.9  # quantile of the windows' speeds that counts as what an engine does on a quiet machine
_PROFILED = 20  # steps of the profile of an engine's Python


def bench_beside(
    model: str,
    beside: str,
    *,
    batch: Sequence[int] = (64, 256),
    context: int = 1024,
    engines: int = 4,
    runner: str = "v1",
    steps: int = 100,
    windows: int = 3,
    vocabulary: int = 32768,
    seed: int = 0,
    engine_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Time pure decoding of both models as `bench_rollout` times `ours`, in `engines` processes for each.

    Returns:
        `rows`, per batch size and model: `tokens_per_s` and `step_s` of an engine that has the device to itself (the
        median of all windows of all the model's engines), `undisturbed_step_s` (their fastest tenth: other work on a
        machine only slows an engine down), each engine's `seconds`, `gpu_s` in which the card works in a step, the same
        without `OFF` (`without`), `together`: tokens/s of all the model's engines at once; and `ratio_to_first`,
        `undisturbed_ratio_to_first`, `together_ratio_to_first` (below 1: slower than the first model), each with an
        `..._interval`: what 95 % of resamplings of the windows give. `host`: the Python functions that take most of a
        step of its first engine.
    """
    tokens = tokens_needed(steps, windows)
    begun = time.perf_counter()
    with ExitStack() as stack:
        models: dict[str, TimedModel] = {}
        for source in (model, beside):
            folder = stack.enter_context(timed_folder(source, context + tokens, vocabulary=vocabulary))
            models[source] = TimedModel(
                folder, context=context, tokens=tokens, largest=max(batch), seed=seed, engine_args=engine_args
            )
        arms: dict[str, list[ArmProcess]] = {source: [] for source in models}
        about = {}
        # A model's first engine compiles what the others then find in the caches on disk.
        for numbers in ([0], range(1, engines)):
            for source, timed in models.items():
                for number in numbers:
                    arms[source].append(ArmProcess(f"{source} {number}", all_on(runner), timed.settings))
                    stack.callback(arms[source][-1].close)
            for source in models:
                for number in numbers:
                    about[source] = arms[source][number].wait_ready()
        started = time.perf_counter() - begun
        rows = []
        for size in batch:
            for source, timed in models.items():
                for number, arm in enumerate(arms[source]):
                    arm.ask("begin", **timed.work(size, number))
                for arm in arms[source]:
                    arm.answer()
            rows += side_by_side(arms, size=size, steps=steps, windows=windows, gpu=torch.cuda.is_available())
            for arm in [arm for members in arms.values() for arm in members]:
                arm.do("end")
    return circumstances(models[model], model) | {
        "beside": beside,
        "steps": steps,
        "switch": OFF,
        "engines": about,
        "rows": rows,
        "start_s": started,
        "total_s": time.perf_counter() - begun,
    }


def tokens_needed(steps: int, windows: int) -> int:
    """Tokens that an engine's sequences need for `side_by_side`, its settling and profiles included."""
    return 2 * windows * (steps + 5) + windows * (steps + steps // 2 + 5) + _PROFILED + 100


def side_by_side(
    arms: dict[str, list[ArmProcess]], *, size: int, steps: int, windows: int, gpu: bool
) -> list[dict[str, Any]]:
    """A row for each of two models, whose engines stand in the middle of decoding (see `bench_beside`).

    In each of `windows` rounds every engine is timed alone, one of either model after the other, so both models stand
    at the same context length in every pair of windows, and a machine that slows down slows both. Who comes first
    changes from pair to pair. Then, again in turns, all engines of a model at once.
    """
    names = list(arms)
    alone: dict[str, dict[str, list[list[float]]]] = {
        value: {name: [[] for _ in arms[name]] for name in names} for value in ("1", "0")
    }
    for turn in range(windows):
        for value, found in alone.items():
            for number in range(len(arms[names[0]])):
                for name in names if (turn + number) % 2 == 0 else reversed(names):
                    arm = arms[name][number]
                    arm.do("set", environment={OFF: value})
                    found[name][number] += arm.do("timed", steps=steps, windows=1)["seconds"]
    for arm in [arm for members in arms.values() for arm in members]:
        arm.do("set", environment={OFF: "1"})
    together: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(windows):
        for name in names if turn % 2 == 0 else reversed(names):
            engines = timed_together(arms[name], steps=steps, windows=1)
            together[name].append(sum(size * steps / engine["seconds"][0] for engine in engines))
    rows = []
    for name in names:
        row = {"batch": size, "model": name, "engines": len(arms[name])} | _speed(alone["1"][name], size, steps)
        row |= {"seconds": alone["1"][name], "without": _speed(alone["0"][name], size, steps)}
        row["without"]["seconds"] = alone["0"][name]
        row |= {"together": {"tokens_per_s": median(together[name]), "windows": together[name]}}
        if gpu:
            row["gpu_s"] = arms[name][0].do("timed", steps=1, windows=0, gpu=True)["gpu_s"]
        row["host"] = arms[name][0].do("host_profile", steps=_PROFILED)
        rows.append(row)
    compare_to_first(rows)
    return rows


def compare_to_first(rows: list[dict[str, Any]]) -> None:
    """Add how fast each model is as a multiple of the first one."""
    speeds = [[1 / seconds for engine in row["seconds"] for seconds in engine] for row in rows]
    together = [row["together"]["windows"] for row in rows]
    for row, own, all_own in zip(rows, speeds, together, strict=True):
        row["ratio_to_first"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["ratio_to_first_interval"] = ratio_interval(own, speeds[0])
        row["undisturbed_ratio_to_first"] = rows[0]["undisturbed_step_s"] / row["undisturbed_step_s"]
        row["undisturbed_ratio_to_first_interval"] = ratio_interval(own, speeds[0], UNDISTURBED)
        row["together_ratio_to_first"] = row["together"]["tokens_per_s"] / rows[0]["together"]["tokens_per_s"]
        row["together_ratio_to_first_interval"] = ratio_interval(all_own, together[0])


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], quantile: float = 0.5, resamples: int = 10_000
) -> list[float]:
    """Bootstrap interval, 95 %, of a quantile (the median) of `ours` over that of `theirs`."""
    draw = np.random.default_rng(0)
    drawn = [np.quantile(draw.choice(v, (resamples, len(v))), quantile, axis=1) for v in (ours, theirs)]
    return np.quantile(drawn[0] / drawn[1], [0.025, 0.975]).tolist()


def _speed(seconds: Sequence[Sequence[float]], size: int, steps: int) -> dict[str, Any]:
    """Of an engine alone, by the windows of all engines of a model."""
    windows = [second for engine in seconds for second in engine]
    step = median(windows) / steps
    undisturbed = float(np.quantile(windows, 1 - UNDISTURBED)) / steps
    return {"tokens_per_s": size / step, "step_s": step, "undisturbed_step_s": undisturbed}
