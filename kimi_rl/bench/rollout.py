"""`kimi-rl bench rollout`: decode throughput with log-probs of stock vLLM, our engine, and several on one card."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import mean, median
from typing import Any

import torch

from kimi_rl.bench.decode import copy_bandwidth, memory_floor, timed_folder
from kimi_rl.bench.rollout_arm import ArmProcess, timed_together
from kimi_rl.bench.rollout_model import BLOCK, TimedModel, circumstances
from kimi_rl.rollout.vllm_plugin import KDA_STEP, admit_together
from kimi_rl.seeds import derive_seed

SWITCHES = (
    "KIMI_RL_FAST_ALLOCATE",
    "KIMI_RL_STEADY_GROUPS",
    "KIMI_RL_LEAN_LOGPROBS",
    "KIMI_RL_QUIET_STEPS",
    "KIMI_RL_KEYED_SAMPLING",
)
_OFF = dict.fromkeys((*SWITCHES, admit_together.SWITCH, KDA_STEP), "0")
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
) -> dict[str, Any]:
    """Time pure decoding at temperature 1 with the sampled tokens' log-probs, in engines each in its own process.

    `stock` is vLLM with all switches of this package off and no seeds; `stock_seeded` the same engine with a seed per
    request; `ours` one engine with all switches on and seeds; `replicas` 2 to `engines` such engines side by side, each
    with a batch of its own. Engines share the device, and one arm is timed at a time. `runner` ("v1" or "v2") is
    vLLM's model runner in our engines; stock vLLM takes the first for this model.

    Returns:
        `arms`, a row per batch size and arm: `tokens_per_s` (of all its engines; the median of the windows), `step_s`,
        the windows' `seconds`, `ratio` to `stock`, `share_of_floor`, and of an engine alone `gpu_s`, in which the card
        works in a step. `floor` per batch size: `floor_s` and what it is made of (see `memory_floor`).
        `switches`: seconds per step of our engine at the largest batch with one switch off.
        `equality`: greedy tokens and log-probs of `ours` against `stock` over `sequences` sequences that cross a block
        border, and mean log-probs of sampled tokens of both, with standard errors.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = max(batch)
    tokens = (windows + 2) * steps + 100
    begun = time.perf_counter()
    with ExitStack() as stack:
        folder = stack.enter_context(timed_folder(model, context + tokens, vocabulary=vocabulary))
        timed = TimedModel(
            folder, context=context, tokens=tokens, largest=largest, seed=seed, engine_args=engine_args
        )
        bandwidth = copy_bandwidth(device)
        gc.collect()

        def start(name: str, environment: dict[str, str]) -> ArmProcess:
            arm = ArmProcess(name, environment, timed.settings)
            stack.callback(arm.close)
            return arm

        # The first compiles what the others then find in the caches on disk.
        stock = start("stock", _OFF | {"VLLM_USE_V2_MODEL_RUNNER": "0"})
        about: dict[str, Any] = {"stock": stock.wait_ready()}
        ours = [start(f"ours {number}", all_on(runner)) for number in range(engines)]
        about["ours"] = [arm.wait_ready() for arm in ours][0]
        started = time.perf_counter() - begun

        def run(arms: Sequence[ArmProcess], size: int, seeded: bool, gpu: bool = False) -> dict[str, Any]:
            for number, arm in enumerate(arms):
                arm.ask("begin", **timed.work(size, number, seeded=seeded))
            for arm in arms:
                arm.answer()
            found = timed_together(arms, steps=steps, windows=windows, gpu=gpu)
            for arm in arms:
                arm.do("end")
            return _row(found, size, steps)

        rows, floors = [], {}
        for size in batch:
            floor = memory_floor(timed.config, context + tokens // 2, size, bfloat16=device == "cuda")
            floors[size] = floor | {"floor_s": sum(floor.values()) / bandwidth}
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
        switches = {"none": next(r["step_s"] for r in rows if r["batch"] == largest and r["arm"] == "ours")}
        for switch in SWITCHES:
            ours[0].do("set", environment={switch: "0"})
            switches[switch] = run(ours[:1], largest, True)["step_s"]
            ours[0].do("set", environment={switch: "1"})
        equality = _compare(stock, ours[0], timed.prompts(sequences, BLOCK, "equality"), seed)
    return circumstances(timed, model) | {
        "steps": steps,
        "copy_bytes_per_s": bandwidth,
        "engines": about,
        "arms": rows,
        "floor": floors,
        "switches": switches,
        "equality": equality,
        "start_s": started,
        "total_s": time.perf_counter() - begun,
    }


def all_on(runner: str) -> dict[str, str]:
    """The environment of an engine of ours: every switch on, and vLLM's model runner ("v1" or "v2").

    What else this process's environment says (`KDA_STEP` too) holds for the engine as well.
    """
    return dict.fromkeys(SWITCHES, "1") | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}


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
    prompts = [(prompt * 2)[: BLOCK - 40 + row % 48] for row, prompt in enumerate(prompts)]
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
    crossing = [len(p) < BLOCK < len(p) + _CHECKED for p in prompts]
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
