"""Loads new weights into a running vLLM model through vLLM's own layer-wise reload."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn


class LayerwiseReload:
    """Repacks fused and absorbed weights in place, whatever layout the kernels want. `begin`, `write`..., `finish`."""

    def __init__(self, model: nn.Module, vllm_config: Any):
        self._model, self._config = model, vllm_config

    def begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._loading():
            initialize_layerwise_reload(self._model)

    def write(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        with self._loading():
            self._model.load_weights(weights)

    def finish(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._loading():
            finalize_layerwise_reload(self._model, self._config.model_config)

    def _loading(self) -> ExitStack:
        """The context that vLLM's loaders expect."""
        from vllm.config import set_current_vllm_config

        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(set_current_vllm_config(self._config))
        return stack
