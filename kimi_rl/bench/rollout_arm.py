"""One engine of `kimi-rl bench rollout`, in a process of its own, which does what it is told over a pipe."""

from __future__ import annotations

import cProfile
import multiprocessing
import os
import pstats
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kimi_rl.errors import RunError

_START_S = 300.0
_ANSWER_S = 240.0


class ArmProcess:
    """Starts an engine with `environment` on top of this process's, and passes orders to it.

    `settings` are those of `VLLMEngine`. Raises RunError with the engine's own words where it fails.
    """

    def __init__(self, name: str, environment: Mapping[str, str], settings: dict[str, Any]):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(environment)  # read by a child from its start
        try:
            self._process = context.Process(target=_serve, args=(theirs, settings), name=name)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def wait_ready(self) -> dict[str, Any]:
        """What the engine says of itself once it has loaded and generated once."""
        return self.answer(_START_S)

    def ask(self, order: str, **values: Any) -> None:
        self._pipe.send((order, values))

    def answer(self, seconds: float = _ANSWER_S) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise RunError(f"arm {self.name}: no answer within {seconds:g} s")
            good, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RunError(f"arm {self.name}: its process died") from None
        if not good:
            raise RunError(f"arm {self.name}: {value}")
        return value

    def do(self, order: str, **values: Any) -> Any:
        self.ask(order, **values)
        return self.answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def timed_together(
    arms: Sequence[ArmProcess], *, steps: int, windows: int, gpu: bool = False
) -> list[dict[str, Any]]:
    """Every arm's windows (see `_Engine.timed`), all arms at the same time."""
    start_at = time.time() + 0.3 if len(arms) > 1 else 0.0
    for arm in arms:
        arm.ask("timed", steps=steps, windows=windows, start_at=start_at, gpu=gpu)
    return [arm.answer() for arm in arms]


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    try:
        engine = _Engine(settings)
        pipe.send((True, engine.about()))
        while True:
            order, values = pipe.recv()
            pipe.send((True, getattr(engine, order)(**values)))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc(limit=-3).strip()))


class _Engine:
    """The orders."""

    def __init__(self, settings: dict[str, Any]):
        from kimi_rl.rollout.engine import Request, SamplingParams
        from kimi_rl.rollout.vllm_engine import VLLMEngine

        start = time.perf_counter()
        self._engine = VLLMEngine(**settings)
        self._start_s = time.perf_counter() - start
        # Kernels are compiled, or tuned, at their first call.
        self._engine.generate([Request([20 + i] * 300, i) for i in range(4)], SamplingParams(4))

    def about(self) -> dict[str, Any]:
        host_path = self._engine._llm.kimi_rl_host_path
        runner = self._engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        config = self._engine._llm.llm_engine.vllm_config
        layers = {type(module).__name__ for module in self._engine._model.modules()}
        return {
            "start_s": self._start_s,
            "runner": f"{type(runner).__module__}.{type(runner).__name__}",
            "lean_logprobs": host_path.lean,
            "keyed_sampling": host_path.keyed,
            "kda_layers": sorted(name for name in layers if "Delta" in name),
            "cuda_graphs": str(config.compilation_config.cudagraph_mode),
            "largest_cuda_graph": config.compilation_config.max_cudagraph_capture_size,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "cache_groups": [
                {
                    "kind": type(group.kv_cache_spec).__name__,
                    "layers": len(group.layer_names),
                    "block_tokens": group.kv_cache_spec.block_size,
                }
                for group in runner.kv_cache_config.kv_cache_groups
            ],
        }

    def begin(self, prompts: list[list[int]], seeds: list[int] | None, tokens: int) -> None:
        """Bring a batch to where it decodes; `end` ends it."""
        from kimi_rl.rollout.decode_windows import DecodeBatch

        self._batch = DecodeBatch(self._engine, prompts, tokens, seeds)
        self._batch.__enter__()

    def timed(self, steps: int, windows: int, start_at: float = 0.0, gpu: bool = False) -> dict[str, Any]:
        """Seconds of `windows` windows of `steps` steps, from the moment `start_at` (of `time.time`) on.

        With a `start_at`, steps beyond keep the card busy until slower engines beside this one have been timed too.
        """
        time.sleep(max(0.0, start_at - time.time()))
        self._batch.seconds(5)
        found = {"seconds": [self._batch.seconds(steps) for _ in range(windows)]}
        if start_at:
            self._batch.seconds(steps // 2)
        if gpu:
            found["gpu_s"] = self._batch.gpu_seconds()
        return found

    def host_profile(self, steps: int, functions: int = 25) -> list[dict[str, Any]]:
        """Where Python's time of a step goes, by cProfile (which makes it longer): the dearest functions, own time."""
        profile = cProfile.Profile()
        profile.enable()
        self._batch.seconds(steps)
        profile.disable()
        found = sorted(pstats.Stats(profile).stats.items(), key=lambda item: -item[1][2])[:functions]
        return [
            {
                "function": f"{Path(file).name}:{line} {name}",
                "calls": calls / steps,
                "own_ms": 1e3 * own / steps,
                "total_ms": 1e3 * total / steps,
            }
            for (file, line, name), (_, calls, own, total, _) in found
        ]

    def end(self) -> None:
        self._batch.__exit__()

    def set(self, environment: dict[str, str]) -> None:
        """Set switches of the host path."""
        from kimi_rl.rollout.vllm_plugin import fast_allocate, steady_groups

        os.environ.update(environment)
        fast_allocate.install()
        steady_groups.install()

    def generate(
        self, prompts: list[list[int]], seeds: list[int], tokens: int, temperature: float
    ) -> list[tuple[list[int], list[float]]]:
        from kimi_rl.rollout.engine import Request, SamplingParams

        requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        answers = self._engine.generate(requests, SamplingParams(tokens, temperature))
        return [(answer.token_ids, answer.logprobs) for answer in answers]
