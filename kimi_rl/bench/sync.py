"""`kimi-rl bench sync`: what bringing the rollout workers to new weights costs, beside the floor."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.pipeline import local_ray
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.run_dir import describe_environment


def bench_sync(model_folder: str, *, engine: str = "auto", workers: int = 1, repeats: int = 5) -> dict[str, Any]:
    """Send changing weights to a pool of `workers` and time each update.

    Returns:
        Per update: `pack_s` (checksums and copies on the learner's side), `pause_s` (time in which nothing can be
        generated, verification included); their medians; and `floor_s`, a plain copy of the same bytes on the
        learner's device.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_folder, dtype=torch.float32, device=device)
    tensors = [t for _, t in to_checkpoint(model)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    floors = []
    for _ in range(5):
        _finish(device)
        start = time.perf_counter()
        copies = [t.clone() for t in tensors]
        _finish(device)
        floors.append(time.perf_counter() - start)
        del copies
    section = RolloutSection(engine=engine, workers=workers)
    rows = []
    with local_ray():
        pool = RolloutPool(
            **pool_settings(
                section, model_folder=model_folder, max_model_len=256, seed=0, threads=torch.get_num_threads(),
                device=device,
            )
        )  # fmt: skip
        try:
            pool.worker_pids()
            for version in range(repeats):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.001)
                times = pool.update_weights(to_checkpoint(model), version)
                rows.append({"version": version, "pack_s": times.pack_s, "pause_s": times.pause_s})
        finally:
            pool.close()
    pause = median(row["pause_s"] for row in rows)
    pack = median(row["pack_s"] for row in rows)
    return {
        "model": model_folder,
        "transport": "object_store",
        "engine": engine,
        "workers": workers,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "bytes": size,
        "pack_s": pack,
        "pause_s": pause,
        "gb_per_s": size / 1e9 / (pack + pause),
        "floor_s": median(floors),
        "rows": rows,
        "environment": describe_environment(),
    }


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
