"""What stands in front of vLLM's sampler for our own requests: lean log-probs, and seeds without a launch per request.

vLLM's V1 runner holds a random generator per seeded request and launches a kernel for each in every step. In its place
`kernels/keyed_draw` draws for the whole batch at once, from each request's seed and the position of the token to draw:
tokens still depend on nothing but the request. The V2 runner (VLLM_USE_V2_MODEL_RUNNER=1) seeds in this way by itself,
and on a CPU a generator costs little: there seeds go to vLLM as ever.

`KIMI_RL_LEAN_LOGPROBS=0` and `KIMI_RL_KEYED_SAMPLING=0` switch the two off, each for the calls made while it is set; an
engine that starts with both of them off has vLLM's sampler as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from kimi_rl.kernels.dispatch import fla_installed
from kimi_rl.kernels.keyed_draw import keyed_draw
from kimi_rl.rollout.vllm_plugin import lean_logprobs, quiet_steps
from kimi_rl.rollout.vllm_plugin.lean_logprobs import LeanLogprobs
from kimi_rl.switches import is_on

log = logging.getLogger(__name__)

LEAN_SWITCH = "KIMI_RL_LEAN_LOGPROBS"
KEYED_SWITCH = "KIMI_RL_KEYED_SAMPLING"
SEED = "kimi_rl_seed"


@dataclass(frozen=True)
class HostPath:
    """What an engine's runner can do for marked requests."""

    lean: bool = False
    keyed: bool = False

    def request_arguments(self, seed: int, greedy: bool) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams` for a request that wants its sampled tokens' log-probs."""
        extra: dict[str, Any] = {}
        if self.lean and is_on(LEAN_SWITCH):
            extra[lean_logprobs.MARK] = True
        keyed = self.keyed and not greedy and is_on(KEYED_SWITCH)
        if keyed:
            extra[SEED] = seed
        return {"logprobs": 0, "seed": None if keyed else seed, "extra_args": extra or None}


def attach(llm: Any) -> HostPath:
    """Put the front before the sampler of `llm` (a `vllm.LLM` in this process). Plain vLLM where that is impossible."""
    if not is_on(LEAN_SWITCH) and not is_on(KEYED_SWITCH):
        return HostPath()
    try:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        if llm.llm_engine.vllm_config.speculative_config is not None:
            return HostPath()  # several tokens a step
        if hasattr(runner, "input_batch"):
            # A logits processor of the user's own is unknown to the keyed path.
            custom = getattr(llm.llm_engine.vllm_config.model_config, "logits_processors", None)
            keyed = runner.device.type == "cuda" and fla_installed() and not custom
            for name in ("requests", *(["seq_lens"] if keyed else [])):
                getattr(runner, name)
            SamplerFront(runner, keyed)
            front = HostPath(lean=True, keyed=keyed)
        else:
            _front_v2(runner)
            front = HostPath(lean=True)
        lean_logprobs.install()
        quiet_steps.install()
        return front
    except (AttributeError, ImportError) as error:
        log.warning("log-probs and seeds take vLLM's own, slower way: this vLLM is built otherwise (%s)", error)
        return HostPath()


class SamplerFront:
    """Called in place of `Sampler.forward` of a V1 runner."""

    def __init__(self, runner: Any, keyed: bool):
        self._runner, self._keyed = runner, keyed
        self._sampler, self._plain = runner.sampler, runner.sampler.forward
        self._metadata: Any = None  # what the next two were found for: vLLM makes new metadata for every new batch
        self._lean = False
        self._seeds: torch.Tensor | None = None
        runner.sampler.forward = self

    def __call__(self, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        if sampling_metadata is not self._metadata:
            self._read_marks(sampling_metadata)
        if self._seeds is not None:
            tokens, logprobs = self._draw(logits, sampling_metadata)
            return _output(tokens, logprobs, self._lean)
        output = self._plain(logits, sampling_metadata, *args, **kwargs)
        if self._lean:
            output.logprobs_tensors = LeanLogprobs(output.logprobs_tensors.logprobs[:, 0])
        return output

    def _read_marks(self, metadata: Any) -> None:
        batch = self._runner.input_batch
        params = [self._runner.requests[name].sampling_params for name in batch.req_ids]
        marks = [(p.extra_args if p is not None else None) or {} for p in params]
        self._lean = metadata.max_num_logprobs == 0 and all(lean_logprobs.MARK in mark for mark in marks)
        seeds = [mark[SEED] for mark in marks if SEED in mark]
        self._seeds = None
        if seeds and self._keyed:
            if len(seeds) != len(marks) or not metadata.all_random or metadata.max_num_logprobs != 0:
                raise RuntimeError("requests of VLLMEngine share a batch with others; their seeds would be lost")
            device = self._runner.device
            self._seeds = torch.tensor(seeds, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        self._metadata = metadata

    def _draw(self, logits: torch.Tensor, metadata: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(self._seeds)
        if len(logits) != rows:
            raise RuntimeError(f"{len(logits)} rows of logits for {rows} requests; their seeds would be lost")
        # Tokens of each request so far, prompt included. Rows in the middle of a prompt are thrown away later.
        positions = self._runner.seq_lens[:rows]
        if metadata.top_p is None and metadata.top_k is None:
            return keyed_draw(logits, self._seeds, positions, metadata.temperature)
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        logits = self._sampler.apply_temperature(logits.float(), metadata.temperature, True)
        return keyed_draw(apply_top_k_top_p(logits, metadata.top_k, metadata.top_p), self._seeds, positions)


def _output(tokens: torch.Tensor, logprobs: torch.Tensor, lean: bool) -> Any:
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    tokens = tokens[:, None]
    if lean:
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=LeanLogprobs(logprobs))
    ranks = torch.zeros_like(tokens[:, 0], dtype=torch.int64)  # nobody asks for them
    return SamplerOutput(tokens, LogprobsTensors(tokens, logprobs[:, None], ranks))


def _front_v2(runner: Any) -> None:
    """The same for the V2 runner, whose sampler has no `forward` and knows requests by slots."""
    is_lean = torch.zeros(runner.max_num_reqs, dtype=torch.bool).numpy()

    class LeanSampler(type(runner.sampler)):
        def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
            output = super().__call__(logits, input_batch)
            slots = input_batch.idx_mapping_np
            if output.logprobs_tensors is not None and is_lean[slots].all():
                output.logprobs_tensors = LeanLogprobs(output.logprobs_tensors.logprobs[:, 0])
            return output

        def add_request(self, slot: int, prompt_len: int, sampling_params: Any) -> None:
            super().add_request(slot, prompt_len, sampling_params)
            is_lean[slot] = lean_logprobs.MARK in (sampling_params.extra_args or {})

    runner.sampler.__class__ = LeanSampler
