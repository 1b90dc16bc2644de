"""`kimi-rl bench parity`: trainer against engine on the same sampled tokens, at learning rate 0."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from kimi_rl.mismatch import Mismatch, measure_mismatch
from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from kimi_rl.rollout.worker import build_engine, resolve_engine
from kimi_rl.run_dir import describe_environment
from kimi_rl.seeds import derive_seed
from kimi_rl.weight_sync import WeightUpdate, apply_update, tensor_checksum, whole_layers


def trainer_logprobs(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, autocast: bool
) -> list[torch.Tensor]:
    """Log-probs that the learner gives to each completion's tokens: one float32 [T_i] a sequence, on the CPU.

    All sequences in one packed row, through the kernels and in the precision of a training step.
    """
    device = next(model.parameters()).device
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = [len(completion) for completion in completions]
    ends = list(itertools.accumulate(map(len, sequences)))
    places = [place for end, n in zip(ends, lengths, strict=True) for place in range(end - n - 1, end - 1)]
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        scores = model(
            input_ids=torch.tensor([list(itertools.chain(*sequences))], device=device),
            cu_seqlens=torch.tensor([0, *ends]),
            scored_places=torch.tensor(places, device=device),
            scored_tokens=torch.tensor(list(itertools.chain(*completions)), device=device),
            with_entropy=False,
            use_cache=False,
        )
    return list(scores.logps.float().cpu().split(lengths))


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[Sequence[float]], cap: float = 2.0) -> Mismatch:
    """Mismatch of two sets of log-probs of the same tokens, ragged."""
    a = torch.cat(list(ours))
    b = torch.cat([torch.tensor(row, dtype=torch.float32) for row in theirs])
    return measure_mismatch(a, b, torch.ones_like(a), cap)


def bench_parity(
    model_folder: str,
    *,
    engine: str = "auto",
    steps: int = 20,
    prompts: int = 16,
    prompt_tokens: int = 64,
    max_tokens: int = 64,
    seed: int = 0,
    engine_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate `steps` batches from random prompts, and score every token with the trainer and with the engine itself.

    Temperature is 1. On a GPU the trainer holds fp32 weights under bf16 autocast and the engine serves bf16; on a CPU
    both are fp32. Before the first batch the trainer's weights are synchronised into the engine, verified.

    Returns:
        `trainer_vs_engine` and, where the engine can score given tokens, `engine_prefill_vs_decode`: means over the
        steps of KL (k3), mean |d| and the largest |d|; plus the per-step rows, the sync's seconds, and the environment.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_folder, dtype=torch.float32, device=device).eval()
    name = resolve_engine(engine)
    longest = prompt_tokens + max_tokens + 1
    start = time.perf_counter()
    loaded: RolloutEngine = build_engine(
        name,
        model_folder,
        batch_size=prompts,
        max_model_len=longest,
        seed=seed,
        device=device,
        engine_args=engine_args or {},
    )
    init_s = time.perf_counter() - start

    weights = [(n, t.detach()) for n, t in to_checkpoint(model)]
    update = WeightUpdate(0, list(whole_layers(weights)), {n: tensor_checksum(t) for n, t in weights})
    start = time.perf_counter()
    apply_update(loaded, update)
    sync_s = time.perf_counter() - start

    generator = torch.Generator().manual_seed(seed)
    rows, generated, generate_s = [], 0, 0.0
    for step in range(steps):
        batch = torch.randint(10, model.config.vocab_size - 10, (prompts, prompt_tokens), generator=generator).tolist()
        requests = [Request(p, derive_seed(seed, "parity", step, i)) for i, p in enumerate(batch)]
        start = time.perf_counter()
        completions: list[Completion] = loaded.generate(requests, SamplingParams(max_tokens))
        generate_s += time.perf_counter() - start
        tokens = [c.token_ids for c in completions]
        sampled = [c.logprobs for c in completions]
        generated += sum(map(len, tokens))
        trainer = trainer_logprobs(model, batch, tokens, autocast=device != "cpu")
        row = {"step": step, "trainer_vs_engine": vars(compare(trainer, sampled))}
        if hasattr(loaded, "score"):
            prefill = [torch.tensor(scores) for scores in loaded.score(batch, tokens)]
            row["engine_prefill_vs_decode"] = vars(compare(prefill, sampled))
        rows.append(row)
    loaded.close()

    def summary(key: str) -> dict[str, float] | None:
        found = [row[key] for row in rows if key in row]
        if not found:
            return None
        return {
            "kl": mean(r["kl"] for r in found),
            "mean_abs": mean(r["mean_abs"] for r in found),
            "max_abs": max(r["max_abs"] for r in found),
        }

    return {
        "model": model_folder,
        "parameters": sum(p.numel() for p in model.parameters()),
        "engine": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "steps": steps,
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "tokens": generated,
        "rollout_tokens_per_s": generated / generate_s,
        "engine_init_s": init_s,
        "sync_s": sync_s,
        "trainer_vs_engine": summary("trainer_vs_engine"),
        "engine_prefill_vs_decode": summary("engine_prefill_vs_decode"),
        "rows": rows,
        "environment": describe_environment(),
    }
