"""Create, load and save models and their tokenizers."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, KimiLinearConfig, PreTrainedTokenizerBase

from kimi_rl.errors import InputError, one_line
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.model.presets import build_config, complete_config
from kimi_rl.recipe import ModelSection

SHARD_BYTES = 4 * 1024**3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def create_model(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> KimiLinearForCausalLM:
    """A model with random weights, in float32 on the CPU; the same arguments give the same weights."""
    config = build_config(
        section,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KimiLinearForCausalLM(config)


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> KimiLinearForCausalLM:
    """Load a model from a folder or a hub id, in eval mode.

    `A_log`, `dt_bias`, the convolution and the router's bias are float32 whatever `dtype`. Raises
    `InputError` where there is no such model, where it is no Kimi Linear, or where tensors are missing or
    left over.
    """
    source = _source(path, needs="config.json")
    try:
        raw, _ = KimiLinearConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: cannot read {path}: {one_line(error, 300)}") from error
    if raw.get("model_type") != "kimi_linear":
        raise InputError(
            f"model.path: {path} has model_type {raw.get('model_type')!r}; a kimi_linear model is needed"
        )
    if (raw.get("linear_attn_config") or {}).get("gate_lower_bound") is not None:
        # vLLM would apply the bound and transformers would not: rollouts and gradients would disagree.
        raise InputError(
            f"model.path: {path} sets linear_attn_config.gate_lower_bound, which is not supported"
        )
    try:
        # Mismatches are "ignored" only to be reported below, by name.
        model, info = KimiLinearForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model.path: cannot load {path}: {one_line(error, 300)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info.get(what):
            raise InputError(
                f"model.path: {path} has {len(keys)} {what.replace('_', ' ')}, first {min(map(str, keys))}"
            )
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id. Raises `InputError` where there is none."""
    source = _source(path, needs="tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: no tokenizer in {path}: {one_line(error, 300)}") from error


def save_model(
    model: KimiLinearForCausalLM, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path
) -> Path:
    """Write `folder`: safetensors under checkpoint names, config.json, generation_config.json, tokenizer.

    transformers, vLLM and lm-eval load the result. The folder appears complete or not at all: everything is
    written beside it and renamed; a previous folder of that name is replaced.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        _write_config(model, new)
        _write_weights(model, new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _write_config(model: KimiLinearForCausalLM, folder: Path) -> None:
    complete_config(model.config)
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    # transformers writes `model_max_length`; vLLM reads `max_position_embeddings` and would assume 4096.
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["max_position_embeddings"] = config["model_max_length"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_weights(model: KimiLinearForCausalLM, folder: Path) -> None:
    """Safetensors under checkpoint names, in shards of about 4 GB with the usual index.

    Not `model.save_pretrained`: it would rename the feed-forward of dense layers too, to
    `block_sparse_moe.*`, which neither the published checkpoint nor vLLM knows.
    """
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    total = size = 0
    for name, tensor in to_checkpoint(model):
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        # safetensors refuses tensors that share storage, as views of a fused parameter do: hence the copies.
        save_file({n: t.to("cpu", copy=True).contiguous() for n, t in shard}, folder / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _source(path: str | Path, *, needs: str) -> str:
    """`path` as a folder that has the file `needs`, or as a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / needs).is_file():
            raise InputError(f"model.path: {path} has no {needs}; give a Hugging Face folder or a hub id")
        return str(folder)
    if not _HUB_ID.fullmatch(str(path)):
        raise InputError(f"model.path: {path} is neither a folder nor a hub id like owner/name")
    return str(path)
