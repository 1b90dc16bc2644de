"""Many requests for few seats: let in together (`KIMI_RL_ADMIT_TOGETHER`) against one by one, as vLLM does.

    python benchmarks/admit_together.py --model hybrid:base --out benchmarks/results/admit_together_base_h100.json

One vLLM engine with random weights, whose stop tokens are so many that an answer has `--mean` tokens in the mean:
answers end one by one, as in an evaluation. Both ways get the same requests, in turns. Reported: tokens a second, the
medians of `--rounds`, their ratio, steps and how many of them held a prompt, and the floor: what a decoding step of all
seats takes for its bytes at the measured copy bandwidth, as a share of the time that a step's tokens took.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result import hand_in

from kimi_rl.bench.decode import copy_bandwidth, memory_floor, timed_folder
from kimi_rl.bench.rollout_model import TimedModel, circumstances
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.seeds import derive_seed


class Steps:
    """Counts an engine's steps, and those with a prompt among them."""

    def __init__(self, engine: Any):
        self.all = self.with_prompt = 0
        runner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._execute, runner.execute_model = runner.execute_model, self._counted

    def _counted(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        self.all += bool(output.num_scheduled_tokens)
        self.with_prompt += bool(output.scheduled_new_reqs) or output.total_num_scheduled_tokens > len(
            output.num_scheduled_tokens
        )
        return self._execute(output, *args, **kwargs)


def let_stop(folder: Path, vocabulary: int, mean: int) -> None:
    """Make every `mean`-th token one that ends an answer."""
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = list(range(0, vocabulary, mean))
    (folder / "config.json").write_text(json.dumps(config))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_rl.rollout.vllm_engine import VLLMEngine
    from kimi_rl.rollout.vllm_plugin import admit_together

    with timed_folder(args.model, args.prompt + args.longest, vocabulary=args.vocabulary) as folder:
        timed = TimedModel(
            folder, context=args.prompt, tokens=args.longest, largest=args.seats, seed=args.seed, engine_args=None
        )
        bandwidth = copy_bandwidth("cuda" if torch.cuda.is_available() else "cpu")
        let_stop(folder, timed.config.vocab_size, args.mean)
        engine = VLLMEngine(**timed.settings)
    steps = Steps(engine)
    seeds = [derive_seed(args.seed, "admit", i) for i in range(args.requests)]
    prompts = timed.prompts(args.requests, args.prompt, "admit")
    requests = [Request(*row) for row in zip(prompts, seeds, strict=True)]

    def run(together: bool, count: int) -> dict[str, float]:
        os.environ[admit_together.SWITCH] = "1" if together else "0"
        admit_together.install()
        steps.all = steps.with_prompt = 0
        start = time.perf_counter()
        found = engine.generate(requests[:count], SamplingParams(args.longest))
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for completion in found)
        return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
                "steps": steps.all, "steps_with_prompt": steps.with_prompt}  # fmt: skip

    ways = (("together", True), ("one_by_one", False))
    for _, together in ways:
        run(together, min(args.requests, args.seats + args.seats // 2))  # kernels are compiled, or tuned, at first
    rounds = [{name: run(together, args.requests) for name, together in ways} for _ in range(args.rounds)]
    speed = {name: median(row[name]["tokens_per_s"] for row in rounds) for name, _ in ways}
    moved = memory_floor(timed.config, args.prompt + args.mean, args.seats, bfloat16=torch.cuda.is_available())
    floor = sum(moved.values()) / bandwidth
    engine.close()
    shares = {name: floor * value / args.seats for name, value in speed.items()}
    return circumstances(timed, args.model) | {
        "command": shlex.join(["python", "benchmarks/admit_together.py", *sys.argv[1:]]),
        "seats": args.seats,
        "requests": args.requests,
        "mean_tokens": args.mean,
        "share_of_seats": admit_together.SHARE,
        "tokens_per_s": speed,
        "ratio": speed["together"] / speed["one_by_one"],
        "floor": moved | {"copy_bytes_per_s": bandwidth, "step_s": floor, "share": shares},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hybrid:base", help="ARCH:SIZE with random weights, or a folder")
    parser.add_argument("--seats", type=int, default=512, help="rollout.batch_size")
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--mean", type=int, default=100, help="tokens of an answer, in the mean")
    parser.add_argument("--longest", type=int, default=512, help="tokens of an answer, at most")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hand_in(measure(args), args.out)


if __name__ == "__main__":
    main()
