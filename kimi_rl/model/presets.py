"""Models built from scratch: sizes, layer patterns, and their parameter counts.

Every size comes as `hybrid` (KDA, KDA, KDA, MLA, repeated) and `mla` (all MLA), with dense or
mixture-of-experts feed-forward layers. To compare the two fairly they must be equally large, so the
`intermediate_size` of any pattern other than the hybrid is set such that its total parameter count comes
closest to the hybrid's (steps of 16). Giving `intermediate_size` in `overrides` switches that off.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import KimiLinearConfig

from kimi_rl.errors import InputError, one_line
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.recipe import ModelSection, Recipe

# MLA head sizes of `small` and up are those of the released 48B model, for which GPU kernels exist.
_MLA_RELEASED = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

# Parameters without embeddings, dense hybrid: tiny 0.9M, small 23M, base 106M (173M with a 32,768
# vocabulary), large 318M. `describe` gives exact numbers.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 32,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "max_position_embeddings": 4096,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 128,
        **_MLA_RELEASED,
        "intermediate_size": 1024,
        "moe_intermediate_size": 320,
        "max_position_embeddings": 16384,
    },
    "base": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "linear_num_heads": 8,
        "linear_head_dim": 128,
        **_MLA_RELEASED,
        "intermediate_size": 2816,
        "moe_intermediate_size": 960,
        "max_position_embeddings": 32768,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "linear_num_heads": 8,
        "linear_head_dim": 128,
        **_MLA_RELEASED,
        "intermediate_size": 2816,
        "moe_intermediate_size": 960,
        "max_position_embeddings": 32768,
    },
}

# 2 of 8 experts and a shared one: a token uses three experts, about the width of one dense layer.
_MOE = {"num_local_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}

_STEP = 16  # granularity of an adjusted intermediate_size

# Fields of the configuration class that a recipe may set besides its dataclass fields.
_EXTRA_FIELDS = {"first_k_dense_replace"}
# Fields that other parts of a recipe decide, and where.
_DECIDED_ELSEWHERE = {
    "layer_types": "model.layer_types",
    "mlp_layer_types": "model.mlp",
    "model_type": "model.arch",
}


def hybrid_pattern(layers: int, kda_per_mla: int = 3) -> list[str]:
    """KDA, KDA, KDA, MLA, ...; the last layer is MLA, as in the released model."""
    full = [i % (kda_per_mla + 1) == kda_per_mla or i == layers - 1 for i in range(layers)]
    return ["full_attention" if f else "linear_attention" for f in full]


def build_config(
    section: ModelSection,
    *,
    vocab_size: int,
    bos_token_id: int | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> KimiLinearConfig:
    """The configuration of a from-scratch model. `InputError` on a bad size, field or value."""
    if section.size not in SIZES:
        raise InputError(f"model.size: found {section.size!r}; use one of {', '.join(SIZES)}")
    overrides = _checked_overrides(section.overrides)
    fields: dict[str, Any] = {
        **SIZES[section.size],
        **_MOE,
        "vocab_size": vocab_size,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": False,
        **overrides,
    }
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if section.layer_types is not None:
        layers = len(section.layer_types)
        if layers != overrides.get("num_hidden_layers", layers) or not layers:
            raise InputError(
                f"model.layer_types: found {layers} layers, overrides.num_hidden_layers is "
                f"{overrides.get('num_hidden_layers', 'unset')}; make them agree (at least one layer)"
            )
        fields["num_hidden_layers"] = layers
    layers = fields["num_hidden_layers"]
    if not isinstance(layers, int) or layers < 1:
        raise InputError(
            f"model.overrides.num_hidden_layers: found {layers!r}; give a whole number of at least 1"
        )
    dense = layers if section.mlp == "dense" else fields.pop("first_k_dense_replace", 1)
    fields.pop("first_k_dense_replace", None)
    fields["mlp_layer_types"] = ["dense" if i < dense else "sparse" for i in range(layers)]

    hybrid = hybrid_pattern(layers)
    pattern = section.layer_types or (hybrid if section.arch == "hybrid" else ["full_attention"] * layers)
    config = _config(fields, pattern)
    if pattern != hybrid and "intermediate_size" not in overrides and dense > 0:
        surplus = count_parameters(_config(fields, hybrid)) - count_parameters(config)
        per_unit = 3 * fields["hidden_size"] * min(dense, layers)  # gate, up and down of every dense layer
        change = round(surplus / per_unit / _STEP) * _STEP
        fields["intermediate_size"] = max(_STEP, fields["intermediate_size"] + change)
        config = _config(fields, pattern)
    return config


def bare_config(section: ModelSection, vocabulary: int) -> KimiLinearConfig:
    """The configuration of a model that is timed with random token ids and never reads text."""
    return build_config(section, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def recipe_config(recipe: Recipe) -> KimiLinearConfig:
    """The configuration of a recipe's model; loads no weights."""
    section = recipe.model
    if section.path is not None:
        try:
            return KimiLinearConfig.from_pretrained(section.path)
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: cannot read {section.path}: {one_line(error)}") from error
    from kimi_rl.tokenizer import build_tokenizer

    vocabulary = recipe.tokenizer.vocab_size
    if recipe.tokenizer.kind == "bytes":
        vocabulary = len(build_tokenizer(recipe.tokenizer, []))
    return build_config(section, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=3)


def dense_config(fields: dict[str, Any], layer_types: list[str]) -> KimiLinearConfig:
    """A configuration with these fields and dense feed-forward layers only. `InputError` on a bad value."""
    dense = {"mlp_layer_types": ["dense"] * len(layer_types), "moe_intermediate_size": fields["intermediate_size"]}
    return _config({"tie_word_embeddings": False, **_MOE, **dense, **fields}, layer_types)


def _checked_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides under the names of the configuration class, or `InputError` with the nearest known name."""
    aliases = {stored: name for name, stored in KimiLinearConfig.attribute_map.items()}
    known = {f for f in KimiLinearConfig.__dataclass_fields__ if not f.startswith(("_", "base_", "keys_"))}
    known |= _EXTRA_FIELDS | aliases.keys()
    result = {}
    for name, value in overrides.items():
        if name in _DECIDED_ELSEWHERE:
            raise InputError(f"model.overrides.{name}: set {_DECIDED_ELSEWHERE[name]} instead")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise InputError(
                f"model.overrides.{name}: no such field of KimiLinearConfig; did you mean {near!r}?"
            )
        result[aliases.get(name, name)] = value
    return result


def _config(fields: dict[str, Any], layer_types: list[str]) -> KimiLinearConfig:
    try:
        config = KimiLinearConfig(**fields, layer_types=list(layer_types))
    except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"model.overrides: {one_line(error)}") from error
    return complete_config(config)


def complete_config(config: KimiLinearConfig) -> KimiLinearConfig:
    """Add, in place, what vLLM and the published modeling code read and transformers does not store.

    Layer numbers in `linear_attn_config` start at 1. vLLM cannot take a missing number of experts, so a dense
    model is one whose first `num_hidden_layers` layers are dense. MLA has no rotary embedding in this family.
    """
    kinds = list(enumerate(config.layer_types, start=1))
    dense = [kind == "dense" for kind in config.mlp_layer_types]
    first_dense = dense.index(False) if False in dense else len(dense)
    if any(dense[first_dense:]):
        raise InputError(
            f"mlp_layer_types: {config.mlp_layer_types} has a dense layer after a sparse one; "
            "checkpoints can only say how many of the first layers are dense"
        )
    config.first_k_dense_replace = first_dense
    config.moe_layer_freq = 1
    config.moe_router_activation_func = "sigmoid"
    config.use_grouped_topk = True
    config.mla_use_nope = True
    config.num_nextn_predict_layers = 0
    config.linear_attn_config = {
        "kda_layers": [i for i, kind in kinds if kind == "linear_attention"],
        "full_attn_layers": [i for i, kind in kinds if kind == "full_attention"],
        "head_dim": config.linear_head_dim,
        "num_heads": config.linear_num_heads,
        "short_conv_kernel_size": config.linear_conv_kernel_dim,
    }
    config.architectures = ["KimiLinearForCausalLM"]
    return config


def count_parameters(config: KimiLinearConfig) -> int:
    """Total number of parameters, embeddings included."""
    return describe(config)["total"]


def describe(config: KimiLinearConfig) -> dict[str, int]:
    """Parameter counts of a configuration; allocates nothing.

    Keys: total; active (used by one token: routed experts counted top-k times); embedding (input and head);
    kda; mla; mlp (dense); moe (experts, shared experts, router); norm.
    """
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    counts = dict.fromkeys(("total", "active", "embedding", "kda", "mla", "mlp", "moe", "norm"), 0)
    unused = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        counts["total"] += size
        counts[_part(name, config)] += size
        if ".experts." in name:
            unused += size - size * config.num_experts_per_tok // config.num_local_experts
    counts["active"] = counts["total"] - unused
    return counts


def _part(name: str, config: KimiLinearConfig) -> str:
    if not name.startswith("model.layers."):
        return "norm" if "norm" in name else "embedding"
    index, block = int(name.split(".")[2]), name.split(".")[3]
    if block == "self_attn":
        return "kda" if config.layer_types[index] == "linear_attention" else "mla"
    if block == "mlp":
        return "mlp" if config.mlp_layer_types[index] == "dense" else "moe"
    return "norm"
