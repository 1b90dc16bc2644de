"""`kimi-rl bench learner`: optimizer steps of stock TRL, on padded batches, packed ones and with shared prompts."""

from __future__ import annotations

import functools
import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import transformers
from datasets import Dataset

from kimi_rl.card_work import card_work
from kimi_rl.errors import InputError, RunError, one_line
from kimi_rl.kernels.dispatch import fla_installed
from kimi_rl.learner.packed import PackedLogps, PackingSettings
from kimi_rl.learner.packing import cost_of, regroup, tokens_of, unpad, whole_rows
from kimi_rl.learner.silent import rows_to_run
from kimi_rl.learner.trl_trainers import GRPOConfig, GRPOTrainer
from kimi_rl.model.flops import forward_cost
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.presets import bare_config
from kimi_rl.recipe import ModelSection, TokenizerSection
from kimi_rl.run_dir import describe_environment
from kimi_rl.tokenizer import build_tokenizer

# `off` leaves TRL's own method in place: the mixin then only calls it.
PATHS = {"padded": "off", "packed": "packed", "shared_prompt": "shared_prompt", "without_silent": "packed"}
STOCK = "stock"  # transformers' model class and TRL's trainer, both as they are
DEFAULT_PATHS = (STOCK, "padded", "packed", "shared_prompt")
NO_STOCK = "transformers calls fla's Triton kernels on any tensor where fla is installed, so this path needs a card"
SPREAD = 0.6  # standard deviation of the logarithm of completion lengths


class BenchTrainer(PackedLogps, GRPOTrainer):
    """TRL's trainer, fed ready batches."""

    skip_silent = False

    def rows_that_count(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        return rows_to_run(inputs["advantages"]) if self.skip_silent else None


def draw_lengths(count: int, mean: float, longest: int, spread: float, generator: torch.Generator) -> list[int]:
    """Log-normal lengths of this mean before they are cut to 1 .. `longest`."""
    logs = torch.randn(count, generator=generator) * spread + (math.log(mean) - spread**2 / 2)
    return logs.exp().round().clamp(1, longest).long().tolist()


def make_batch(
    *, groups: int, group_size: int, prompt_tokens: int, mean: float, longest: int, vocabulary: int, seed: int,
    effective: float = 1.0,
) -> dict[str, torch.Tensor]:
    """One rollout batch as TRL's trainer holds it, with random tokens: rows shuffled, prompts padded on the left.

    `effective`: the share of groups with advantages other than zero.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = groups * group_size
    prompts = draw_lengths(groups, prompt_tokens, 4 * prompt_tokens, SPREAD / 2, generator)
    completions = draw_lengths(rows, mean, longest, SPREAD, generator)
    left, right = max(prompts), max(completions)
    prompt_ids = torch.randint(10, vocabulary, (groups, left), generator=generator).repeat_interleave(group_size, 0)
    prompt_mask = torch.arange(left) >= left - torch.tensor(prompts).repeat_interleave(group_size)[:, None]
    mask = torch.arange(right) < torch.tensor(completions)[:, None]
    ids = torch.randint(10, vocabulary, (rows, right), generator=generator)
    order = torch.randperm(rows, generator=generator)
    speak = torch.arange(groups).repeat_interleave(group_size)[order] < round(effective * groups)
    return {
        "prompt_ids": (prompt_ids * prompt_mask)[order],
        "prompt_mask": prompt_mask[order].long(),
        "completion_ids": (ids * mask)[order],
        "completion_mask": mask[order].long(),
        "advantages": torch.randn(rows, generator=generator) * speak,
        "num_items_in_batch": mask.sum().float(),
    }


def split(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of `rows` rows."""
    total = len(batch["prompt_ids"])
    return [
        {name: x[start : start + rows] if x.ndim else x for name, x in batch.items()}
        for start in range(0, total, rows)
    ]


def bench_learner(
    *,
    size: str = "base",
    arch: str = "hybrid",
    mlp: str = "dense",
    vocabulary: int = 32768,
    groups: int = 8,
    group_size: int = 16,
    micro_batch_size: int = 16,
    prompt_tokens: int = 100,
    mean: float = 300,
    longest: int = 2048,
    pack_tokens: int = 16384,
    steps: int = 5,
    seed: int = 0,
    effective_share: float = 1.0,
    paths: Sequence[str] = DEFAULT_PATHS,
) -> dict[str, Any]:
    """Time optimizer steps (forward, backward, AdamW) of one batch by each path.

    Each of `paths` gets the same rows in micro-batches of `micro_batch_size`; with shared prompts groups stand
    together. `stock` is what a user of TRL has: `trl.GRPOTrainer` with its own settings on transformers' own
    `KimiLinearForCausalLM`; on a card alone. The others are our trainer and model, in turns; `padded` differs from
    `packed` by padding alone, and `without_silent` by leaving out completions without an advantage: those of all groups
    but `effective_share`.

    Returns:
        `paths`, by name: `step_s` (median over `steps`, after untimed ones), `tokens_per_s` of real tokens (prompts
        counted once a sample whatever the path), `mfu` (3 forwards of the tokens that must be run, over the measured
        peak of a matrix product), `grad_norm`, `first_step_s` (with what it compiles), and memory: on a card the
        allocator's peak, weights and optimizer included, and beside it `card_s`, `launches` and `kernels` of one step
        (see `card_work`); on a CPU the bytes kept for the backward of the largest micro-batch. `left_out`: why a path
        was not run. `ratios` of tokens/s, of the median and of the best steps (other load on the machine only ever
        adds time), and of memory; `shape`, `peak_flops`, and the environment.
    """
    if micro_batch_size < 1 or groups * group_size % micro_batch_size:
        raise InputError(
            f"--micro-batch-size: {micro_batch_size} must divide groups x group size = {groups * group_size}"
        )
    for name in paths:
        if name not in (STOCK, *PATHS):
            raise InputError(f"--paths: found {name!r}; use {', '.join((STOCK, *PATHS))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    section = ModelSection(size=size, arch=arch, mlp=mlp)
    config = bare_config(section, vocabulary)
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(config)
    batch = make_batch(
        groups=groups, group_size=group_size, prompt_tokens=prompt_tokens, mean=mean, longest=longest,
        vocabulary=vocabulary, seed=seed, effective=effective_share,
    )  # fmt: skip
    micro_batches = split(batch, micro_batch_size)
    samples = [_samples(part) for part in micro_batches]
    regrouped = regroup(micro_batches)
    shared_samples = [_samples(part) for part in regrouped]
    cost = forward_cost(config)
    flops = {
        "padded": 3 * sum(cost_of(part, cost, False) for part in samples),
        "shared_prompt": 3 * sum(cost_of(part, cost, True) for part in shared_samples),
    }
    flops["packed"] = flops[STOCK] = flops["padded"]
    run_of = [rows_to_run(part["advantages"]) for part in micro_batches]
    spoken = [[s for s in part if run[s.row]] for part, run in zip(samples, run_of, strict=True)]
    flops["without_silent"] = 3 * sum(cost_of(part, cost, False) for part in spoken)
    tokens = sum(tokens_of(part, False) for part in samples)
    batches = dict.fromkeys((STOCK, *PATHS), micro_batches) | {"shared_prompt": regrouped}
    run = functools.partial(
        _timed, batches=batches, pack_tokens=pack_tokens, group_size=group_size, steps=steps, device=device
    )
    timings: dict[str, _Timing] = {}
    left_out = {name: "not asked for" for name in (STOCK, *PATHS) if name not in paths}
    if STOCK in paths and device == "cpu":
        left_out[STOCK] = NO_STOCK
    elif STOCK in paths:  # first, and alone on the card: its memory is its own
        stock = transformers.KimiLinearForCausalLM(config)
        stock.load_state_dict(model.state_dict())
        try:
            timings |= run(stock, GRPOTrainer, [STOCK])
        except torch.OutOfMemoryError as error:
            left_out[STOCK] = one_line(error, 200)
        del stock
        gc.collect()
        torch.cuda.empty_cache()
    if ours := [name for name in PATHS if name in paths]:
        timings |= run(model, BenchTrainer, ours)
    if not timings:
        raise RunError(f"no path was timed: {left_out}")
    peak = matmul_peak(device)
    best = {name: min(timing.seconds) for name, timing in timings.items()}
    middle = {name: median(timing.seconds) for name, timing in timings.items()}
    memory = {name: timing.memory for name, timing in timings.items()}
    figures = {
        name: {
            "step_s": middle[name],
            "best_step_s": best[name],
            "first_step_s": timing.first,
            "tokens_per_s": tokens / middle[name],
            "mfu": flops[name] / middle[name] / peak,
            "flops": flops[name],
            "memory_bytes": timing.memory,
            "grad_norm": timing.grad_norm,
            "all_step_s": timing.seconds,
            **timing.work,
        }
        for name, timing in timings.items()
    }
    padded_tokens = sum(part["prompt_ids"].numel() + part["completion_ids"].numel() for part in micro_batches)
    return {
        "benchmark": "learner",
        "model": {"size": size, "arch": arch, "mlp": mlp, "vocabulary": vocabulary,
                  "parameters": sum(p.numel() for p in model.parameters())},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": "fp32 weights, bf16 autocast" if device == "cuda" else "fp32",
        "fla_installed": fla_installed(),
        "threads": torch.get_num_threads(),
        "shape": {
            "groups": groups, "group_size": group_size, "micro_batch_size": micro_batch_size,
            "prompt_tokens": prompt_tokens, "completion_mean": mean, "completion_longest": longest,
            "pack_tokens": pack_tokens, "seed": seed, "steps": steps, "effective_share": effective_share,
            "real_tokens": tokens,
            "padded_tokens": padded_tokens,
            "tokens_with_shared_prompts": sum(tokens_of(part, True) for part in shared_samples),
        },
        "memory_is": "peak allocated" if device == "cuda" else "kept for the backward of the largest micro-batch",
        "peak_flops": peak,
        "paths": figures,
        "left_out": left_out,
        "ratios": _ratios(middle),
        "ratios_of_best": _ratios(best),
        "memory_ratios": _ratios(memory),
        "environment": describe_environment(),
    }  # fmt: skip


@dataclass
class _Timing:
    """Of one path: seconds of the first step and of the timed ones, bytes, the norm of the gradient, and what the card
    does in a step (see `card_work`)."""

    first: float
    memory: int
    grad_norm: float
    seconds: list[float] = field(default_factory=list)
    work: dict[str, Any] = field(default_factory=dict)


def _timed(
    model: torch.nn.Module, trainer_class: type, names: list[str], *, batches: dict[str, list[dict[str, torch.Tensor]]],
    pack_tokens: int, group_size: int, steps: int, device: str,
) -> dict[str, _Timing]:  # fmt: skip
    """Steps of these paths, in turns, by one trainer on one model."""
    model.to(device)
    on_device = {name: [{k: v.to(device) for k, v in part.items()} for part in batches[name]] for name in names}
    count, rows = len(batches[names[0]]), len(batches[names[0]][0]["prompt_ids"])
    found: dict[str, _Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(trainer_class, model, folder, count, rows, group_size, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step(name: str) -> float:
            """One optimizer step; the norm of its gradient."""
            if name in PATHS:
                trainer.packing = PackingSettings(PATHS[name], pack_tokens)
                trainer.skip_silent = name == "without_silent"
                if PATHS[name] != "off":  # as the trainer does with a new rollout batch
                    trainer.copy_to_host(on_device[name])
            model.train()
            for part in on_device[name]:
                trainer.accelerator.backward(trainer.compute_loss(model, part))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(norm)

        for name in names:  # untimed: compiles, fills caches, makes the optimizer's state, and measures memory
            first, (memory, norm) = _clocked(lambda name=name: memory_of(lambda: step(name), model, device), device)
            found[name] = _Timing(first, memory, norm)
        if device == "cuda":  # again, with the optimizer's state in place on every path
            for name in names:
                found[name].memory, _ = memory_of(lambda name=name: step(name), model, device)
        for _ in range(steps):
            for name in names:
                found[name].seconds.append(_clocked(lambda name=name: step(name), device)[0])
        if device == "cuda":
            for name in names:
                found[name].work = card_work(lambda name=name: step(name))
    return found


def _clocked(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    _finish(device)
    start = time.perf_counter()
    result = run()
    _finish(device)
    return time.perf_counter() - start, result


def _ratios(costs: dict[str, float]) -> dict[str, float]:
    """What the second path of each name costs over what the first does: how many times as good the first is."""
    pairs = [(a, b) for a in ("packed", "shared_prompt") for b in (STOCK, "padded")] + [("shared_prompt", "packed")]
    pairs += [("without_silent", "packed")]
    return {f"{a} / {b}": costs[b] / costs[a] for a, b in pairs if a in costs and b in costs}


def _samples(part: dict[str, torch.Tensor]):
    return unpad(*whole_rows(part))


def make_trainer(
    kind: type, model, folder: str, micro_batches: int, rows: int, group_size: int, device: str, **options: Any
) -> Any:
    """A trainer of this kind that is fed ready micro-batches; `options` are GRPOConfig's."""
    args = GRPOConfig(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        num_generations=group_size,
        beta=0.0,
        cast_lm_head_to_fp32=kind is BenchTrainer and device == "cuda",  # as our stage does; TRL's default is not
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        report_to="none",
        disable_tqdm=True,
        **({"loss_type": "dapo"} | options),
    )
    trainer = kind(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "unused"}]),
        processing_class=build_tokenizer(TokenizerSection(), []),
    )
    trainer.current_gradient_accumulation_steps = micro_batches  # TRL's training loop sets it
    return trainer


def memory_of(step: Callable[[], float], model: torch.nn.Module, device: str) -> tuple[int, float]:
    """Memory of one step (see `bench_learner`), and what the step returns."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        result = step()
        return torch.cuda.max_memory_allocated(), result
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    largest = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def use(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, sum(kept.values()))  # the backward begins: nothing more is added to this micro-batch
        kept.clear()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, use):
        result = step()
    return largest, result


def matmul_peak(device: str) -> float:
    """Operations a second of a large matrix product, best of 10: bf16 on a card, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        _finish(device)
        start = time.perf_counter()
        a @ b
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
