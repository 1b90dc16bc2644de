"""Generation by vLLM from a plain transformer (see `model/source.py`): the model that another was converted from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kimi_rl.errors import InputError
from kimi_rl.model.source import export_source, is_gguf
from kimi_rl.rollout.vllm_engine import VLLMEngine, start_vllm, stop_ids


class VLLMSourceEngine(VLLMEngine):
    """`VLLMEngine.generate` and nothing else: a source takes no weight updates.

    The arguments are `VLLMEngine`'s. A GGUF file is written to a temporary folder in Hugging Face layout first. Raises
    InputError for a hub id that is not on this machine as a folder.
    """

    def __init__(self, model_folder: str, *, max_model_len: int, **settings: Any):
        """`settings` go to `start_vllm`."""
        self.policy_version = -1
        self.max_model_len = max_model_len
        self._refusal = None
        with tempfile.TemporaryDirectory(prefix="kimi_rl_source_") as temporary:
            folder = Path(model_folder).expanduser()
            if is_gguf(model_folder):
                folder = Path(temporary)
                export_source(model_folder, "model", folder)
            elif not folder.is_dir():
                raise InputError(f"model: {model_folder} is not a folder; download it, or use --engine transformers")
            self._eos_ids = stop_ids(folder)
            self._llm = start_vllm(folder, max_model_len=max_model_len, **settings)

    def served_dtypes(self) -> None:
        return None

    def begin_update(self) -> None:
        raise InputError("this engine holds a plain transformer, which takes no weight updates")
