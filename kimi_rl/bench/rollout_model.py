"""A model that `kimi-rl bench rollout` times: its folder, the settings of its engines, the prompts they decode from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import KimiLinearConfig

from kimi_rl.model.cost import sequence_bytes
from kimi_rl.model.presets import describe
from kimi_rl.run_dir import describe_environment
from kimi_rl.seeds import derive_seed

BLOCK = 480  # tokens of a cache block that vLLM chooses for this model on a card


class TimedModel:
    """`settings` are those of `VLLMEngine`, for `largest` sequences of `context` prompt tokens and `tokens` more."""

    def __init__(
        self, folder: Path, *, context: int, tokens: int, largest: int, seed: int, engine_args: dict[str, Any] | None
    ):
        self.config = KimiLinearConfig.from_pretrained(folder)
        self.context, self.tokens, self.seed = context, tokens, seed
        card = torch.cuda.is_available()
        length = max(context + tokens, 2 * BLOCK)
        # A fixed cache, for engines that start side by side would see each other's memory come and go.
        fixed = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": cache_bytes(self.config, largest, length)}
        self.settings = {
            "model_folder": str(folder),
            "max_model_len": length,
            "max_num_seqs": largest,
            "dtype": "bfloat16" if card else "float32",
            "engine_args": (fixed if card else {}) | (engine_args or {}),
            "seed": seed,
        }

    def prompts(self, count: int, length: int, label: str) -> list[list[int]]:
        """Random token ids, a function of the seed and the label."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "rollout", label))
        return torch.randint(10, self.config.vocab_size - 10, (count, length), generator=generator).tolist()

    def work(self, size: int, engine: int, *, seeded: bool = True) -> dict[str, Any]:
        """What an arm's order `begin` takes, for the engine of this number: every one has prompts of its own."""
        seeds = [derive_seed(self.seed, "rollout", engine, row) for row in range(size)] if seeded else None
        return {"prompts": self.prompts(size, self.context, str(engine)), "seeds": seeds, "tokens": self.tokens}


def cache_bytes(config: KimiLinearConfig, sequences: int, length: int) -> int:
    """Bytes of vLLM's cache that surely hold `sequences` sequences of `length` tokens, in bfloat16.

    vLLM gives every layer pages of one size: what a block of tokens takes in an MLA layer, or a KDA layer's states.
    """
    mla, kda = (config.layer_types.count(kind) for kind in ("full_attention", "linear_attention"))
    block = sequence_bytes(config, BLOCK).kv // max(1, mla)
    states = (sequence_bytes(config, 1).state + sequence_bytes(config, 1).conv) // max(1, kda)
    pages = kda + mla * (-(-length // BLOCK) + 1)
    return int(1.15 * sequences * pages * max(block, states)) + 2**28


def circumstances(timed: TimedModel, source: str) -> dict[str, Any]:
    """What a result says of the command, the model and the machine."""
    config = timed.config
    return {
        "command": " ".join(["kimi-rl", *sys.argv[1:]]),
        "model": {"source": source, "parameters": describe(config)["total"], "layers": list(config.layer_types),
                  "vocabulary": config.vocab_size},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "context": timed.context,
        "environment": describe_environment(),
    }  # fmt: skip
