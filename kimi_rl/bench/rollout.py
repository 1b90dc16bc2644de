"""`kimi-rl bench rollout`: decode throughput with log-probs of stock vLLM, our engine, and several on one card."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import KimiLinearConfig

from kimi_rl.bench.decode import copy_bandwidth, memory_floor, timed_folder
from kimi_rl.bench.rollout_arm import ArmProcess
from kimi_rl.bench.rollout_beside import side_by_side, tokens_needed
from kimi_rl.errors import InputError
from kimi_rl.model.cost import sequence_bytes
from kimi_rl.model.presets import describe
from kimi_rl.run_dir import describe_environment
from kimi_rl.seeds import derive_seed

_GROUPS = "KIMI_RL_STEADY_GROUPS"  # the switch that models with one cache group hardly feel
SWITCHES = (
    "KIMI_RL_FAST_ALLOCATE",
    _GROUPS,
    "KIMI_RL_LEAN_LOGPROBS",
    "KIMI_RL_QUIET_STEPS",
    "KIMI_RL_KEYED_SAMPLING",
)
_OFF = dict.fromkeys(SWITCHES, "0")
_BLOCK = 480  # tokens of a cache block that vLLM chooses for this model on a card
_CHECKED = 64  # tokens of each sequence of the equality check


def bench_rollout(
    model: str,
    *,
    batch: Sequence[int] = (64, 256),
    context: int = 1024,
    engines: int = 4,
    runner: str = "v1",
    sequences: int = 256,
    steps: int = 100,
    windows: int = 3,
    vocabulary: int = 32768,
    seed: int = 0,
    engine_args: dict[str, Any] | None = None,
    beside: str | None = None,
    only_beside: bool = False,
) -> dict[str, Any]:
    """Time pure decoding at temperature 1 with the sampled tokens' log-probs, in engines each in its own process.

    `stock` is vLLM with all switches of this package off and no seeds; `stock_seeded` the same engine with a seed per
    request; `ours` one engine with all switches on and seeds; `replicas` 2 to `engines` such engines side by side, each
    with a batch of its own. Engines share the device, and one arm is timed at a time. `runner` ("v1" or "v2") is
    vLLM's model runner in our engines; stock vLLM takes the first for this model. `beside` is another model,
    in an engine of ours whose windows alternate with those of `ours` (see `rollout_beside.py`); with `only_beside` no
    more is measured.

    Returns:
        `arms`, a row per batch size and arm: `tokens_per_s` (of all its engines; the median of the windows), `step_s`,
        the windows' `seconds`, `ratio` to `stock`, `share_of_floor`, and of an engine alone `gpu_s`, in which the card
        works in a step. `floor` per batch size: `floor_s` and what it is made of (see `memory_floor`).
        `switches`: seconds per step of our engine at the largest batch with one switch off.
        `beside`: with that option, `side_by_side`'s rows of both models' engines per batch size.
        `equality`: greedy tokens and log-probs of `ours` against `stock` over `sequences` sequences that cross a block
        border, and mean log-probs of sampled tokens of both, with standard errors.
    """
    if runner not in ("v1", "v2"):
        raise InputError(f"--runner: found {runner!r}; use v1 or v2")
    if only_beside and beside is None:
        raise InputError("--only-beside: found no --beside; name the other model, such as --beside mla:base")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = max(batch)
    tokens = max((windows + 2) * steps + 100, tokens_needed(steps, windows) if beside else 0)
    begun = time.perf_counter()
    with ExitStack() as stack:
        folder = stack.enter_context(timed_folder(model, context + tokens, vocabulary=vocabulary))
        config = KimiLinearConfig.from_pretrained(folder)
        bandwidth = copy_bandwidth(device)
        gc.collect()

        def settings_of(folder: Path, config: KimiLinearConfig) -> dict[str, Any]:
            length = max(context + tokens, 2 * _BLOCK)
            # A fixed cache, for engines that start side by side would see each other's memory come and go.
            fixed = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": cache_bytes(config, largest, length)}
            return {
                "model_folder": str(folder),
                "max_model_len": length,
                "max_num_seqs": largest,
                "dtype": "bfloat16" if device == "cuda" else "float32",
                "engine_args": (fixed if device == "cuda" else {}) | (engine_args or {}),
                "seed": seed,
            }

        settings = settings_of(folder, config)

        def start(name: str, environment: dict[str, str], settings: dict[str, Any] = settings) -> ArmProcess:
            arm = ArmProcess(name, environment, settings)
            stack.callback(arm.close)
            return arm

        about, others = {}, []
        if not only_beside:
            # The first compiles what the others then find in the caches on disk.
            stock = start("stock", _OFF | {"VLLM_USE_V2_MODEL_RUNNER": "0"})
            about["stock"] = stock.wait_ready()
        on = dict.fromkeys(SWITCHES, "1") | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
        ours = [start(f"ours {number}", on) for number in range(1 if only_beside else engines)]
        if beside is not None:
            other = stack.enter_context(timed_folder(beside, context + tokens, vocabulary=vocabulary))
            others = [start("beside", on, settings_of(other, KimiLinearConfig.from_pretrained(other)))]
        about["ours"] = [arm.wait_ready() for arm in ours][0]
        about.update((arm.name, arm.wait_ready()) for arm in others)
        started = time.perf_counter() - begun

        def prompts(count: int, length: int, label: str) -> list[list[int]]:
            generator = torch.Generator().manual_seed(derive_seed(seed, "rollout", label))
            return torch.randint(10, config.vocab_size - 10, (count, length), generator=generator).tolist()

        def run(arms: Sequence[ArmProcess], size: int, seeded: bool, gpu: bool = False) -> dict[str, Any]:
            for number, arm in enumerate(arms):
                seeds = [derive_seed(seed, "rollout", number, row) for row in range(size)] if seeded else None
                arm.ask("begin", prompts=prompts(size, context, str(number)), seeds=seeds, tokens=tokens)
            for arm in arms:
                arm.answer()
            start_at = time.time() + 0.3 if len(arms) > 1 else 0.0
            for arm in arms:
                arm.ask("timed", steps=steps, windows=windows, start_at=start_at, gpu=gpu)
            found = [arm.answer() for arm in arms]
            for arm in arms:
                arm.do("end")
            return _row(found, size, steps)

        pairs = []
        for size in batch if others else ():
            seeds = [derive_seed(seed, "rollout", 0, row) for row in range(size)]
            work = {"prompts": prompts(size, context, "0"), "seeds": seeds, "tokens": tokens}
            pairs += side_by_side(
                ours[0], others[0], work, size=size, steps=steps, windows=windows, off=_GROUPS, gpu=device == "cuda"
            )
        rows, floors, switches, equality = [], {}, None, None
        for size in batch:
            floor = memory_floor(config, context + tokens // 2, size, bfloat16=device == "cuda")
            floors[size] = floor | {"floor_s": sum(floor.values()) / bandwidth}
            if only_beside:
                continue
            gpu = device == "cuda"
            arms = [("stock", [stock], False), ("stock_seeded", [stock], True), ("ours", ours[:1], True)]
            arms += [("replicas", ours[:count], True) for count in range(2, engines + 1)]
            for name, members, seeded in arms:
                row = run(members, size, seeded, gpu and len(members) == 1)
                rows.append({"batch": size, "arm": name, "engines": len(members)} | row)
            base = next(row for row in rows if row["batch"] == size and row["arm"] == "stock")["tokens_per_s"]
            for row in rows:
                if row["batch"] == size:
                    row["ratio"] = row["tokens_per_s"] / base
                    row["share_of_floor"] = floors[size]["floor_s"] * row["tokens_per_s"] / size
        if not only_beside:
            switches = {"none": next(r["step_s"] for r in rows if r["batch"] == largest and r["arm"] == "ours")}
            for switch in SWITCHES:
                ours[0].do("set", environment={switch: "0"})
                switches[switch] = run(ours[:1], largest, True)["step_s"]
                ours[0].do("set", environment={switch: "1"})
            equality = _compare(stock, ours[0], prompts(sequences, _BLOCK, "equality"), seed)
    return {
        "command": " ".join(["kimi-rl", *sys.argv[1:]]),
        "model": {"source": model, "parameters": describe(config)["total"], "layers": list(config.layer_types),
                  "vocabulary": config.vocab_size},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "context": context,
        "steps": steps,
        "copy_bytes_per_s": bandwidth,
        "engines": about,
        "arms": rows,
        "beside": {"model": beside, "switch": _GROUPS, "rows": pairs} if others else None,
        "floor": floors,
        "switches": switches,
        "equality": equality,
        "start_s": started,
        "total_s": time.perf_counter() - begun,
        "environment": describe_environment(),
    }  # fmt: skip


def cache_bytes(config: KimiLinearConfig, sequences: int, length: int) -> int:
    """Bytes of vLLM's cache that surely hold `sequences` sequences of `length` tokens, in bfloat16.

    vLLM gives every layer pages of one size: what a block of tokens takes in an MLA layer, or a KDA layer's states.
    """
    mla, kda = (config.layer_types.count(kind) for kind in ("full_attention", "linear_attention"))
    block = sequence_bytes(config, _BLOCK).kv // max(1, mla)
    states = (sequence_bytes(config, 1).state + sequence_bytes(config, 1).conv) // max(1, kda)
    pages = kda + mla * (-(-length // _BLOCK) + 1)
    return int(1.15 * sequences * pages * max(block, states)) + 2**28


def _row(found: Sequence[dict[str, Any]], size: int, steps: int) -> dict[str, Any]:
    """An arm's figures from its engines' windows."""
    per_engine = [median(engine["seconds"]) / steps for engine in found]
    row: dict[str, Any] = {
        "tokens_per_s": sum(size / step for step in per_engine),
        "step_s": mean(per_engine),
        "seconds": [engine["seconds"] for engine in found],
    }
    if "gpu_s" in found[0]:
        row["gpu_s"] = found[0]["gpu_s"]
    return row


def _compare(stock: ArmProcess, ours: ArmProcess, prompts: list[list[int]], seed: int) -> dict[str, Any]:
    """Generate the same with both: greedily, and at temperature 1 (where the random numbers differ on a card)."""
    # Prompts end up to 40 tokens before a block does, and some just after its border.
    prompts = [(prompt * 2)[: _BLOCK - 40 + row % 48] for row, prompt in enumerate(prompts)]
    seeds = [derive_seed(seed, "equality", row) for row in range(len(prompts))]

    def both(temperature: float) -> Iterator[list[tuple[list[int], list[float]]]]:
        for arm in (stock, ours):  # one at a time: the order of steps must not depend on the other
            arm.ask("generate", prompts=prompts, seeds=seeds, tokens=_CHECKED, temperature=temperature)
            yield arm.answer()

    theirs, mine = both(0.0)
    equal = [a == b for (a, _), (b, _) in zip(theirs, mine, strict=True)]
    gaps = [
        max(abs(x - y) for x, y in zip(a[1], b[1], strict=True))
        for a, b, same in zip(theirs, mine, equal, strict=True) if same
    ]  # fmt: skip
    crossing = [len(p) < _BLOCK < len(p) + _CHECKED for p in prompts]
    sampled = {}
    for name, answers in zip(("stock", "ours"), both(1.0), strict=True):
        means = torch.tensor([mean(logprobs) for _, logprobs in answers])
        sampled[name] = {"mean_logprob": float(means.mean()), "standard_error": float(means.std() / len(means) ** 0.5)}
    again = ours.do("generate", prompts=prompts, seeds=seeds, tokens=_CHECKED, temperature=1.0)
    return {
        "sequences": len(prompts),
        "tokens_each": _CHECKED,
        "across_a_block_border": sum(crossing),
        "greedy_equal": sum(equal),
        "greedy_largest_logprob_difference": max(gaps, default=None),
        "sampled": sampled,
        "sampled_equal_when_repeated": sum(a == b for a, b in zip(answers, again, strict=True)),
    }
