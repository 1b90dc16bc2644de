"""A pool of rollout workers: spreads requests over them, keeps their weights current, replaces the ones that die."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from kimi_rl.errors import RunError
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.rollout.worker import RolloutWorker
from kimi_rl.weight_sync import ObjectStoreSync, SyncTimes, WeightSync, WeightUpdate

log = logging.getLogger(__name__)


class RolloutPool:
    """Rollout workers behind one call.

    A request belongs to one chunk, a chunk runs on one worker, and its completions are stored by request index when
    the whole chunk is back: a worker that dies or hangs loses its chunk, which runs again elsewhere with the same
    seeds. So no request is lost and none is counted twice.
    """

    def __init__(
        self,
        *,
        workers: int,
        engine: str,
        model_folder: str,
        batch_size: int,
        max_model_len: int,
        seed: int,
        threads: int,
        device: str,
        engine_args: dict[str, Any],
        timeout_s: float,
        max_restarts: int,
        num_gpus: float = 0.0,
        sync: WeightSync | None = None,
    ):
        self.batch_size = batch_size
        self.timeout_s = timeout_s
        self.restarts = 0
        self.version = -1
        self._max_restarts = max_restarts
        self._sync = sync or ObjectStoreSync()
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
        self._workers = [self._start() for _ in range(workers)]

    def _start(self) -> ray.actor.ActorHandle:
        return RolloutWorker.options(**self._options).remote(**self._settings)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers; waits until every engine has loaded."""
        return [info["pid"] for info in ray.get([w.ready.remote() for w in self._workers], timeout=self.timeout_s)]

    # --- weights ----------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncTimes:
        """Bring every worker to `version`. Returns when all of them serve it; a dead or hung one is replaced."""
        if version == self.version:
            raise ValueError(f"version {version} is already being served")
        self._update, times = self._sync.pack(weights, version)
        start = time.perf_counter()
        sent = [(i, worker.update_weights.remote(self._update)) for i, worker in enumerate(self._workers)]
        for index, reference in sent:
            try:
                ray.get(reference, timeout=self.timeout_s)
            except (RayActorError, GetTimeoutError, RayTaskError) as error:
                self._replace(index, error)
        self.version = version
        times.pause_s = time.perf_counter() - start
        times.workers = len(self._workers)
        return times

    def _replace(self, index: int, error: Exception) -> None:
        """Start a new worker in place of a dead, hung or inconsistent one, holding the current weights."""
        while True:
            reason = _one_line(error)
            if self.restarts >= self._max_restarts:
                raise RunError(
                    f"rollout worker {index} failed and the limit of {self._max_restarts} restarts "
                    f"(rollout.max_restarts) is reached; last failure: {reason}"
                ) from error
            self.restarts += 1
            log.warning("rollout worker %d failed (%s); restart %d", index, reason, self.restarts)
            ray.kill(self._workers[index], no_restart=True)
            self._workers[index] = self._start()
            if self._update is None:
                return
            try:
                ray.get(self._workers[index].update_weights.remote(self._update), timeout=self.timeout_s)
                return
            except (RayActorError, GetTimeoutError, RayTaskError) as again:
                error = again

    # --- generation -------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Complete every request with the current policy version, in order."""
        chunk = min(self.batch_size, -(-len(requests) // len(self._workers)))
        waiting = deque(range(i, min(i + chunk, len(requests))) for i in range(0, len(requests), chunk))
        idle = deque(range(len(self._workers)))
        running: dict[ray.ObjectRef, tuple[int, range, float]] = {}
        results: list[Completion | None] = [None] * len(requests)

        while waiting or running:
            while waiting and idle:
                index, rows = idle.popleft(), waiting.popleft()
                reference = self._workers[index].generate.remote([requests[i] for i in rows], params, self.version)
                running[reference] = (index, rows, time.monotonic() + self.timeout_s)
            patience = max(0.0, min(deadline for _, _, deadline in running.values()) - time.monotonic())
            done, _ = ray.wait(list(running), num_returns=1, timeout=patience)
            if not done:  # the oldest request is past its deadline: its worker hangs
                done = [ref for ref, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
            for reference in done:
                index, rows, _ = running.pop(reference)
                try:
                    completions = ray.get(reference, timeout=0.001)
                    self._check(completions, rows)
                    for row, completion in zip(rows, completions, strict=True):
                        results[row] = completion
                except (RayActorError, GetTimeoutError, RayTaskError) as error:
                    waiting.appendleft(rows)
                    self._replace(index, error)
                idle.append(index)
        return results  # type: ignore[return-value]

    def _check(self, completions: Sequence[Completion], rows: range) -> None:
        if len(completions) != len(rows):
            raise RunError(f"a worker answered {len(completions)} of {len(rows)} requests")
        stale = {c.policy_version for c in completions} - {self.version}
        if stale:
            raise RunError(f"a worker answered with policy version {stale.pop()}, expected {self.version}")

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        self._workers = []


def _one_line(error: Exception) -> str:
    if isinstance(error, GetTimeoutError):
        return "no answer within rollout.timeout_s"
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:300]


def pool_settings(
    rollout: RolloutSection, *, model_folder: str, max_model_len: int, seed: int, threads: int, device: str
) -> dict[str, Any]:
    """`RolloutPool` arguments from a recipe's `rollout` section."""
    return dict(
        workers=rollout.workers,
        engine=rollout.engine,
        batch_size=rollout.batch_size,
        engine_args=rollout.engine_args,
        timeout_s=rollout.timeout_s,
        max_restarts=rollout.max_restarts,
        model_folder=model_folder,
        max_model_len=max_model_len,
        seed=seed,
        threads=threads,
        device=device,
        num_gpus=0.0 if device == "cpu" else 0.5 / rollout.workers,
    )
