"""How many engines share the card: `rollout.workers: auto`.

A decode step costs an engine time on the host, in Python, and time on the card. Where the host's is longer the card
waits, and another engine beside the first fills the gap. So one engine is started and timed, and the ratio of the two
says how many the card can feed, within the memory and the cores there are. The choice is written down, and a run that
is resumed takes the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kimi_rl.card_share import CARD_SHARE, OWN_CARD_SHARE, card_share
from kimi_rl.errors import InputError
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.worker import build_engine, resolve_engine
from kimi_rl.run_dir import atomic_write_text

log = logging.getLogger(__name__)

MOST = 4
_STEPS, _WINDOWS = 50, 3


def choose_workers(
    step_s: float, gpu_s: float, *, cores: int, share_bytes: int, replica_bytes: int, most: int = MOST
) -> int:
    """Engines that keep a card busy.

    Args:
        step_s, gpu_s: of one engine alone: seconds of a decode step, and those in which the card works.
        cores: CPU cores; an engine keeps one busy, and the learner and Ray want some too: so no more than half of them.
        share_bytes, replica_bytes: memory for all engines, and what one needs.
    """
    return max(1, min(round(step_s / gpu_s), most, cores // 2, share_bytes // replica_bytes))


def memory_of_card(rollout: RolloutSection) -> float:
    """The part of a card's memory that is for the engines on it: gpu_memory_utilization of the recipe."""
    return rollout.engine_args.get("gpu_memory_utilization", OWN_CARD_SHARE if rollout.cards else CARD_SHARE)


def share_memory(rollout: RolloutSection, workers: float) -> dict[str, Any]:
    """`engine_args` for each of `workers` vLLM engines on one card: an equal part of its memory."""
    return {**rollout.engine_args, "gpu_memory_utilization": memory_of_card(rollout) / workers}


def settle_workers(
    rollout: RolloutSection, record: Path, *, device: str, cores: int, probe: Callable[[], dict[str, Any]]
) -> RolloutSection:
    """`rollout` with a number in place of `workers: auto`. Numbers come back as they are.

    1 on a CPU, and with another engine than vLLM. Otherwise what `record` says, or, where there is none yet, what
    `probe` (see `probe_engine`) and `choose_workers` say, which `record` then keeps; so many on each card.
    """
    if rollout.workers != "auto":
        return rollout
    if device == "cpu" or resolve_engine(rollout.engine) != "vllm":
        return _with_workers(rollout, max(1, rollout.cards), {})
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
    else:
        found = probe()
        found["cores"] = cores // max(1, rollout.cards)
        found["share_bytes"] = int(memory_of_card(rollout) * card_share() * found["card_bytes"])
        found["replica_bytes"] = found["engine_bytes"] + found["cache_bytes"]
        chosen = ("step_s", "gpu_s", "cores", "share_bytes", "replica_bytes")
        found["workers"] = choose_workers(**{name: found[name] for name in chosen})
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(record, json.dumps(found, indent=2) + "\n")
    workers = found["workers"] * max(1, rollout.cards)
    log.info("rollout.workers: auto takes %d; see %s", workers, record)
    # Engines that start side by side cannot measure what memory is left; they are told.
    return _with_workers(rollout, workers, {"kv_cache_memory_bytes": found["cache_bytes"]})


def one_worker(rollout: RolloutSection) -> RolloutSection:
    """`rollout` with one engine, on a card of the kind that it will have: the one to time."""
    return rollout.model_copy(update={"workers": 1, "cards": min(1, rollout.cards)})


def _with_workers(rollout: RolloutSection, workers: int, engine_args: dict[str, Any]) -> RolloutSection:
    least = rollout.min_workers and min(rollout.min_workers, workers)
    update = {"workers": workers, "min_workers": least, "engine_args": {**engine_args, **rollout.engine_args}}
    return rollout.model_copy(update=update)


def probe_engine(settings: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Start a vLLM engine on a card, in this process, and time it.

    `settings` are those of `build_engine`. The batch is the engine's own, half of `max_model_len` in context.

    Returns: step_s and gpu_s (see `choose_workers`); card_bytes; engine_bytes, what the engine took on the card beside
    its cache; cache_bytes, what a full batch of the longest sequences takes in the cache, at most what this one has.
    """
    import torch
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    from kimi_rl.rollout.decode_windows import DecodeBatch

    torch.set_num_threads(threads)
    free, total = torch.cuda.mem_get_info()
    engine = build_engine("vllm", **settings)
    core = engine._llm.llm_engine
    cache = core.engine_core.engine_core.scheduler.kv_cache_config
    cache_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors)
    fits = get_max_concurrency_for_kv_cache_config(core.vllm_config, cache)
    size, length = settings["batch_size"], settings["max_model_len"]
    size = max(1, min(size, int(fits)))
    steps = max(1, min(_STEPS, (length // 2 - 50) // _WINDOWS))
    prompts = [[10 + row % 90] * max(1, length // 2) for row in range(size)]
    with DecodeBatch(engine, prompts, length, seeds=range(size)) as batch:
        step_s = min(batch.seconds(steps) for _ in range(_WINDOWS)) / steps
        gpu_s = batch.gpu_seconds()
    taken = free - torch.cuda.mem_get_info()[0]
    return {
        "batch_size": size,
        "max_model_len": length,
        "step_s": step_s,
        "gpu_s": gpu_s,
        "card_bytes": total,
        "engine_bytes": max(0, taken - cache_bytes),
        "cache_bytes": min(cache_bytes, int(1.05 * cache_bytes * settings["batch_size"] / fits)),
    }


def probe_in_ray(pool_settings: Mapping[str, Any]) -> dict[str, Any]:
    """`probe_engine` in a process of its own, which leaves the card as it was. Raises InputError as the engine does."""
    import ray

    names = ("model_folder", "batch_size", "max_model_len", "seed", "device", "engine_args")
    settings = {name: pool_settings[name] for name in names}
    task = ray.remote(num_cpus=0, num_gpus=pool_settings["num_gpus"], max_calls=1, max_retries=0)(probe_engine)
    try:
        return ray.get(task.remote(settings, pool_settings["threads"]), timeout=pool_settings["start_timeout_s"])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
