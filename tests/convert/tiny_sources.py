"""Tiny random transformers in Hugging Face layout, with weights large enough that attention is not uniform."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kimi_rl.recipe import TokenizerSection
from kimi_rl.tokenizer import build_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 259,
    "pad_token_id": 258,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": False}),
}


def make_source(family: str, folder: Path | None = None, **changes) -> PreTrainedModel:
    """The model, float32 on the CPU; with `folder` also written there, with a tokenizer."""
    make_config, make_model, fields = FAMILIES[family]
    tokenizer = build_tokenizer(TokenizerSection(kind="bytes"))
    torch.manual_seed(0)
    model = make_model(make_config(**{**SIZES, "vocab_size": len(tokenizer), **fields, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.requires_grad_(False)


def attention_inputs(model: PreTrainedModel, tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer 1 on a random text: what its attention reads and gives, both [T, d] in the model's dtype."""
    seen = {}

    def keep(module, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"][0], y=output[0][0])

    hook = model.model.layers[1].self_attn.register_forward_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(seed)
    model(torch.randint(0, 256, (1, tokens), generator=generator))
    hook.remove()
    return seen["x"], seen["y"]
