"""vLLM's `KimiLinearForCausalLM` on a card, built with our KDA layer where `KIMI_RL_VLLM_KDA_STEP=1` asks for it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.models import kimi_linear as stock

from kimi_rl.kernels.dispatch import choose
from kimi_rl.rollout.vllm_plugin import kda_step_wanted
from kimi_rl.rollout.vllm_plugin.kda_card import CardKimiDeltaAttention

log = logging.getLogger(__name__)


class KimiLinearForCausalLM(stock.KimiLinearForCausalLM):
    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        layer = stock.KimiGatedDeltaNetAttention
        if _wanted(vllm_config):
            stock.KimiGatedDeltaNetAttention = CardKimiDeltaAttention
            # vLLM keeps compiled graphs under a key made of its configuration, which must tell the two layers apart.
            vllm_config.additional_config = {**vllm_config.additional_config, "kimi_rl_kda_step": True}
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            stock.KimiGatedDeltaNetAttention = layer


def _wanted(vllm_config: Any) -> bool:
    """Called where a new tensor lies on the device and in the dtype of the model."""
    if not kda_step_wanted():
        return False
    if choose("kda_step", torch.empty(0), has_fla=True) != "fla":
        log.warning("KDA layers decode as vLLM's own do: `kda_step` has no kernel here (KIMI_RL_KERNELS, or no fla)")
        return False
    if not isinstance(vllm_config.additional_config, dict):
        log.warning("KDA layers decode as vLLM's own do: additional_config is no dict, so it cannot name another layer")
        return False
    return True
