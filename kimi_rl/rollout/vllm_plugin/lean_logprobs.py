"""The sampled token's log-prob without Python objects per token.

For `logprobs=0` vLLM copies token ids, log-probs and ranks to the host, slices three arrays per request and step, and
makes a dict with an object for every token: 3.5 ms of Python in a step of 256 sequences. Here one vector a step comes
to the host, and each request keeps a list of floats, which `CompletionOutput.logprobs` then is. The values are vLLM's.

Only requests with `MARK` in their `extra_args` are treated so (see `sampler_front.py`); all others get what vLLM gives.
"""

from __future__ import annotations

from typing import Any

import torch

MARK = "kimi_rl_lean"


class LeanLogprobs:
    """Stands where the runners expect `LogprobsTensors`. `values`: float32 [N], of the sampled tokens."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def to_cpu_nonblocking(self) -> LeanLogprobs:
        return LeanLogprobs(self.values.to("cpu", non_blocking=True))

    def tolists(self) -> LeanLists:
        return LeanLists(self.values.tolist())


class LeanLists:
    """Stands where the scheduler expects `LogprobsLists`."""

    def __init__(self, values: list[float]):
        self.values = values

    def slice_request(self, index: int, count: int) -> float | None:
        return self.values[index] if count else None


def install() -> None:
    """Let vLLM's output processor keep plain floats for marked requests. Safe to call more than once."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if hasattr(LogprobsProcessor.from_new_request, "plain"):
        return

    class LeanProcessor(LogprobsProcessor):
        """`logprobs` is a list of floats; `cumulative_logprob` stays None."""

        def update_from_output(self, output: Any) -> None:
            new = output.new_logprobs
            if type(new) is float:
                self.logprobs.append(new)
            elif type(new) is list:  # of several steps
                self.logprobs.extend(new)
            elif new is not None:  # others in the batch wanted more, so vLLM's own arrays came
                self.logprobs.extend(new.logprobs[:, 0].tolist())

    plain = LogprobsProcessor.from_new_request

    def from_new_request(tokenizer: Any, request: Any) -> LogprobsProcessor:
        params = request.sampling_params
        if not (params.extra_args or {}).get(MARK):
            return plain(tokenizer=tokenizer, request=request)
        return LeanProcessor(
            tokenizer=None,
            logprobs=[],
            prompt_logprobs=None,
            cumulative_logprob=None,
            num_logprobs=0,
            num_prompt_logprobs=None,
        )

    from_new_request.plain = plain
    LogprobsProcessor.from_new_request = staticmethod(from_new_request)
