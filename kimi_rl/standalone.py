"""Commands that need no run: evaluate a model, generate from a file, judge answers. One process, no Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_rl.errors import InputError

if TYPE_CHECKING:
    from kimi_rl.rollout.engine import RolloutEngine

ENGINES = ("auto", "transformers", "vllm")


def _open(model: str, engine: str, *, longest: int, seed: int, policy_version: int = 0):
    import torch
    from transformers.utils import logging

    from kimi_rl.rollout.worker import build_engine

    logging.disable_progress_bar()

    torch.set_num_threads(os.cpu_count() or 1)
    return build_engine(
        engine,
        model,
        batch_size=128,
        max_model_len=longest,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        engine_args={},
        policy_version=policy_version,
    )


def check_engine(model: str, engine: str) -> None:
    """Raises InputError on an unknown engine or a folder that holds no model."""
    from kimi_rl.model.source import is_gguf
    from kimi_rl.pipeline import check_model_folder

    if engine not in ENGINES:
        raise InputError(f"--engine: unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if not is_gguf(model):
        check_model_folder(model)


def _tokenizer(model: str):
    """The tokenizer of a model, or of a plain transformer (`kimi_rl.model.source`)."""
    from kimi_rl.model.load_save import load_tokenizer
    from kimi_rl.model.source import is_source, load_source_tokenizer

    return load_source_tokenizer(model, "model") if is_source(model) else load_tokenizer(model)


def parse_engine_args(pairs: list[str]) -> dict[str, Any]:
    """`key=value` arguments of the engine; values are read as YAML."""
    import yaml

    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--engine-arg: expected KEY=VALUE, found {pair!r}")
        values[key] = yaml.safe_load(value)
    return values


def _data_section(data: str | None, overrides: list[str], where: str):
    """The `data` section of a recipe from a name on the command line (a task, or else a path) and overrides."""
    from kimi_rl.dataset.tasks import is_task
    from kimi_rl.recipe_load import parse_recipe

    if data is not None:
        overrides = [f"data.{'task' if is_task(data) else 'path'}={data}", *overrides]
    return parse_recipe("data: {}\nstages: [{kind: sft, steps: 1}]", overrides, where=where).data


def evaluate_model(
    model: str,
    data: str | None,
    overrides: list[str],
    *,
    limit: int | None,
    k: int,
    temperature: float,
    max_tokens: int,
    engine: str | RolloutEngine,
    seed: int,
    verifiers: int = 1,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and one record per problem (see `kimi_rl.evaluate`).

    `engine`: the name of one to open, or an open one that holds `model`, which stays open. `verifiers`: processes that
    judge answers.

    The figures state what was asked: `instruction`, appended to every question, and `prompt_example`, the whole first
    prompt with the chat template's marks. `dropped` names problems that were left out.
    """
    from kimi_rl.dataset import load_problems
    from kimi_rl.evaluate import evaluate
    from kimi_rl.recipe import EvalSection, RewardSection
    from kimi_rl.rewards import VerifierPool
    from kimi_rl.tokenizer import prompt_ids

    if isinstance(engine, str):
        check_engine(model, engine)
    if data is None and not overrides:
        raise InputError("eval: which problems? Give --data NAME, or data.task=... or data.path=...")
    section = _data_section(data, overrides, "eval")
    problems = load_problems(section, evaluation=True)
    tokenizer = _tokenizer(model)
    rows = problems.held_out
    prompts = [prompt_ids(tokenizer, messages) for messages in rows["prompt"]]
    longest = max(map(len, prompts)) + max_tokens + 1
    loaded = _open(model, engine, longest=longest, seed=seed) if isinstance(engine, str) else engine
    reward = RewardSection()
    with VerifierPool(workers=verifiers, deadline_s=reward.deadline_s) as verifier:
        figures, records = evaluate(
            loaded.generate,
            lambda pairs: verifier.verify_many(list(pairs), kind=problems.answer_kind, extract=tuple(reward.extract)),
            prompts,
            list(rows["answer"]),
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            EvalSection(limit=limit, k=k, temperature=temperature),
            max_tokens=max_tokens,
            seed=seed,
        )
    if loaded is not engine:
        loaded.close()
    for record, row_id, question in zip(records, rows["id"], rows["question"], strict=False):
        record["id"], record["question"] = row_id, question
    stated = {
        "model": model,
        "data": problems.name,
        "answer_kind": problems.answer_kind,
        "instruction": problems.instruction,
        "prompt_example": tokenizer.decode(prompts[0]),
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": seed,
        "dropped": list(problems.dropped),
    }
    return {**stated, **figures.row()}, records


def select_problems(
    model: str,
    data: str,
    overrides: list[str],
    *,
    k: int,
    low: float,
    high: float,
    out: Path,
    temperature: float,
    max_tokens: int,
    engine: str,
    kind: str,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Score the training problems by the model's pass rate, write the kept ones to `out` (see `kimi_rl.select`).

    `kind`: `auto`, or a kind of `kimi_rl.rewards`. `progress(done, of)` is called now and then. Returns the counts.
    """
    from kimi_rl import rewards
    from kimi_rl.dataset import load_problems
    from kimi_rl.recipe import RewardSection
    from kimi_rl.rollout.engine import SamplingParams
    from kimi_rl.select import check_bounds, pass_rates, write_selection
    from kimi_rl.tokenizer import prompt_ids

    check_bounds(k, low, high)
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out: cannot write {out}; name a file in a folder that exists and can be written to")
    if kind != "auto":
        rewards.check_kind(kind)
    check_engine(model, engine)
    problems = load_problems(_data_section(data, overrides, "select"))
    tokenizer = _tokenizer(model)
    rows = list(problems.train)
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    loaded = _open(model, engine, longest=max(map(len, prompts)) + max_tokens + 1, seed=seed)
    reward = RewardSection()
    wanted = problems.answer_kind if kind == "auto" else kind
    with rewards.VerifierPool(workers=1, deadline_s=reward.deadline_s) as verifier:
        rates = pass_rates(
            loaded.generate,
            lambda pairs: verifier.verify_many(list(pairs), kind=wanted, extract=tuple(reward.extract)),
            prompts,
            [row["answer"] for row in rows],
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            k=k,
            params=SamplingParams(max_tokens, temperature=temperature),
            seed=seed,
            progress=lambda done: progress(done, len(rows)),
        )
    loaded.close()
    counts = asdict(write_selection(rows, rates, low, high, out))
    settings = {"k": k, "low": low, "high": high, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    return {"model": model, "data": problems.name, "out": str(out), **settings, **counts}


def generate_from_file(
    model: str, prompts: Path, *, engine: str, temperature: float, top_p: float, max_tokens: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One answer a row of `prompts`: prompt_ids, token_ids, logprobs, text, finish_reason."""
    from kimi_rl.dataset.files import read_json_lines  # not at the top: it brings `datasets` along
    from kimi_rl.rollout.engine import Request, SamplingParams
    from kimi_rl.seeds import derive_seed
    from kimi_rl.tokenizer import prompt_ids

    check_engine(model, engine)
    rows = read_json_lines(prompts)
    for number, row in enumerate(rows, 1):
        ids, text = row.get("prompt_ids"), row.get("prompt")
        if isinstance(text, str) == (ids is not None):
            raise InputError(f"{prompts}, row {number}: needs exactly one of `prompt` (text) and `prompt_ids`")
        if ids is not None and not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
            raise InputError(f"{prompts}, row {number}: `prompt_ids` must be a list of token ids, found {ids!r:.80}")
    tokenizer = _tokenizer(model)
    vocabulary = len(tokenizer)
    requests = []
    for number, row in enumerate(rows):
        ids = row.get("prompt_ids")
        if ids is None:
            ids = prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}])
        elif max(ids) >= vocabulary:
            raise InputError(
                f"{prompts}, row {number + 1}: token id {max(ids)} is outside the vocabulary of {vocabulary}"
            )
        requests.append(Request(list(ids), derive_seed(seed, "generate", number)))
    longest = max(len(r.prompt_ids) for r in requests) + max_tokens + 1
    loaded = _open(model, engine, longest=longest, seed=seed)
    completions = loaded.generate(requests, SamplingParams(max_tokens, temperature, top_p))
    loaded.close()
    for request, completion in zip(requests, completions, strict=True):
        yield {
            "prompt_ids": list(request.prompt_ids),
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "text": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            "finish_reason": completion.finish_reason,
        }


def verify_cases(
    *, gold: str | None, answer: str | None, completion: str | None, cases: Path | None, kind: str
) -> list[dict[str, Any]]:
    """Verdicts as rows with value, status, parsed and reason."""
    from kimi_rl import rewards

    rewards.check_kind(kind)
    if cases is not None:
        from kimi_rl.dataset.files import read_json_lines

        rows, where = read_json_lines(cases), f"{cases}, "
    else:
        given = {"gold": gold, "answer": answer, "completion": completion}
        rows, where = [{key: value for key, value in given.items() if value is not None}], ""
    try:
        verdicts = rewards.verify_cases(rows, kind=kind, extract=("boxed", "hash", "answer"))
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return [{"value": v.value, "status": v.status, "parsed": v.parsed, "reason": v.reason} for v in verdicts]
