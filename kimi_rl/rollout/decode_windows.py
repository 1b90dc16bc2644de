"""Steps of pure decoding on a running vLLM engine: no prompt in the batch, one token a step for every sequence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kimi_rl.card_work import card_work
from kimi_rl.errors import RunError
from kimi_rl.rollout.vllm_engine import VLLMEngine, generator_seed

_SETTLE = 8  # steps between the last prompt and the first timed step


class DecodeBatch:
    """Sequences in the middle of decoding, at temperature 1 with their sampled tokens' log-probs.

    Args:
        prompts: token ids; all of them decode together.
        tokens: longest completion; the steps run in all, `_SETTLE` included, must stay below it.
        seeds: one per prompt; unset: none, as users of vLLM mostly do.

    Use as a context manager: leaving it aborts the sequences. Raises RunError where they do not all fit.
    """

    def __init__(
        self, engine: VLLMEngine, prompts: Sequence[Sequence[int]], tokens: int, seeds: Sequence[int] | None = None
    ):
        self.sequences = len(prompts)
        self._llm, self._prompts, self._tokens, self._seeds = engine._llm, prompts, tokens, seeds
        self._names: list[str] = []

    def __enter__(self) -> DecodeBatch:
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                max_tokens=self._tokens, temperature=1.0, ignore_eos=True, detokenize=False, **self._arguments(index)
            )
            for index in range(self.sequences)
        ]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in self._prompts]
        self._names = self._llm.enqueue(prompts, settings, use_tqdm=False)
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        most = 0
        while len(scheduler.running) < self.sequences or not all(r.num_output_tokens for r in scheduler.running):
            self._llm.llm_engine.step()
            most = max(most, len(scheduler.running))
            if self._llm.llm_engine.get_num_unfinished_requests() < self.sequences:
                self.__exit__()
                raise RunError(f"only {most} of {self.sequences} sequences decode together; the cache is too small")
        self.seconds(_SETTLE)
        return self

    def __exit__(self, *error: Any) -> None:
        self._llm.llm_engine.abort_request(self._names, internal=True)

    def seconds(self, steps: int) -> float:
        """Wall time of `steps` steps."""
        step = self._llm.llm_engine.step
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - start

    def gpu_seconds(self, steps: int = 10) -> float:
        """Seconds per step in which the card works, by torch's profiler. Needs a card."""
        return card_work(lambda: self.seconds(steps))["card_s"] / steps

    def _arguments(self, index: int) -> dict[str, Any]:
        if self._seeds is None:
            return {"logprobs": 0}
        return self._llm.kimi_rl_host_path.request_arguments(generator_seed(self._seeds[index]), greedy=False)
