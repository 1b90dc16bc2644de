"""The workers of a pool: starting them, what each one holds and is doing, and what an answer of theirs means."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from kimi_rl.errors import InputError
from kimi_rl.rollout.engine import Completion, Request, SamplingParams


class WorkerFault(Exception):
    """A worker died, hung, raised, or gave an answer that cannot be used. It is replaced."""


@dataclass(eq=False)
class Seat:
    """One place in the pool and the worker that holds it. `info` is what `start` returned, None until it has."""

    index: int
    worker: ray.actor.ActorHandle
    info: dict[str, Any] | None = None
    version: int = -1  # of the weights that the worker holds
    restarts: int = 0
    call: Call | None = None  # what the worker is doing
    busy_s: float = 0.0  # time spent generating


@dataclass(eq=False)
class Call:
    """A question that a worker is answering. It fails when no answer has come by `deadline` (time.monotonic)."""

    kind: Literal["start", "load", "generate"]
    seat: Seat
    reference: ray.ObjectRef
    started: float
    deadline: float
    limit: str  # what the deadline is called in a recipe
    version: int = -1
    items: Sequence[Item] = ()
    asked: int = 0  # tokens asked for at most
    update: Any = None  # kept alive until the worker has loaded it


@dataclass(eq=False)
class Job:
    """Requests that belong together. `version`: answer with exactly this policy version, or None: with the newest."""

    params: SamplingParams
    chunk: int  # items a worker takes at once
    version: int | None
    left: int = 0  # items that are not finished
    slowest_s: float = 0.0  # of its calls that have been answered
    results: list[Completion | None] = field(default_factory=list)


@dataclass(eq=False)
class Item:
    """One completion in the making: what has been sampled so far, and by which versions of the policy."""

    job: Job
    row: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.job.results[self.row] is not None

    def next_request(self, reseed) -> Request:
        """What to ask for next: the prompt and all tokens so far, which the worker reads with its current weights."""
        if not self.token_ids:
            return self.request
        return Request([*self.request.prompt_ids, *self.token_ids], reseed(self.request.seed, len(self.token_ids)))

    def add(self, part: Completion, asked: int) -> None:
        """Append what a worker sampled when asked for up to `asked` tokens; finish unless that cut it short."""
        limit = self.job.params.max_tokens
        room = limit - len(self.token_ids)
        cut = part.finish_reason == "length" and len(part.token_ids) >= asked and asked < room
        reason = part.finish_reason if len(part.token_ids) <= room else "length"
        self.token_ids += part.token_ids[:room]
        self.logprobs += part.logprobs[:room]
        self.segments.append((part.policy_version, min(room, len(part.token_ids))))
        if cut:
            return
        oldest = min(version for version, _ in self.segments)
        segments = merge_segments(self.segments)
        self.job.results[self.row] = Completion(self.token_ids, self.logprobs, reason, oldest, segments)
        self.job.left -= 1


def merge_segments(segments: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Adjacent segments of one version joined; empty where one version drew everything."""
    merged: list[tuple[int, int]] = []
    for version, count in segments:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        elif count:
            merged.append((version, count))
    return tuple(merged) if len(merged) > 1 else ()


def answer_of(call: Call) -> Any:
    """A worker's answer; `WorkerFault` where there is none, `InputError` where the engine says the input is bad."""
    try:
        return ray.get(call.reference, timeout=max(0.0, call.deadline - time.monotonic()))
    except GetTimeoutError as error:
        raise WorkerFault(f"no answer: {call.limit} s") from error
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, InputError):
            raise cause from None
        raise WorkerFault(_one_line(cause)) from error
    except RayError as error:  # its process died, or was killed for memory
        raise WorkerFault(_one_line(error)) from error


def check_answer(call: Call, completions: Sequence[Completion]) -> None:
    if len(completions) != len(call.items):
        raise WorkerFault(f"it answered {len(completions)} of {len(call.items)} requests")
    stale = {c.policy_version for c in completions} - {call.version}
    if stale:
        raise WorkerFault(f"it answered with policy version {stale.pop()}, expected {call.version}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
