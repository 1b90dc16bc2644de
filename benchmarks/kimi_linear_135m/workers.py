"""The steps that are no command of kimi-rl, each a process of its own: source, check, probe, sample, score."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

from kimi_linear_135m.graph import RUN_RECIPE
from kimi_rl.recipe_load import dump_recipe, load_recipe

MOST_OF_A_CARD = 0.8  # that a distill stage may take at its peak
PROBE_STEPS = {"layers": 6, "logits": 12}
PROBE_TEXTS = 1500


def source(arguments: list[str]) -> None:
    """source SOURCE FOLDER: a hub id's or a GGUF file's model, once, as every later step loads it in a second."""
    import torch

    from kimi_rl.model.source import export_source, load_source_tokenizer
    from kimi_rl.run_dir import atomic_dir

    where, target = arguments
    with atomic_dir(Path(target)) as folder:
        export_source(where, "--source", folder, torch.float32)  # what it is converted from, to the last bit
        load_source_tokenizer(where, "--source").save_pretrained(folder)


def check(arguments: list[str]) -> None:
    """check RECIPE SET=DATA...: whether the recipe's data can be trained on, and the sets be scored on."""
    from kimi_rl.dataset import load_problems
    from kimi_rl.recipe import DataSection

    file, *sets = arguments
    recipe = load_recipe(Path(file))
    for section in (recipe.data, *(more for stage in recipe.stages for more in stage.more_data)):
        print(f"{section.path}: {len(load_problems(section).train)} problems", flush=True)
    for name, path in named_paths(sets).items():
        print(f"{name}: {len(load_problems(DataSection(path=path), evaluation=True).held_out)} problems", flush=True)


def open_engine(model: str, engine: str, longest: int, threads: int):
    """An engine as the runs have it, with more room; on a CPU for few sequences at once."""
    import torch
    from transformers.utils import logging

    from kimi_rl.rollout.worker import build_engine

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    rollout = load_recipe(RUN_RECIPE).stages[-1].rollout
    settings = rollout.engine_args | {"kv_cache_memory_bytes": 8_000_000_000}
    return build_engine(
        engine, model, batch_size=rollout.batch_size if cuda else 16, max_model_len=longest, seed=0,
        device="cuda" if cuda else "cpu", engine_args=settings if cuda else {}, policy_version=0,
    )  # fmt: skip


def named_paths(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


# --- probe ------------------------------------------------------------------------------------------------------


def probe(arguments: list[str]) -> None:
    """probe --source MODEL ARM...: seconds a step of both distill stages and their memory, as probes/ARM.json.

    The model has random weights and the shape of the conversion, which is being made meanwhile. A stage that takes too
    much of the card is tried with rows of half the size. Kernels are compiled on the way.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--source", required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)

    from kimi_rl.kernels.compile_cache import cache_environment, tuned_environment
    from kimi_rl.run_dir import atomic_write_text, gpu_names

    os.environ.update(cache_environment() | tuned_environment(gpu_names()))
    for arm in args.arms:
        folder = Path("probes") / arm
        shutil.rmtree(folder, ignore_errors=True)
        make_random_model(args.source, arm, folder / "model")
        kinds = [kind for kind in PROBE_STEPS if probe_recipe(kind, arm).is_file()]
        found = {kind: probe_stage(kind, arm, folder, args.threads) for kind in kinds}
        atomic_write_text(Path("probes") / f"{arm}.json", json.dumps(found, indent=1) + "\n")
        shutil.rmtree(folder)


def probe_recipe(kind: str, arm: str) -> Path:
    """The stage to probe, where there is to be one."""
    return Path("recipes") / f"probe_{kind}_{arm}.yaml"


def make_random_model(source: str, arm: str, folder: Path) -> None:
    import torch
    from transformers.utils import logging

    from kimi_rl.convert.conversion import choose_rank, parse_ratio, target_config
    from kimi_rl.model.load_save import save_model
    from kimi_rl.model.modeling import KimiLinearForCausalLM
    from kimi_rl.model.source import load_source_tokenizer, read_source_config

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config, tokenizer = read_source_config(source, "--source"), load_source_tokenizer(source, "--source")
    torch.manual_seed(0)
    config = target_config(config, tokenizer, parse_ratio(arm, None), choose_rank(config, None))
    model = KimiLinearForCausalLM(config)
    # transformers leaves the padding token's row at zero, and texts may begin with it: a zero is 300 times larger after
    # each norm's backward, which overflows within 30 layers of MLA.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.initializer_range)
    save_model(model, tokenizer, folder)


def probe_stage(kind: str, arm: str, folder: Path, threads: int) -> dict[str, Any] | None:
    """Figures of the largest rows that fit; None where nothing did."""
    import torch

    from kimi_rl.dataset import load_problems

    file = probe_recipe(kind, arm)
    steps = PROBE_STEPS[kind]
    plain = load_recipe(file)
    (stage,) = plain.stages
    few = []
    for where, data in [("data", plain.data), *((f"stages.0.more_data.{i}", d) for i, d in enumerate(stage.more_data))]:
        found = load_problems(data)
        few += [f"{where}.train_size={min(PROBE_TEXTS, len(found.train))}"]
        few += [f"{where}.held_out_size={min(8, len(found.held_out))}"]
    few += [f"model.path={folder}/model", f"stages.0.steps={min(steps, stage.steps)}", "stages.0.warmup_steps=1"]
    few += ["stages.0.log_every=1", "stages.0.perplexity_every=0", "stages.0.checkpoint_every=100"]
    pack = stage.pack_tokens
    while pack >= stage.max_length and stage.batch_tokens % pack == 0:
        try:
            recipe = load_recipe(file, [*few, f"stages.0.pack_tokens={pack}"])
            found = train_a_few(recipe, folder / f"{kind}_{pack}", threads)
            print(kind, arm, json.dumps(found), flush=True)
            total = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
            if total is None or found["peak_gib"] <= MOST_OF_A_CARD * total:
                return found
        except torch.OutOfMemoryError:
            traceback.print_exc(limit=1)
        print(f"{kind} {arm}: rows of {pack} tokens take too much memory", flush=True)
        pack //= 2
    return None


def train_a_few(recipe: Any, folder: Path, threads: int) -> dict[str, Any]:
    """A distill stage in this process; the median of the later half of its steps."""
    import torch

    from kimi_rl.learner.distill import run_distill
    from kimi_rl.learner.stage import StageContext, StageJob
    from kimi_rl.run_dir import RunDir

    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = RunDir.create(folder, dump_recipe(recipe))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.set_num_threads(threads)
    start, context = time.perf_counter(), None
    try:
        context = StageContext(StageJob(recipe, 0, str(folder), recipe.model.path, device, threads, resume=False))
        run_distill(context)
    finally:
        del context
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    rows = [row for row in run.read_metrics() if row["type"] == "train"]
    later = rows[len(rows) // 2 :]
    return {
        "step_s": statistics.median(row["step_s"] for row in later),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in later),
        "pack_tokens": recipe.stages[0].pack_tokens,
        "first_step_s": rows[0]["step_s"],
        "seconds": time.perf_counter() - start,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }


# --- sample -----------------------------------------------------------------------------------------------------


def sample(arguments: list[str]) -> None:
    """sample MODEL FILE NAME=DATA...: the model's solutions of training problems, until the seconds are over.

    First one solution of each problem of each set, then a second one of the first set's; of these those of --part. Rows
    are those of `kimi-rl generate --json`, less log-probs and text; the file is written anew after each chunk.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--part", default="0/1", help="I/N: of the solutions those with number I, I + N, I + 2N...")
    parser.add_argument("--skip", type=int, default=0, help="of the solutions, before they are divided")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--longest-prompt", type=int, default=600)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--engine", default="auto")
    args = parser.parse_args(arguments)

    from kimi_rl.dataset import load_problems
    from kimi_rl.model.source import load_source_tokenizer
    from kimi_rl.recipe import DataSection
    from kimi_rl.rollout.engine import Request, SamplingParams
    from kimi_rl.run_dir import atomic_write_text
    from kimi_rl.seeds import derive_seed
    from kimi_rl.tokenizer import prompt_ids

    tokenizer = load_source_tokenizer(args.model, "MODEL")
    asked: list[tuple[str, int, list[int]]] = []
    paths = named_paths(args.sets)
    for name, draw in [*((name, 0) for name in paths), (next(iter(paths)), 1)]:
        rows = load_problems(DataSection(path=paths[name], check_golds=False, overlap="leave_out")).train["prompt"]
        prompts = [prompt_ids(tokenizer, row) for row in rows]
        order = random.Random(draw).sample(range(len(prompts)), len(prompts))
        asked += [(f"{name}-{draw}", i, prompts[i]) for i in order if len(prompts[i]) <= args.longest_prompt]
    part, parts = map(int, args.part.split("/"))
    asked = asked[args.skip :][part::parts]
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    engine = open_engine(args.model, args.engine, args.longest_prompt + args.max_tokens + 1, threads)
    start, lines, tokens = time.perf_counter(), [], 0
    for place in range(0, len(asked), args.chunk):
        spent = time.perf_counter() - start
        if place and spent * (1 + args.chunk / place) > args.seconds:
            break  # the next chunk would not be ready in time
        chunk = asked[place : place + args.chunk]
        requests = [Request(ids, derive_seed(0, "sample", name, i)) for name, i, ids in chunk]
        found = engine.generate(requests, SamplingParams(args.max_tokens, temperature=args.temperature))
        for request, completion in zip(requests, found, strict=True):
            row = {"prompt_ids": list(request.prompt_ids), "token_ids": list(completion.token_ids)}
            lines.append(json.dumps(row | {"finish_reason": completion.finish_reason}) + "\n")
            tokens += len(completion.token_ids)
        atomic_write_text(args.file, "".join(lines))
        seconds = time.perf_counter() - start
        figures = {"rows": len(lines), "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
        atomic_write_text(args.file.with_suffix(".json"), json.dumps(figures) + "\n")
        print(json.dumps(figures), flush=True)
    engine.close()


# --- score ------------------------------------------------------------------------------------------------------


def score(arguments: list[str]) -> None:
    """score MODEL NAME SET=DATA...: what `kimi-rl eval` measures, as scores/NAME_SET.json, with one engine for all
    sets; a set that an earlier call scored is left out. Problems one by one: scores/NAME_SET.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--longest-prompt", type=int, default=1536)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)

    from kimi_rl.rollout.worker import resolve_engine
    from kimi_rl.run_dir import atomic_write_text, gpu_names
    from kimi_rl.standalone import evaluate_model

    sets = [(name, path, Path("scores") / f"{args.name}_{name}.json") for name, path in named_paths(args.sets).items()]
    missing = [row for row in sets if not row[2].is_file()]
    if not missing:
        return
    engine = open_engine(args.model, args.engine, args.longest_prompt + args.max_tokens, args.threads)
    for name, path, target in missing:
        start = time.perf_counter()
        figures, records = evaluate_model(
            args.model, path, [], limit=args.limit, k=args.k, temperature=1.0, max_tokens=args.max_tokens,
            engine=engine, seed=0, verifiers=min(6, args.threads),
        )  # fmt: skip
        more = ["--limit", str(args.limit)] if args.limit else []
        words = ["kimi-rl", "eval", args.model, "--data", path, "--k", args.k, "--max-tokens", args.max_tokens]
        equal = " ".join(map(str, [*words, "--engine", resolve_engine(args.engine), *more]))
        figures |= {"command": equal, "cards": gpu_names(), "seconds": time.perf_counter() - start}
        target.parent.mkdir(exist_ok=True)
        atomic_write_text(target.with_suffix(".jsonl"), "".join(json.dumps(record) + "\n" for record in records))
        atomic_write_text(target, json.dumps(figures, indent=2) + "\n")
        print(f"{name}: greedy {figures['held_out_accuracy']:.4f}, avg@{args.k} {figures.get('avg_at_k')}", flush=True)
    engine.close()
