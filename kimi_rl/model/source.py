"""Plain transformers that are not trained here: what a model is converted from, what it learns from.

A source is a folder in Hugging Face layout, a hub id, a GGUF file, or a folder that holds one GGUF file.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from kimi_rl.errors import InputError, one_line

# Softmax attention in every layer, through transformers' attention interface, and nothing else that mixes tokens.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_source_config(path: str, where: str) -> PreTrainedConfig:
    """The configuration of a source; loads no weights. `where` (a field of the recipe) opens the message of errors.

    Raises InputError where there is no such model, or one of another family than `FAMILIES`.
    """
    source, gguf = _locate(path, where)
    try:
        config = AutoConfig.from_pretrained(source, **gguf)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{where}: cannot read {path}: {one_line(error, 300)}") from error
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{where}: {path} has model_type {config.model_type!r}; known are {', '.join(FAMILIES)}"
        )
    return config


def is_source(path: str) -> bool:
    """Whether `path` is such a model, by its configuration; False where nothing can be read."""
    place = Path(path).expanduser()
    if is_gguf(path):
        return True
    if place.is_dir() and not (place / "config.json").is_file():
        return False
    try:
        raw, _ = PreTrainedConfig.get_config_dict(str(place) if place.is_dir() else path)
    except (OSError, ValueError):
        return False
    return raw.get("model_type") in FAMILIES


def is_gguf(path: str) -> bool:
    """Whether `path` is a GGUF file, or a folder that holds one and no model in Hugging Face layout."""
    place = Path(path).expanduser()
    if place.is_dir():
        return not (place / "config.json").is_file() and any(place.glob("*.gguf"))
    return place.is_file() and place.suffix == ".gguf"


def export_source(path: str, where: str, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model of a source to `folder` in Hugging Face layout, without its tokenizer; for engines that read
    nothing else. A GGUF file's weights come out of their quantisation in `dtype`."""
    load_source(path, where, dtype=dtype, device="cpu").save_pretrained(folder)


def load_source(
    path: str, where: str, *, dtype: torch.dtype, device: str | torch.device, attention: str = "sdpa"
) -> PreTrainedModel:
    """The model of a source, in eval mode and without gradients. `attention`: a name in transformers' interface."""
    read_source_config(path, where)
    source, gguf = _locate(path, where)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention, **gguf)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"{where}: cannot load {path}: {one_line(error, 300)}") from error
    if gguf:
        forget_quantization(model)
    return model.to(device).eval().requires_grad_(False)


def forget_quantization(model: PreTrainedModel) -> None:
    """For weights of a GGUF file, which are plain by now: transformers would still refuse to save or to train them."""
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def load_source_tokenizer(path: str, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a source. Raises InputError where there is none."""
    source, gguf = _locate(path, where)
    try:
        return AutoTokenizer.from_pretrained(source, **gguf)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{where}: no tokenizer in {path}: {one_line(error, 300)}") from error


def _locate(path: str, where: str) -> tuple[str, dict[str, str]]:
    """Where `from_pretrained` finds the source, and `gguf_file` if it is one."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix != ".gguf":
            raise InputError(f"{where}: {path} is a file; give a folder, a hub id or a .gguf file")
        return _gguf(place, where)
    if place.is_dir():
        if (place / "config.json").is_file():
            return str(place), {}
        found = sorted(place.glob("*.gguf"))
        if len(found) != 1:
            raise InputError(
                f"{where}: {path} has no config.json and {len(found) or 'no'} .gguf file{'s' * (len(found) != 1)}; "
                "give a folder in Hugging Face layout or one .gguf file"
            )
        return _gguf(found[0], where)
    if not _HUB_ID.fullmatch(path):
        raise InputError(f"{where}: {path} is neither a folder, a .gguf file nor a hub id like owner/name")
    return path, {}


def _gguf(file: Path, where: str) -> tuple[str, dict[str, str]]:
    if find_spec("gguf") is None:
        raise InputError(f"{where}: {file} needs the package gguf; run `pip install gguf`")
    return str(file.parent), {"gguf_file": file.name}
