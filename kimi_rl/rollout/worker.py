"""A rollout worker: one engine in a Ray actor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray

from kimi_rl.rollout.engine import Completion, Request, RolloutEngine, SamplingParams

# What `engine` may be besides a name: a stand-in that takes the arguments of `build_engine` (tests inject faults so).
EngineFactory = Callable[..., RolloutEngine]


def resolve_engine(name: str) -> str:
    """`auto` takes vLLM where it is installed, else the embedded transformers engine."""
    if name != "auto":
        return name
    from importlib.util import find_spec

    return "vllm" if find_spec("vllm") is not None else "transformers"


def build_engine(
    name: str | EngineFactory,
    model_folder: str,
    *,
    batch_size: int,
    max_model_len: int,
    seed: int,
    device: str,
    engine_args: dict[str, Any],
    policy_version: int = -1,
) -> RolloutEngine:
    """The engine called `name` on the model in `model_folder` (see `RolloutEngine`)."""
    if callable(name):
        return name(model_folder, batch_size=batch_size, device=device, engine_args=engine_args)
    if resolve_engine(name) == "vllm":
        from kimi_rl.model.source import is_source
        from kimi_rl.rollout.vllm_engine import VLLMEngine
        from kimi_rl.rollout.vllm_source import VLLMSourceEngine

        engine = (VLLMSourceEngine if is_source(model_folder) else VLLMEngine)(
            model_folder,
            max_model_len=max_model_len,
            max_num_seqs=batch_size,
            dtype="float32" if device == "cpu" else "bfloat16",
            engine_args=engine_args,
            seed=seed,
        )
        engine.policy_version = policy_version
        return engine
    from kimi_rl.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(model_folder, batch_size=batch_size, device=device, policy_version=policy_version)


@ray.remote
class RolloutWorker:
    """Holds one engine. A fresh worker serves nothing until its first weight update (`policy_version` is -1)."""

    def __init__(self, engine: str | EngineFactory, threads: int, **engine_settings: Any):
        self._name, self._threads, self._settings = engine, threads, engine_settings
        self._engine: RolloutEngine | None = None

    def start(self) -> dict[str, Any]:
        """Load the engine. A call of its own, not the constructor, so that an error comes back as what it is.

        Returns:
            pid; engine (its class); card (see `card_of`); dtypes (in which it serves each tensor, or None: as sent).
        """
        import torch

        from kimi_rl.weight_sync import card_of

        torch.set_num_threads(self._threads)
        self._engine = build_engine(self._name, **self._settings)
        dtypes = self._engine.served_dtypes() if hasattr(self._engine, "served_dtypes") else None
        return {
            "pid": os.getpid(),
            "engine": type(self._engine).__name__,
            "card": card_of(self._settings["device"]),
            "dtypes": dtypes,
        }

    def update_weights(self, update: Any) -> int:
        from kimi_rl.weight_sync import apply_update

        apply_update(self._engine, update)
        return self._engine.policy_version

    def generate(self, requests: Sequence[Request], params: SamplingParams, version: int) -> list[Completion]:
        """Complete `requests` with policy `version`; a worker that holds another one refuses."""
        if self._engine.policy_version != version:
            raise RuntimeError(f"asked for policy version {version}, the worker holds {self._engine.policy_version}")
        return self._engine.generate(requests, params)
