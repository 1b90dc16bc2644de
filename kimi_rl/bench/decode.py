"""`kimi-rl bench decode`: time per output token and prefill time against context length, with the memory floor."""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import KimiLinearConfig

from kimi_rl.errors import InputError, RunError, one_line
from kimi_rl.model.cost import sequence_bytes
from kimi_rl.model.load_save import create_model, save_model
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.presets import SIZES, bare_config, describe
from kimi_rl.recipe import ModelSection, TokenizerSection
from kimi_rl.rollout.engine import Request, RolloutEngine, SamplingParams
from kimi_rl.rollout.worker import build_engine, resolve_engine
from kimi_rl.run_dir import describe_environment
from kimi_rl.seeds import derive_seed
from kimi_rl.tokenizer import build_tokenizer

_FREE = 10  # tokens from which random prompts are drawn: neither the first nor the last ids of the vocabulary
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # beyond every cache


def bench_decode(
    models: Mapping[str, str],
    *,
    context: Sequence[int],
    tokens: int = 32,
    repeats: int = 3,
    batch: int = 1,
    engine: str = "auto",
    seed: int = 0,
    engine_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Time models on random prompts of `context` tokens, through the real engine (vLLM on a GPU: bf16, CUDA graphs).

    `models`: name -> checkpoint folder, or `arch:size` of a preset (`hybrid:large`) with random weights. Prefill time
    is a call that generates one token; time per output token is what each of `tokens` more adds to a call with `lead`
    tokens after the first. Both are the best of `repeats`, since other work on the machine only ever adds; one call of
    each warms up. `lead` is 0 for one sequence and `tokens` for more: vLLM reads long prompts one after another, and
    the first sequences decode in the same steps. Those steps are in both calls as long as `tokens` is at least their
    number, all prompts' tokens over vLLM's max_num_batched_tokens. End-of-sequence tokens do not stop these calls, and
    since the layers have no positions, a model is timed beyond its max_position_embeddings.

    Returns:
        `models`: name, parameters, and `rows` by context: `prefill_s` and `token_s`, with the seconds of every repeat
        (`one_token_s`, `lead_tokens_s`, `all_tokens_s`), `tokens_per_s` of the batch, `floor_s` and what it is made of:
        `weight_bytes` that one token uses, `kv_bytes` read, and `state_bytes`, read and written, of the batch, over
        `copy_bytes_per_s`, the measured speed of a copy on the device (bytes read plus written). A context that does
        not fit gets an `error` in place of figures.
    """
    for length in context:
        if length < 1:
            raise InputError(f"--context: found {length}, expected token counts of at least 1")
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = resolve_engine(engine)
    if name == "vllm" and device == "cuda":
        # Nothing else is on the card.
        engine_args = {"gpu_memory_utilization": 0.88} | (engine_args or {})
    bandwidth = copy_bandwidth(device)
    more = lead_tokens(tokens, batch) + tokens + 2
    figures = []
    for label, source in models.items():
        with timed_folder(source, max(context) + more) as folder:
            config = KimiLinearConfig.from_pretrained(folder)
            make = partial(
                build_engine, name, str(folder), batch_size=batch, seed=seed, device=device,
                engine_args=engine_args or {}, policy_version=0,
            )  # fmt: skip
            loaded, fitting, rows = load_longest(make, sorted(context), more)
            try:
                measured = [
                    _row(loaded, config, name, device, bandwidth, length, tokens, repeats, batch, seed)
                    for length in fitting
                ]
            finally:
                loaded.close()
            rows = measured + rows
            del loaded
            if device == "cuda":
                torch.cuda.empty_cache()
        figures.append(
            {"name": label, "model": source, "parameters": describe(config)["total"],
             "layers": list(config.layer_types), "rows": rows}
        )  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "engine": name,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "tokens": tokens,
        "lead": lead_tokens(tokens, batch),
        "repeats": repeats,
        "copy_bytes_per_s": bandwidth,
        "models": figures,
        "environment": describe_environment(),
    }


def load_longest(
    make: Callable[..., RolloutEngine], context: Sequence[int], more: int
) -> tuple[RolloutEngine, list[int], list[dict[str, Any]]]:
    """An engine for the longest of the rising `context` lengths, plus `more` tokens, whose cache the device holds.

    Returns it with the lengths that fit, and an `error` row for each that does not. Raises RunError where none fits.
    """
    refused: list[dict[str, Any]] = []
    for count in range(len(context), 0, -1):
        try:
            return make(max_model_len=context[count - 1] + more), list(context[:count]), refused
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:  # what vLLM raises where the cache does not fit
            refused.insert(0, {"context": context[count - 1], "error": one_line(error, 200)})
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    raise RunError(f"the engine does not start even at {context[0]} tokens: {refused[0]['error']}")


def parse_models(sources: Sequence[str]) -> dict[str, str]:
    """Command-line models, `[NAME=]FOLDER` or `[NAME=]ARCH:SIZE`, by name. Raises InputError, before anything loads."""
    models: dict[str, str] = {}
    for text in sources:
        label, equals, source = text.partition("=")
        if not equals:
            label = source = text
        if label in models:
            raise InputError(f"MODEL: {label!r} is given twice; name them apart: NAME={source}")
        if not preset_of(source) and not (Path(source) / "config.json").is_file():
            raise InputError(
                f"MODEL {source}: no config.json in it; give a model folder, or ARCH:SIZE of a preset "
                f"(hybrid or mla; {', '.join(SIZES)})"
            )
        models[label] = source
    return models


def preset_of(source: str) -> tuple[str, str] | None:
    """(arch, size) of `hybrid:large`; None where `source` is something else."""
    arch, _, size = source.partition(":")
    return (arch, size) if arch in ("hybrid", "mla") and size in SIZES else None


@contextlib.contextmanager
def timed_folder(source: str, longest: int, vocabulary: int | None = None) -> Iterator[Path]:
    """A folder with the model's weights and a configuration without end-of-sequence token or length limit.

    `vocabulary`: a preset's; unset: that of the tokenizer of bytes.
    """
    with tempfile.TemporaryDirectory(prefix="kimi_rl_decode_") as temp:
        folder = Path(temp) / "timed"
        original = Path(source)
        preset = preset_of(source)
        if preset:
            original = Path(temp) / "preset"
            section = ModelSection(arch=preset[0], size=preset[1])
            if vocabulary is None:
                model = create_model(section, build_tokenizer(TokenizerSection(), []), 0)
            else:
                torch.manual_seed(0)
                model = KimiLinearForCausalLM(bare_config(section, vocabulary))
            save_model(model, None, original)
            del model
        folder.mkdir()
        for file in original.iterdir():
            if file.suffix in (".safetensors", ".json") and file.name not in ("config.json", "generation_config.json"):
                (folder / file.name).symlink_to(file.resolve())
        config = json.loads((original / "config.json").read_text(encoding="utf-8"))
        config["eos_token_id"] = []
        for key in ("max_position_embeddings", "model_max_length"):
            if key in config:
                config[key] = max(config[key], longest)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def _row(
    engine: RolloutEngine, config: KimiLinearConfig, name: str, device: str, bandwidth: float, length: int,
    tokens: int, repeats: int, batch: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    low, high = _FREE, config.vocab_size - _FREE
    generator = torch.Generator().manual_seed(derive_seed(seed, "decode", length))
    prompts = torch.randint(low, high, (batch, length), generator=generator).tolist()
    requests = [Request(prompt, derive_seed(seed, "decode", length, i)) for i, prompt in enumerate(prompts)]
    lead = lead_tokens(tokens, batch)
    one: list[float] = []
    short: list[float] = []
    more: list[float] = []
    try:
        for _ in range(repeats + 1):
            one.append(_time(engine, requests, 1))
            short.append(_time(engine, requests, lead + 1) if lead else one[-1])
            more.append(_time(engine, requests, lead + tokens + 1))
    except (torch.OutOfMemoryError, InputError) as error:
        return {"context": length, "error": one_line(error, 200)}
    # The first of each warms up: kernels are compiled, memory is mapped.
    prefill, token = min(one[1:]), (min(more[1:]) - min(short[1:])) / tokens
    times = {"one_token_s": one[1:], "lead_tokens_s": short[1:], "all_tokens_s": more[1:]}
    if token <= 0:
        return {"context": length, "error": "the tokens' time drowns in the prefill's noise; raise --tokens", **times}
    floor = memory_floor(config, length + lead + tokens // 2, batch, bfloat16=name == "vllm" and device == "cuda")
    return {
        "context": length,
        "prefill_s": prefill,
        "token_s": token,
        "tokens_per_s": batch / token,
        "floor_s": sum(floor.values()) / bandwidth,
        **floor,
        **times,
    }


def lead_tokens(tokens: int, batch: int) -> int:
    """Tokens after the first that come before those timed: in them a batch may still be reading prompts."""
    return tokens if batch > 1 else 0


def _time(engine: RolloutEngine, requests: Sequence[Request], tokens: int) -> float:
    start = time.perf_counter()
    answers = engine.generate(requests, SamplingParams(tokens))
    seconds = time.perf_counter() - start  # the answers are on the host: the device has finished
    for answer in answers:
        if len(answer.token_ids) != tokens:
            raise RunError(f"the engine stopped after {len(answer.token_ids)} of {tokens} tokens: no timing")
    return seconds


def memory_floor(config: KimiLinearConfig, length: int, batch: int, *, bfloat16: bool) -> dict[str, int]:
    """Bytes that one decoding step of `batch` sequences of `length` tokens must move at least.

    Weights are those that one token uses, once a step, without the input embedding (of a mixture of experts a batch
    reads more); the KV latents are read, the recurrent states and convolution tails read and written.
    """
    size = 2 if bfloat16 else 4
    one = sequence_bytes(config, length, cache_bytes=size)
    used = describe(config)["active"] - config.vocab_size * config.hidden_size
    return {
        "weight_bytes": used * size,
        "kv_bytes": batch * one.kv,
        "state_bytes": 2 * batch * (one.state + one.conv),
    }


def copy_bandwidth(device: str) -> float:
    """Bytes read plus written per second of a copy of memory on `device`, beyond its caches: the best of 5."""
    size = _COPY_BYTES[device]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = 0.0
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size / (time.perf_counter() - start))
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()  # the engine takes its share of what is free
    return best
