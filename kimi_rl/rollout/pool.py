"""A pool of rollout workers: spreads requests over them, keeps their weights current, replaces the ones that die."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from kimi_rl.errors import InputError, RunError
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.rollout.worker import EngineFactory, RolloutWorker
from kimi_rl.weight_sync import SyncTimes, WeightSync, WeightUpdate, card_of, make_sync

log = logging.getLogger(__name__)


class WorkerFault(Exception):
    """A worker died, hung, raised, or gave an answer that cannot be used. It is replaced."""


@dataclass
class _Seat:
    """One place in the pool and the worker that holds it. `info` is what `start` returned, None until it has."""

    worker: ray.actor.ActorHandle
    starting: ray.ObjectRef
    deadline: float
    info: dict[str, Any] | None = None
    restarts: int = 0


class RolloutPool:
    """Rollout workers behind one call.

    A request belongs to one chunk, a chunk runs on one worker, and its completions are stored by request index when
    the whole chunk is back: a worker that dies or hangs loses its chunk, which runs again elsewhere with the same
    seeds. So no request is lost and none is counted twice. A replacement is given the current weights before anything
    else. `RunError` once one place in the pool has used up its `max_restarts`; an `InputError` of an engine is raised
    as it is, at once.

    Engines load in the background; the first `update_weights` waits for them, each up to `start_timeout_s` after its
    start. `timeout_s` bounds every other answer.
    """

    def __init__(
        self,
        *,
        workers: int,
        engine: str | EngineFactory,
        model_folder: str,
        batch_size: int,
        max_model_len: int,
        seed: int,
        threads: int,
        device: str,
        engine_args: dict[str, Any],
        timeout_s: float,
        start_timeout_s: float,
        max_restarts: int,
        num_gpus: float = 0.0,
        weight_sync: str = "auto",
    ):
        self.batch_size = batch_size
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.restarts = 0  # of all workers
        self.version = -1  # that every worker serves; -1: none yet, or an update is under way
        self._max_restarts = max_restarts
        self._device = device
        self._weight_sync = weight_sync
        self._sync: WeightSync | None = None  # chosen when the workers are up and have said what they serve
        self._update: WeightUpdate | None = None
        self._settings = dict(
            engine=engine,
            threads=threads,
            model_folder=model_folder,
            batch_size=batch_size,
            max_model_len=max_model_len,
            seed=seed,
            device=device,
            engine_args=engine_args,
        )
        self._options = dict(num_cpus=0, num_gpus=num_gpus, max_restarts=0, max_concurrency=1)
        self._seats = [self._start() for _ in range(workers)]

    # --- workers ----------------------------------------------------------------------------------------------

    def _start(self) -> _Seat:
        worker = RolloutWorker.options(**self._options).remote(**self._settings)
        return _Seat(worker, worker.start.remote(), time.monotonic() + self.start_timeout_s)

    def _await_start(self, seat: _Seat) -> None:
        if seat.info is None:
            left = max(0.0, seat.deadline - time.monotonic())
            seat.info = _get(seat.starting, left, f"starting within rollout.start_timeout_s ({self.start_timeout_s:g})")

    def wait_ready(self) -> None:
        """Wait until every engine has loaded; one that does not is replaced."""
        for index, seat in enumerate(self._seats):
            try:
                self._await_start(seat)
            except WorkerFault as fault:
                self._replace(index, fault)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers; waits until every engine has loaded."""
        self.wait_ready()
        return [seat.info["pid"] for seat in self._seats]

    def _replace(self, index: int, fault: WorkerFault) -> None:
        """Start a new worker in place of a dead, hung or inconsistent one, holding the current weights."""
        while True:
            old = self._seats[index]
            ray.kill(old.worker, no_restart=True)
            if old.restarts >= self._max_restarts:
                raise RunError(
                    f"rollout worker {index} failed, and its {self._max_restarts} restarts (rollout.max_restarts) are "
                    f"used up; last failure: {fault}"
                ) from fault
            self.restarts += 1
            log.warning("rollout worker %d failed (%s); restart %d", index, fault, old.restarts + 1)
            seat = self._seats[index] = self._start()
            seat.restarts = old.restarts + 1
            try:
                self._await_start(seat)
                if self._update is not None:
                    self._get(seat.worker.update_weights.remote(self._update), "loading weights")
                return
            except WorkerFault as again:
                fault = again

    def _get(self, reference: ray.ObjectRef, doing: str, timeout_s: float | None = None) -> Any:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return _get(reference, timeout_s, f"{doing} within rollout.timeout_s ({self.timeout_s:g})")

    # --- weights ----------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncTimes:
        """Bring every worker to `version`. Returns when all of them serve it; a dead or hung one is replaced."""
        if self._update is not None and version <= self._update.version:
            raise ValueError(f"version {version} is not newer than {self._update.version}, which was sent before")
        self.wait_ready()
        if self._sync is None:
            self._sync = make_sync(
                self._weight_sync,
                self._seats[0].info["dtypes"],
                learner_card=card_of(self._device),
                worker_cards={seat.info["card"] for seat in self._seats},
            )
        self.version = -1
        self._update, times = self._sync.pack(weights, version)
        start = time.perf_counter()
        deadline = time.monotonic() + self.timeout_s
        sent = [seat.worker.update_weights.remote(self._update) for seat in self._seats]
        for index, reference in enumerate(sent):
            try:
                self._get(reference, "loading weights", max(0.0, deadline - time.monotonic()))
            except WorkerFault as fault:
                self._replace(index, fault)
        self.version = version
        times.pause_s = time.perf_counter() - start
        times.workers = len(self._seats)
        return times

    # --- generation -------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Complete every request with the current policy version, in order."""
        if self.version < 0:
            raise RuntimeError("no policy version is being served; call update_weights first")
        if not requests:
            return []
        chunk = min(self.batch_size, -(-len(requests) // len(self._seats)))
        waiting = deque(range(i, min(i + chunk, len(requests))) for i in range(0, len(requests), chunk))
        idle = deque(range(len(self._seats)))
        running: dict[ray.ObjectRef, tuple[int, range, float]] = {}
        results: list[Completion | None] = [None] * len(requests)

        while waiting or running:
            while waiting and idle:
                index, rows = idle.popleft(), waiting.popleft()
                worker = self._seats[index].worker
                reference = worker.generate.remote([requests[i] for i in rows], params, self.version)
                running[reference] = (index, rows, time.monotonic() + self.timeout_s)
            patience = max(0.0, min(deadline for _, _, deadline in running.values()) - time.monotonic())
            done, _ = ray.wait(list(running), num_returns=1, timeout=patience)
            if not done:  # some request is past its deadline: its worker hangs
                done = [ref for ref, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
            for reference in done:
                index, rows, deadline = running.pop(reference)
                try:
                    completions = self._get(reference, "generating", max(0.0, deadline - time.monotonic()))
                    self._check(completions, rows)
                    for row, completion in zip(rows, completions, strict=True):
                        results[row] = completion
                except WorkerFault as fault:
                    waiting.appendleft(rows)
                    self._replace(index, fault)
                idle.append(index)
        return results  # type: ignore[return-value]

    def _check(self, completions: Sequence[Completion], rows: range) -> None:
        if len(completions) != len(rows):
            raise WorkerFault(f"it answered {len(completions)} of {len(rows)} requests")
        stale = {c.policy_version for c in completions} - {self.version}
        if stale:
            raise WorkerFault(f"it answered with policy version {stale.pop()}, expected {self.version}")

    def close(self) -> None:
        for seat in self._seats:
            ray.kill(seat.worker, no_restart=True)
        self._seats = []


def _get(reference: ray.ObjectRef, timeout_s: float, doing: str) -> Any:
    """A worker's answer; `WorkerFault` where there is none, `InputError` where the engine says the input is bad."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise WorkerFault(f"no answer: {doing} s") from error
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, InputError):
            raise cause from None
        raise WorkerFault(_one_line(cause)) from error
    except RayError as error:  # its process died, or was killed for memory
        raise WorkerFault(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def pool_settings(
    rollout: RolloutSection, *, model_folder: str, max_model_len: int, seed: int, threads: int, device: str
) -> dict[str, Any]:
    """`RolloutPool` arguments from a recipe's `rollout` section."""
    if rollout.weight_sync == "cuda_ipc" and device == "cpu":
        raise InputError("rollout.weight_sync: cuda_ipc needs an NVIDIA card, and this run is on a CPU; use auto")
    return dict(
        workers=rollout.workers,
        engine=rollout.engine,
        batch_size=rollout.batch_size,
        engine_args=rollout.engine_args,
        timeout_s=rollout.timeout_s,
        start_timeout_s=rollout.start_timeout_s,
        weight_sync=rollout.weight_sync,
        max_restarts=rollout.max_restarts,
        model_folder=model_folder,
        max_model_len=max_model_len,
        seed=seed,
        threads=threads,
        device=device,
        num_gpus=0.0 if device == "cpu" else 0.5 / rollout.workers,
    )
