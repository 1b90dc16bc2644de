"""A pool of rollout workers: spreads requests over them, keeps their weights current, replaces the ones that die."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch

from kimi_rl.card_share import card_share, part
from kimi_rl.errors import InputError, RunError
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.rollout.replicas import share_memory
from kimi_rl.rollout.seats import Call, Item, Job, Seat, WorkerFault, answer_of, check_answer
from kimi_rl.rollout.worker import EngineFactory, RolloutWorker
from kimi_rl.seeds import derive_seed
from kimi_rl.weight_sync import SyncTimes, WeightSync, WeightUpdate, card_of, make_sync

log = logging.getLogger(__name__)

# A worker that takes this many times longer than the slowest answer so far is slow: an idle one gets its work as well.
_SLOW = 2.0
_SLOW_AT_LEAST_S = 5.0
_TURN_S = 0.05  # how long the pool's own thread waits for an answer before it looks for new orders


class RolloutPool:
    """Rollout workers behind one call.

    A request is answered by one worker at a time, in a chunk with others, and its completion counts once, whoever
    answers first: a worker that dies or hangs loses its chunk, which runs again elsewhere with the same seeds, and
    what a slow worker holds up is given to an idle one as well. A replacement starts while the others go on, and gets
    the current weights before anything else. Once a worker has used up its `max_restarts` the pool goes on with those
    left, down to `min_workers`; then it is a `RunError`. An `InputError` of an engine is raised as it is, at once.

    Engines load in the background; the first `update_weights` waits for them, each up to `start_timeout_s` after its
    start. `timeout_s` bounds every other answer.

    Two ways to use it. *Plain*: `update_weights` and `generate`, each of which returns when all is done. *Overlapped*,
    after `run_in_background`: `publish` hands in new weights without waiting, each worker takes them before its next
    chunk, and calls from several threads are answered side by side. With `slice_tokens` set a worker gives a completion
    back after so many tokens, finished or not, and whoever goes on with it may hold newer weights (partial rollouts,
    Kimi k1.5, section 2.6.2); `Completion.segments` says which version drew which tokens.
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
        min_workers: int | None = None,
        slice_tokens: int | None = None,
        num_gpus: float = 0.0,
        weight_sync: str = "auto",
    ):
        self.batch_size = batch_size
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.slice_tokens = slice_tokens
        self.restarts = 0  # of all workers
        self.version = -1  # that is being served; -1: none yet, or an update is under way
        self._max_restarts = max_restarts
        self._min_workers = workers if min_workers is None else min_workers
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
        self._waiting: deque[Item] = deque()
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._error: Exception | None = None  # ends the pool: raised to whoever waits for an answer
        self._hold_loads = False
        self._turn = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closing = False
        self._seats = [self._start(Seat(i, None)) for i in range(workers)]

    # --- workers ----------------------------------------------------------------------------------------------

    def _start(self, seat: Seat) -> Seat:
        seat.worker = RolloutWorker.options(**self._options).remote(**self._settings)
        seat.info, seat.version = None, -1
        self._ask(seat, "start", seat.worker.start.remote(), self.start_timeout_s)
        return seat

    def _ask(self, seat: Seat, kind: str, reference: ray.ObjectRef, timeout_s: float, **values: Any) -> None:
        doing, limit = {
            "start": ("starting", "rollout.start_timeout_s"),
            "load": ("loading weights", "rollout.timeout_s"),
            "generate": ("generating", "rollout.timeout_s"),
        }[kind]
        now = time.monotonic()
        text = f"{doing} within {limit} ({timeout_s:g})"
        seat.call = self._calls[reference] = Call(kind, seat, reference, now, now + timeout_s, text, **values)

    def _replace(self, seat: Seat, fault: WorkerFault) -> None:
        """Start a new worker in place of a dead, hung or inconsistent one, or go on without it."""
        ray.kill(seat.worker, no_restart=True)
        seat.call = None
        if seat.restarts >= self._max_restarts:
            self._seats.remove(seat)
            if len(self._seats) < self._min_workers:
                raise RunError(
                    f"rollout worker {seat.index} failed, and its {self._max_restarts} restarts (rollout.max_restarts) "
                    f"are used up; last failure: {fault}"
                ) from fault
            log.warning("rollout worker %d failed (%s); going on with %d", seat.index, fault, len(self._seats))
            return
        self.restarts += 1
        seat.restarts += 1
        log.warning("rollout worker %d failed (%s); restart %d", seat.index, fault, seat.restarts)
        self._start(seat)

    def wait_ready(self) -> None:
        """Wait until every engine has loaded; one that does not is replaced."""
        self._wait(lambda: all(seat.info is not None for seat in self._seats))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers; waits until every engine has loaded."""
        self.wait_ready()
        return [seat.info["pid"] for seat in self._seats]

    def worker_cards(self) -> set[str | None]:
        """Ids of the cards that the workers are on (`card_of`), None for the CPU; waits until they have loaded."""
        self.wait_ready()
        return {seat.info["card"] for seat in self._seats}

    def busy_seconds(self) -> tuple[float, int]:
        """Seconds that the workers have spent generating, all together, and how many workers there are."""
        with self._turn:
            now = time.monotonic()
            running = sum(now - call.started for call in self._calls.values() if call.kind == "generate")
            return sum(seat.busy_s for seat in self._seats) + running, len(self._seats)

    # --- weights ----------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncTimes:
        """Bring every worker to `version`. Returns when all of them serve it; a dead or hung one is replaced."""
        self.wait_ready()
        times = self._pack(weights, version)
        start = time.perf_counter()
        self._wait(lambda: all(seat.version == version for seat in self._seats))
        self.version = version
        times.pause_s = time.perf_counter() - start
        times.workers = len(self._seats)
        return times

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncTimes:
        """Hand in `version` and return; every worker loads and verifies it before its next chunk."""
        self._wait(lambda: any(seat.info is not None for seat in self._seats))
        # A transport may write into a buffer that workers are still reading the version before from.
        self._hold_loads = True
        try:
            self._wait(lambda: all(call.kind != "load" for call in self._calls.values()))
            times = self._pack(weights, version)
        finally:
            self._hold_loads = False
        self.version = version
        times.workers = len(self._seats)
        return times

    def _pack(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncTimes:
        if self._update is not None and version <= self._update.version:
            raise ValueError(f"version {version} is not newer than {self._update.version}, which was sent before")
        if self._sync is None:
            infos = [seat.info for seat in self._seats if seat.info is not None]
            self._sync = make_sync(
                self._weight_sync,
                infos[0]["dtypes"],
                learner_card=card_of(self._device),
                worker_cards={info["card"] for info in infos},
            )
        self.version = -1
        update, times = self._sync.pack(weights, version)
        with self._turn:
            self._update = update
        return times

    # --- generation -------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, any_version: bool = False
    ) -> list[Completion]:
        """Complete every request, in order.

        With the current policy version; `any_version`: with whatever is newest at each chunk. In the background mode
        requests of the first kind go before those of the second.
        """
        if self.version < 0 and not any_version:
            raise RuntimeError("no policy version is being served; call update_weights first")
        if not requests:
            return []
        with self._turn:
            chunk = min(self.batch_size, -(-len(requests) // max(1, len(self._seats))))
            job = Job(params, chunk, None if any_version else self.version, len(requests))
            job.results = [None] * len(requests)
            items = [Item(job, row, request) for row, request in enumerate(requests)]
            if any_version:
                self._waiting.extend(items)
            else:
                self._waiting.extendleft(reversed(items))
            self._dispatch()
        self._wait(lambda: job.left == 0)
        return job.results

    def _dispatch(self) -> None:
        """Give every idle worker something to do."""
        for seat in list(self._seats):
            if seat.call is not None or seat.info is None or self._update is None:
                continue
            update = self._update
            if seat.version != update.version:
                if not self._hold_loads:
                    reference = seat.worker.update_weights.remote(update)
                    self._ask(seat, "load", reference, self.timeout_s, version=update.version, update=update)
                continue
            items = self._next_items() or self._held_up_items()
            if items:
                params = self._slice(items[0].job)
                requests = [item.next_request(_reseed) for item in items]
                reference = seat.worker.generate.remote(requests, params, seat.version)
                values = dict(version=seat.version, items=items, asked=params.max_tokens)
                self._ask(seat, "generate", reference, self.timeout_s, **values)

    def _slice(self, job: Job) -> SamplingParams:
        params = job.params
        if self.slice_tokens is None or self.slice_tokens >= params.max_tokens or job.version is not None:
            return params
        return replace(params, max_tokens=self.slice_tokens)

    def _next_items(self) -> list[Item]:
        """The next chunk: waiting items of one kind."""
        taken: list[Item] = []
        left: list[Item] = []
        while self._waiting and (not taken or len(taken) < taken[0].job.chunk):
            item = self._waiting.popleft()
            job = item.job
            if item.done:
                continue
            if job.version is not None and job.version != self._update.version:
                # Weights move only when nobody waits for a pinned version; see `generate`.
                raise RunError(f"asked for policy version {job.version}, {self._update.version} is being served")
            same = not taken or (job.params == taken[0].job.params and job.version == taken[0].job.version)
            (taken if same else left).append(item)
        self._waiting.extendleft(reversed(left))
        return taken

    def _held_up_items(self) -> list[Item]:
        """What a slow worker has been busy with for too long. Slices of completions come back soon enough anyway."""
        if self.slice_tokens is not None:
            return []
        now = time.monotonic()
        for call in self._calls.values():
            if call.kind != "generate" or call.version != self._update.version:
                continue
            items = [item for item in call.items if not item.done]
            slowest = max((item.job.slowest_s for item in items), default=0.0)
            slow = slowest and now - call.started > max(_SLOW_AT_LEAST_S, _SLOW * slowest)
            if slow and not any(self._is_with_another(item, call) for item in items):
                return items
        return []

    # --- the loop ---------------------------------------------------------------------------------------------

    @property
    def in_background(self) -> bool:
        """Whether a thread of the pool's own drives the workers."""
        return self._thread is not None

    def run_in_background(self) -> None:
        """Drive the workers from a thread of the pool's own from here on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="rollout pool")
            self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            with self._turn:
                if self._error is None:
                    try:
                        self._drive(0.0)
                    except Exception as error:
                        self._error = error
                self._turn.notify_all()
                calls = list(self._calls)
            if calls:
                ray.wait(calls, num_returns=1, timeout=_TURN_S)
            else:
                time.sleep(_TURN_S)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds. Drives the workers meanwhile where no thread of the pool's own does."""
        with self._turn:
            while True:
                if self._error is not None:
                    raise self._error
                if condition():
                    return
                if self._closing:
                    raise RunError("the rollout pool was closed")
                if self.in_background:
                    self._turn.wait(timeout=1.0)
                else:
                    self._drive(1.0)

    def _drive(self, patience_s: float) -> None:
        """Hand out work, then take in the answers that come within `patience_s`."""
        self._dispatch()
        if not self._calls:
            return
        nearest = min(call.deadline for call in self._calls.values()) - time.monotonic()
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=max(0.0, min(patience_s, nearest)))
        now = time.monotonic()
        for reference in done or [ref for ref, call in self._calls.items() if call.deadline <= now]:
            call = self._calls.pop(reference)
            call.seat.call = None
            try:
                self._take_in(call, answer_of(call))
            except WorkerFault as fault:
                again = [item for item in call.items if not item.done and not self._is_with_another(item, call)]
                self._waiting.extendleft(reversed(again))
                self._replace(call.seat, fault)
        self._dispatch()

    def _take_in(self, call: Call, answer: Any) -> None:
        seat = call.seat
        if call.kind == "start":
            seat.info = answer
        elif call.kind == "load":
            seat.version = call.version
        else:
            check_answer(call, answer)
            seconds = time.monotonic() - call.started
            seat.busy_s += seconds
            unfinished = []
            for item, completion in zip(call.items, answer, strict=True):
                if item.done:
                    continue  # another worker was faster
                item.add(completion, call.asked)
                item.job.slowest_s = max(item.job.slowest_s, seconds)
                if not item.done and not self._is_with_another(item, call):
                    unfinished.append(item)
            self._waiting.extendleft(reversed(unfinished))

    def _is_with_another(self, item: Item, than: Call) -> bool:
        return any(item in call.items for call in self._calls.values() if call is not than)

    def close(self) -> None:
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout=10)
        for seat in self._seats:
            ray.kill(seat.worker, no_restart=True)
        self._seats = []
        if self._sync is not None:
            self._sync.close()


def _reseed(seed: int, position: int) -> int:
    """Seed of a completion that goes on at `position`."""
    return derive_seed(seed, "continued", position)


def pool_settings(
    rollout: RolloutSection, *, model_folder: str, max_model_len: int, seed: int, threads: int, device: str
) -> dict[str, Any]:
    """`RolloutPool` arguments from a recipe's `rollout` section, whose `workers` are settled (`settle_workers`)."""
    if rollout.weight_sync in ("cuda_ipc", "nccl") and device == "cpu":
        raise InputError(
            f"rollout.weight_sync: {rollout.weight_sync} needs an NVIDIA card, and this run is on a CPU; use auto"
        )
    share = card_share()
    neighbours = -(-rollout.workers // max(1, rollout.cards))  # workers on a card
    on_card = share_memory(rollout, neighbours / share)
    return dict(
        workers=rollout.workers,
        engine=rollout.engine,
        batch_size=rollout.batch_size,
        engine_args=rollout.engine_args if device == "cpu" else on_card,
        timeout_s=rollout.timeout_s,
        start_timeout_s=rollout.start_timeout_s,
        weight_sync=rollout.weight_sync,
        max_restarts=rollout.max_restarts,
        min_workers=rollout.min_workers,
        slice_tokens=rollout.slice_tokens,
        model_folder=model_folder,
        max_model_len=max_model_len,
        seed=seed,
        threads=threads,
        device=device,
        num_gpus=0.0 if device == "cpu" else part((1.0 if rollout.cards else 0.5 * share) / neighbours),
    )
