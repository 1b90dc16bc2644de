"""Tokens stay with the scheduler until their request is done.

Rollouts are read when they are complete, yet vLLM's scheduler wraps every token of every request in an output of its
own, and its output processor unwraps them again. Here a token that ends nothing is noted and no more; what a request
has gathered goes out with its last token. All else, such as first and last tokens or preempted requests, takes vLLM's
way. Only batches with lean log-probs (see `lean_logprobs.py`) are treated so, and the tokens are the same.

`KIMI_RL_QUIET_STEPS=0` switches it off.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from kimi_rl.rollout.vllm_plugin.lean_logprobs import LeanLists
from kimi_rl.switches import is_on

SWITCH = "KIMI_RL_QUIET_STEPS"


def install() -> None:
    """Put it in front of vLLM's scheduler. Safe to call more than once."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    if hasattr(Scheduler.update_from_output, "kept"):
        return
    update, running = Scheduler.update_from_output, RequestStatus.RUNNING

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        logprobs = model_runner_output.logprobs
        if type(logprobs) is not LeanLists or _unusual(self, scheduler_output, model_runner_output):
            return update(self, scheduler_output, model_runner_output)
        tokens, values = model_runner_output.sampled_token_ids, logprobs.values
        row_of, requests = model_runner_output.req_id_to_index, self.requests
        loud, holding = {}, {}
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = requests.get(name)
            row = row_of[name]
            if request is None or request.status is not running or not tokens[row] or not request._output_token_ids:
                loud[name] = count
            else:
                held = request.__dict__.get("_kimi_rl_held")
                if held is None:
                    held = request._kimi_rl_held = _Held(request, self.max_model_len)
                token = tokens[row][0]
                outputs = request._output_token_ids
                if token not in held.ends and len(outputs) + 1 < held.limit and not held.is_stale(request):
                    outputs.append(token)
                    request._all_token_ids.append(token)
                    held.logprobs.append(values[row])
                    request.num_in_flight_tokens -= count
                    if request.num_output_placeholders:  # asynchronous scheduling: the token was counted in advance
                        request.num_output_placeholders -= 1
                    continue
                loud[name] = count
            if request is not None and "_kimi_rl_held" in request.__dict__:
                holding[name] = request
        update_from_output.kept += len(scheduler_output.num_scheduled_tokens) - len(loud)
        scheduler_output = copy.copy(scheduler_output)
        scheduler_output.num_scheduled_tokens = loud
        found = update(self, scheduler_output, model_runner_output)
        for outputs in found.values():
            for output in outputs.outputs:
                if output.request_id in holding:
                    _let_go(output, holding[output.request_id])
        return found

    update_from_output.kept = 0  # tokens that were noted and no more, for tests and for whoever wonders
    Scheduler.update_from_output = update_from_output


class _Held:
    """The log-probs of a request's last tokens, which nobody has been told of yet, and what would end it."""

    def __init__(self, request: Any, max_model_len: int):
        params = request.sampling_params
        self.logprobs: list[float] = []
        self.ends = {params.eos_token_id, *(params.stop_token_ids or ())}
        self.limit = min(request.max_tokens, max_model_len - request.num_prompt_tokens)
        if params.min_tokens or params.repetition_detection or request.structured_output_request is not None:
            self.limit = 0  # more can end it, or keep it from ending: never quiet
        # After a preemption the tokens of steps under way are dropped; vLLM 0.26 and 0.32 count them differently.
        self._stale = "num_stale_output_tokens" if hasattr(request, "num_stale_output_tokens") else None
        self._stale = self._stale or "async_tokens_to_discard"

    def is_stale(self, request: Any) -> bool:
        return getattr(request, self._stale) > 0


def _unusual(scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> bool:
    """Whether tokens may mean more than their requests' next tokens."""
    return bool(
        not is_on(SWITCH)
        or scheduler.kv_cache_manager.enable_caching  # every full block must be registered
        or scheduler_output.scheduled_spec_decode_tokens
        or model_runner_output.kv_connector_output
        or model_runner_output.num_nans_in_logits
        or model_runner_output.pooler_output
    )


def _let_go(output: Any, request: Any) -> None:
    """Add what the request has gathered to an output of it."""
    held = request._kimi_rl_held.logprobs
    if held and output.new_token_ids:
        count = len(held) + len(output.new_token_ids)
        output.new_token_ids = request._output_token_ids[-count:]
        output.new_logprobs = [*held, output.new_logprobs]
        held.clear()
