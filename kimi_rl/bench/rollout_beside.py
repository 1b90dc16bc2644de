"""Engines of two models timed side by side for `kimi-rl bench rollout --beside`: their windows alternate."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from kimi_rl.bench.rollout_arm import ArmProcess

_PROFILED = 20  # steps of the profile of an engine's Python


def tokens_needed(steps: int, windows: int) -> int:
    """Tokens that an engine's sequences need for `side_by_side`, its settling and profiles included."""
    return 2 * windows * (steps + 5) + _PROFILED + 100


def side_by_side(
    ours: ArmProcess,
    beside: ArmProcess,
    work: dict[str, Any],
    *,
    size: int,
    steps: int,
    windows: int,
    off: str,
    gpu: bool,
) -> list[dict[str, Any]]:
    """Rows `ours` and `beside` at one batch size, and `ours_without`, `beside_without`: with the switch `off` at 0.

    In each of `windows` rounds both engines are timed with the switch on, then both with it off, so both stand at the
    same context length in every pair of windows, and a machine that slows down slows both. `work`: what an
    arm's order `begin` takes. `ratio_to_ours` is of tokens per second: below 1 is slower than ours. `host`: the
    Python functions that take most of an engine's step.
    """
    for arm in (ours, beside):
        arm.do("begin", **work)
    seconds: dict[str, list[float]] = {"ours": [], "beside": [], "ours_without": [], "beside_without": []}
    for _ in range(windows):
        for value, suffix in (("1", ""), ("0", "_without")):
            for name, arm in (("ours", ours), ("beside", beside)):
                arm.do("set", environment={off: value})
                seconds[name + suffix] += arm.do("timed", steps=steps, windows=1)["seconds"]
    found = []
    for name, arm in (("ours", ours), ("beside", beside)):
        arm.do("set", environment={off: "1"})
        more = {"host": arm.do("host_profile", steps=_PROFILED)}
        if gpu:
            more["gpu_s"] = arm.do("timed", steps=1, windows=0, gpu=True)["gpu_s"]
        for suffix in ("", "_without"):
            found.append(_row(name + suffix, seconds[name + suffix], size, steps) | ({} if suffix else more))
        arm.do("end")
    return _with_ratios(found)


def _row(name: str, seconds: Sequence[float], size: int, steps: int) -> dict[str, Any]:
    step = median(seconds) / steps
    return {"batch": size, "arm": name, "engines": 1, "tokens_per_s": size / step, "step_s": step, "seconds": [seconds]}


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base = next(row["tokens_per_s"] for row in rows if row["arm"] == "ours")
    return [row | {"ratio_to_ours": row["tokens_per_s"] / base} for row in rows]
