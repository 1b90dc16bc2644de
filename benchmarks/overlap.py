"""How much of a step rollouts that run ahead save: the synchronous loop beside the overlapped one, in one run.

    python benchmarks/overlap.py --rollout 1.0 --learner 1.0 --steps 20 --out benchmarks/results/overlap_cpu.json

Real Ray actors, rollout pool, queue and weight sync; the engine and the learner only wait (`--rollout` and `--learner`
seconds a step), so that what is measured is the loop. Floor of a step: the longer of the rollout and of learner plus
weight sync. Reported: median step time of both loops, the floor, and the sum that the synchronous loop pays.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import ray
import torch
from ray import cloudpickle
from result import hand_in

from kimi_rl.dataset.prompt_order import PromptSampler
from kimi_rl.pipeline import local_ray
from kimi_rl.recipe import RLVRStage
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.batches import BatchMaker, RolloutQueue
from kimi_rl.rollout.engine import Completion
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.weight_sync import checksum_all


class Sleeps:
    """An engine whose tokens take `token_s` each, for the whole batch at once, and that holds real weights."""

    def __init__(self, model_folder, *, batch_size, device, engine_args):
        self.token_s, self.policy_version, self.held = engine_args["token_s"], -1, {}

    def generate(self, requests, params):
        time.sleep(self.token_s * params.max_tokens)
        tokens = [1] * params.max_tokens
        return [Completion(tokens, [0.0] * len(tokens), "length", self.policy_version) for _ in requests]

    def begin_update(self):
        pass

    def load_weights(self, weights):
        self.held = {name: tensor.clone() for name, tensor in weights}

    def checksums(self):
        return checksum_all(self.held.items())

    def finish_update(self, version):
        self.policy_version = version


def measure(args: argparse.Namespace, staleness: int) -> dict[str, float]:
    """Medians over the steps after the first ones, in seconds."""
    stage = RLVRStage.model_validate(
        {
            "kind": "rlvr", "steps": args.steps, "prompts_per_step": 8, "group_size": 2, "max_staleness": staleness,
            "rollout": {
                "workers": args.workers, "batch_size": 16, "max_tokens": args.tokens,
                "slice_tokens": args.slice if staleness else None,
                "engine_args": {"token_s": args.rollout / args.tokens},
            },
        }
    )  # fmt: skip
    settings = pool_settings(stage.rollout, model_folder="", max_model_len=64, seed=0, threads=1, device="cpu")
    pool = RolloutPool(**{**settings, "engine": Sleeps})
    rows = [{"answer": "", "prompt": [1], "id": str(i)} for i in range(1000)]
    maker = BatchMaker(
        pool, PromptSampler(len(rows), seed=0), rows, stage, seed=0, tokenize=lambda row: row["prompt"], decode=str,
        verify=lambda pairs: [Verdict(1.0, "correct", "", "") for _ in pairs],
    )  # fmt: skip
    queue = RolloutQueue(maker, stage)
    if stage.overlapped:
        pool.run_in_background()
    weights = [(f"layers.{i}.weight", torch.randn(args.megabytes * 2**18 // 8)) for i in range(8)]
    pool.wait_ready()
    steps, syncs, rollouts, waits = [], [], [], []
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        (pool.publish if stage.overlapped else pool.update_weights)(weights, step)
        synced = time.perf_counter()
        batch, waited = queue.take(step)
        time.sleep(args.learner)
        steps.append(time.perf_counter() - start)
        syncs.append(synced - start)
        rollouts.append(batch.generate_s)
        waits.append(waited)
    queue.close()
    pool.close()
    warm = 2 + staleness
    names = ("step_s", "sync_s", "rollout_s", "wait_s")
    return {n: statistics.median(v[warm:]) for n, v in zip(names, (steps, syncs, rollouts, waits), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollout", type=float, default=1.0, help="seconds of generation per batch")
    parser.add_argument("--learner", type=float, default=1.0, help="seconds of training per step")
    parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--slice", type=int, default=5, help="tokens after which a worker takes new weights")
    parser.add_argument("--megabytes", type=int, default=32, help="size of the weights")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with local_ray():
        plain = measure(args, 0)
        overlapped = {str(s): measure(args, s) for s in args.staleness}
    learner_and_sync = args.learner + plain["sync_s"]
    floor = max(args.rollout, learner_and_sync)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__},
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "floor_s": floor,
        "sum_s": args.rollout + learner_and_sync,
        "synchronous": plain,
        "overlapped": {s: {**v, "over_floor": v["step_s"] / floor} for s, v in overlapped.items()},
    }
    hand_in(result, args.out)


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    main()
