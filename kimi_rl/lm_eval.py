"""lm-eval (the LM evaluation harness) with our own model class, `--model kimi-rl`:

    python -m kimi_rl.lm_eval run --model kimi-rl --model_args pretrained=runs/first/model --tasks gsm8k

It is lm-eval's Hugging Face backend around `load_model`. Its own `--model hf` loads the same folders with transformers'
class, which on a CPU calls Triton kernels if `flash-linear-attention` is installed, and fails.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from kimi_rl.errors import InputError
from kimi_rl.model.load_save import load_model


@register_model("kimi-rl")
class KimiRLModel(HFLM):
    """lm-eval's Hugging Face backend with our model class: the same kernels as in training, on any device.

    `model_args`: `pretrained` (folder or hub id), `dtype` (`auto`: as the folder says), and what lm-eval itself uses
    (`max_length`, `batch_size`, ...). Raises InputError for the ways to load that need another model class.
    """

    def _create_model(self, pretrained: str, *, dtype: Any = "auto", **others: Any) -> None:
        refused = ("parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder")
        for name in refused:
            if others.get(name):
                raise InputError(f"--model_args: kimi-rl takes no {name}, found {others[name]!r}; use --model hf")
        if dtype == "auto":
            dtype = self.config.dtype or torch.float32
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        self._model = load_model(pretrained, dtype=dtype, device=self.device)


def main() -> None:
    """lm-eval's own command line, which then knows `--model kimi-rl`."""
    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
