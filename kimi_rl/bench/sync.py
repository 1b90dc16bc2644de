"""`kimi-rl bench sync`: what bringing the rollout workers to new weights costs, beside the floor."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from kimi_rl.errors import InputError
from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.pipeline import local_ray
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.run_dir import describe_environment
from kimi_rl.weight_sync import card_of


def bench_sync(
    model_folder: str, *, engine: str = "auto", transport: str = "auto", workers: int = 1, repeats: int = 5
) -> dict[str, Any]:
    """Send changing weights to a pool of `workers` and time each update.

    `transport` is a word of `rollout.weight_sync`, or "all" for every transport that works here, one after another.

    Returns:
        `transports`, by name: `bytes` sent to each worker; `pack_s` (casts, copies and checksums on the learner's
        side), `pause_s` (time in which nothing can be generated, verification included) and `gb_per_s` of the two
        together, medians over the updates; `floor_s`, a plain copy of the same bytes on the learner's device; and the
        updates' `rows`. The first update, in which buffers are made and mapped, counts in no median unless it is the
        only one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cards = torch.cuda.device_count()
    if transport == "nccl" and cards < 2:
        raise InputError(f"--transport: nccl needs two NVIDIA cards, found {cards}; use all for what works here")
    working = {"object_store": True, "cuda_ipc": cards > 0, "nccl": cards > 1}
    names = [transport] if transport != "all" else [name for name, works in working.items() if works]
    model = load_model(model_folder, dtype=torch.float32, device=device)
    figures = {}
    with local_ray():
        for name in names:
            section = RolloutSection(engine=engine, workers=workers, weight_sync=name)
            settings = pool_settings(
                section, model_folder=model_folder, max_model_len=256, seed=0, threads=torch.get_num_threads(),
                device=device,
            )  # fmt: skip
            pool = RolloutPool(**settings)
            if name in ("cuda_ipc", "nccl"):
                _move(model, pool.worker_cards(), beside=name == "cuda_ipc")
            used, found = _time_updates(pool, model, repeats)
            figures[used] = found
    return {
        "model": model_folder,
        "engine": engine,
        "workers": workers,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "transports": figures,
        "environment": describe_environment(),
    }


def _move(model: torch.nn.Module, worker_cards: set[str | None], *, beside: bool) -> None:
    """Put the model on a card that workers have (`beside`) or on one that none has, and make it the current one."""
    for index in range(torch.cuda.device_count()):
        if (card_of(f"cuda:{index}") in worker_cards) == beside:
            torch.cuda.set_device(index)
            model.to(f"cuda:{index}")
            return
    raise InputError("--transport: the workers are on every card that this process sees; use fewer workers")


def _time_updates(pool: RolloutPool, model: torch.nn.Module, repeats: int) -> tuple[str, dict[str, Any]]:
    """The transport's name and figures. Closes the pool."""
    rows = []
    try:
        pool.wait_ready()
        for version in range(repeats):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.001)
            times = pool.update_weights(to_checkpoint(model), version)
            rows.append({"version": version, "pack_s": times.pack_s, "pause_s": times.pause_s})
    finally:
        pool.close()
    settled = rows[1:] or rows
    pack, pause = (median(row[key] for row in settled) for key in ("pack_s", "pause_s"))
    return times.transport, {
        "bytes": times.bytes,
        "pack_s": pack,
        "pause_s": pause,
        "gb_per_s": times.bytes / 1e9 / (pack + pause),
        "floor_s": _floor(times.bytes, next(model.parameters()).device),
        "rows": rows,
    }


def _floor(size: int, device: torch.device) -> float:
    """Seconds of a plain copy of `size` bytes on `device`: median of 5, after one that maps the memory."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        _finish(device)
        start = time.perf_counter()
        target.copy_(source)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
