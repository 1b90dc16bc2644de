"""Time per decoding step: transformers' own `generate`, and the `transformers` engine without and with fused decoding.

    python benchmarks/decode_generate.py --out benchmarks/results/decode_generate_h100.json

One process, one card, one model (random weights of a preset) and the same prompts. Time per step is what `--tokens`
more tokens take than one, over their number: the median of `--repeats`, after one untimed run of each. transformers
runs its own class in bfloat16; the engine float32 weights under bfloat16 autocast, as the rollout workers do. Both
sample at temperature 1. On a CPU transformers' class is left out where fla is installed: it calls Triton on CPU
tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from result import hand_in

from kimi_rl.bench.decode import timed_folder
from kimi_rl.kernels.dispatch import fla_installed
from kimi_rl.model.modeling import FUSED_DECODE
from kimi_rl.model.presets import bare_config, count_parameters
from kimi_rl.recipe import ModelSection
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.transformers_engine import TransformersEngine
from kimi_rl.run_dir import describe_environment


def measure(generate: Callable[[int], int], tokens: int, repeats: int, device: str) -> dict[str, float | list[float]]:
    """Seconds a step of `generate`, which makes so many tokens a row and returns how many it made."""
    one, more = [], []
    for _ in range(repeats + 1):
        for count, times in ((1, one), (tokens + 1, more)):
            start = time.perf_counter()
            made = generate(count)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            if made != count:
                raise RuntimeError(f"asked for {count} tokens a row, got {made}: no timing")
    one, more = one[1:], more[1:]
    return {"step_ms": 1e3 * (median(more) - median(one)) / tokens, "one_token_s": one, "all_tokens_s": more}


def stock(folder: Path, prompts: list[list[int]], device: str) -> Callable[[int], int]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=device)
    mask = torch.ones_like(ids)

    def generate(count: int) -> int:
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=0,
            )  # fmt: skip
        return out.shape[1] - ids.shape[1]

    return generate


def ours(folder: Path, prompts: list[list[int]], device: str, fused: bool) -> Callable[[int], int]:
    engine = TransformersEngine(str(folder), batch_size=len(prompts), device=device, policy_version=0)
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]

    def generate(count: int) -> int:
        os.environ[FUSED_DECODE] = "1" if fused else "0"
        return min(len(c.token_ids) for c in engine.generate(requests, SamplingParams(count)))

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = bare_config(ModelSection(size=args.size), args.vocabulary)
    torch.manual_seed(0)
    prompts = torch.randint(10, args.vocabulary, (args.batch, args.prompt_tokens)).tolist()
    forms: dict[str, dict] = {}
    longest = args.prompt_tokens + args.tokens + 2
    with timed_folder(f"hybrid:{args.size}", longest, args.vocabulary) as folder:
        makers = {
            "transformers_generate": lambda: stock(folder, prompts, device),
            "engine": lambda: ours(folder, prompts, device, False),
            "engine_fused": lambda: ours(folder, prompts, device, True),
        }
        if device == "cpu" and fla_installed():
            del makers["transformers_generate"]
        for name, make in makers.items():
            forms[name] = measure(make(), args.tokens, args.repeats, device)
            if device == "cuda":
                torch.cuda.empty_cache()
    base = forms.get("transformers_generate", forms["engine"])["step_ms"]
    found = {
        "benchmark": "decode_generate",
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "model": {"size": args.size, "vocabulary": args.vocabulary, "parameters": count_parameters(config)},
        "batch": args.batch,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "fla_installed": fla_installed(),
        "forms": forms,
        "ratios_to": "transformers_generate" if "transformers_generate" in forms else "engine",
        "ratios": {name: base / form["step_ms"] for name, form in forms.items()},
        "environment": describe_environment(),
    }
    hand_in(found, args.out)


if __name__ == "__main__":
    main()
