"""Verdicts from killable child processes: a deadline and a memory limit each, order kept, no signals, no
threads.

A pool owns `workers` children (see `worker.py`). The calling thread itself feeds them and waits on their
pipes, so the pool works the same from the main thread, any other thread, a Ray actor, or inside a running
asyncio loop (where `averify_many` keeps the loop free).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence

from kimi_rl.errors import InputError, RunError
from kimi_rl.rewards.extract import final_answer
from kimi_rl.rewards.kinds import check_kind, decide_here
from kimi_rl.rewards.verdict import Verdict

_START_TIMEOUT_S = 120.0
# How many deadlines a comparison gets that others keep from computing.
_STARVED_FACTOR = 4
# Beyond the longest wait, which the worker itself enforces: only a worker that was stopped gets here.
_GRACE_S = 10.0
_CACHE_SIZE = 100_000
Key = tuple[str, str, str]


class _Worker:
    """Client side of one worker process."""

    def __init__(self, memory_mb: int, deadline_s: float):
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # One thread each: many workers with a BLAS thread pool apiece would fight over the cores.
        environment["OMP_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kimi_rl.rewards.worker", str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._fd = self._process.stdin, self._process.stdout.fileno()
        self._buffer = b""
        self._deadline_s = deadline_s
        self._longest_s = _STARVED_FACTOR * deadline_s
        self.ready = False
        self.task: Key | None = None
        self.expires = time.monotonic() + _START_TIMEOUT_S

    def fileno(self) -> int:
        return self._fd

    def send(self, task: Key) -> None:
        answer, gold, kind = task
        request = {
            "kind": kind,
            "answer": answer,
            "gold": gold,
            "deadline_s": self._deadline_s,
            "longest_s": self._longest_s,
        }
        data = memoryview(json.dumps(request).encode() + b"\n")
        self.task, self.expires = task, time.monotonic() + self._longest_s + _GRACE_S
        try:
            while data:
                data = data[self._stdin.write(data) :]
        except BrokenPipeError:
            pass  # The end of its output says the same, where replies are read.

    def receive(self) -> dict | None:
        """The reply if a whole line is there, else {}; None if the worker has ended."""
        chunk = os.read(self._fd, 1 << 16)
        if not chunk:
            return None
        self._buffer += chunk
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            reply = json.loads(line)
            if "loading" not in reply:
                return reply
            self.expires = time.monotonic() + (_START_TIMEOUT_S if reply["loading"] else self._longest_s + _GRACE_S)
        return {}

    def stop(self) -> None:
        """End the process and reap it. Its executor dies with it."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._process.stdout.close()  # type: ignore[union-attr]


class VerifierPool:
    """Verifies completions in `workers` child processes.

    `deadline_s`: wall-clock seconds of one verdict; passing it is `timeout` (up to four times as long for a
    comparison that other processes keep from computing, so that a crowded machine does not change rewards).
    `memory_mb`: address space of one computing process; passing it is `crashed`. Children start on the first
    verdict that needs one. `correct`, `wrong` and `unparseable_gold` verdicts are cached by (answer, gold,
    kind); `timeout` and `crashed` may be the machine's fault and are shared only within one call.
    Thread-safe; calls from several threads take turns.
    """

    def __init__(self, workers: int = 1, deadline_s: float = 5.0, memory_mb: int = 2048):
        for name, value in (("workers", workers), ("deadline_s", deadline_s), ("memory_mb", memory_mb)):
            if not value > 0:
                raise InputError(f"VerifierPool: {name} must be above 0, found {value}")
        self.workers, self.deadline_s, self.memory_mb = workers, deadline_s, memory_mb
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        self._cache: OrderedDict[Key, Verdict] = OrderedDict()
        self._pid = os.getpid()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._pid)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children. Later calls raise RunError."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def warm_up(self) -> None:
        """Start the children now and wait until they are ready, so that the first batch does not."""
        with self._lock:
            self._check_open()
            self._fill(self.workers)
            while not all(worker.ready for worker in self._pool):
                self._poll(deque(), {})

    def verify(
        self, completion: str, gold: str, *, kind: str = "math", extract: Sequence[str] = ("boxed", "hash")
    ) -> Verdict:
        """One verdict; see `verify_many`."""
        return self.verify_many([(completion, gold)], kind=kind, extract=extract)[0]

    def verify_many(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        kind: str = "math",
        extract: Sequence[str] = ("boxed", "hash"),
    ) -> list[Verdict]:
        """Verdicts of (completion, gold) pairs, in their order.

        `kind`: `math`, `exact`, `integer`, `choice` or `package.module:function` (called as function(answer,
        gold) in a child, returns bool, float, None or Verdict). `extract`: allowed final-answer markers;
        empty: the whole completion is the answer. A gold that ends in `#### x` or holds a `\\boxed{x}` is
        read as x. Raises InputError on an unknown kind or marker and on a pair that is not two strings.
        """
        check_kind(kind)
        verdicts: list[Verdict | None] = [None] * len(pairs)
        waiting: dict[Key, list[int]] = {}
        for row, pair in enumerate(pairs):
            found = _prepare(row, pair, kind, extract)
            if isinstance(found, Verdict):
                verdicts[row] = found
            else:
                waiting.setdefault(found, []).append(row)
        with self._lock:
            self._check_open()
            results = self._compute(waiting)
        for key, rows in waiting.items():
            for row in rows:
                verdicts[row] = results[key]
        return verdicts  # type: ignore[return-value]

    async def averify_many(self, pairs: Sequence[tuple[str, str]], **options: object) -> list[Verdict]:
        """`verify_many` in a thread, so that an asyncio loop goes on meanwhile."""
        return await asyncio.to_thread(self.verify_many, pairs, **options)

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("VerifierPool: it is closed")
        if os.getpid() != self._pid:  # A forked copy must not talk over its parent's pipes.
            self._pool = []
            self._pid = os.getpid()
            self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._pid)

    def _compute(self, keys: Iterable[Key]) -> dict[Key, Verdict]:
        results: dict[Key, Verdict] = {}
        todo: deque[Key] = deque()
        for key in keys:
            if key in self._cache:
                self._cache.move_to_end(key)
                results[key] = self._cache[key]
            else:
                todo.append(key)
        total = len(results) + len(todo)
        try:
            self._fill(min(self.workers, len(todo)))
            while len(results) < total:
                self._poll(todo, results)
        except BaseException:
            # An interrupt left requests under way; their late replies must not answer the next call.
            _stop_all(self._pool, self._pid)
            raise
        for key, verdict in results.items():
            if verdict.status not in ("timeout", "crashed"):
                self._cache[key] = verdict
        while len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return results

    def _fill(self, size: int) -> None:
        while len(self._pool) < size:
            self._pool.append(_Worker(self.memory_mb, self.deadline_s))

    def _poll(self, todo: deque[Key], results: dict[Key, Verdict]) -> None:
        """Hand out work, wait for the first replies or the next expiry, take them in."""
        for worker in self._pool:
            if worker.ready and worker.task is None and todo:
                worker.send(todo.popleft())
        busy = [worker for worker in self._pool if worker.task is not None or not worker.ready]
        wait = min(worker.expires for worker in busy) - time.monotonic()
        # poll, not select: a Ray actor may hold more than 1024 open files.
        poller = select.poll()
        for worker in busy:
            poller.register(worker, select.POLLIN)
        readable = {fd for fd, _ in poller.poll(max(0.0, wait) * 1000)}
        for worker in busy:
            if worker.fileno() in readable:
                reply = worker.receive()
                if reply is None:
                    self._replace(worker, "crashed", "the verifier worker died", results)
                elif reply and not worker.ready:
                    worker.ready = True
                elif "input_error" in reply:
                    raise InputError(reply["input_error"])
                elif reply:
                    assert worker.task is not None
                    answer = worker.task[0]
                    results[worker.task] = Verdict(reply["value"], reply["status"], answer, reply["reason"])
                    worker.task = None
            elif time.monotonic() > worker.expires:
                self._replace(worker, "timeout", f"no verdict within {self.deadline_s:g} s", results)

    def _replace(self, worker: _Worker, status: str, reason: str, results: dict[Key, Verdict]) -> None:
        worker.stop()
        self._pool.remove(worker)
        if not worker.ready:
            raise RunError("VerifierPool: a verifier worker could not start; its error is in the log above")
        if worker.task is not None:
            results[worker.task] = Verdict.of(status, worker.task[0], reason)  # type: ignore[arg-type]
        self._pool.append(_Worker(self.memory_mb, self.deadline_s))


def _stop_all(pool: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        while pool:
            pool.pop().stop()


def _prepare(row: int, pair: tuple[str, str], kind: str, extract: Sequence[str]) -> Verdict | Key:
    """The verdict if it can be given at once, else the key of the comparison to make."""
    try:
        completion, gold = pair
    except (TypeError, ValueError):
        raise InputError(f"row {row}: expected (completion, gold), found {type(pair).__name__}") from None
    for name, text in (("completion", completion), ("gold", gold)):
        if not isinstance(text, str):
            raise InputError(f"row {row}: {name} must be a string, found {type(text).__name__}")
    answer = final_answer(completion, extract)
    if kind == "math" and ("####" in gold or "\\boxed" in gold):
        gold = final_answer(gold, ("boxed", "hash")) or ""
    if not gold.strip():
        return Verdict.of("unparseable_gold", answer, "the gold answer is empty")
    if answer is None:
        wanted = {"boxed": "\\boxed{...}", "hash": "#### ...", "answer": "Answer: ..."}
        return Verdict.of(
            "no_answer",
            None,
            "no final answer: looked for " + " or ".join(wanted[m] for m in extract)
            if extract
            else "the answer is empty",
        )
    outcome = decide_here(answer, gold, kind)
    return Verdict.of(outcome[0], answer, outcome[1]) if outcome else (answer, gold, kind)


_default: VerifierPool | None = None
_default_lock = threading.Lock()


def _default_pool() -> VerifierPool:
    global _default
    with _default_lock:
        if _default is None:
            _default = VerifierPool()
            atexit.register(_default.close)
        return _default


def verify(
    completion: str, gold: str, *, kind: str = "math", extract: Sequence[str] = ("boxed", "hash")
) -> Verdict:
    """The verdict on one completion, from a pool of one worker that all calls share. See
    `VerifierPool.verify_many`.
    """
    return _default_pool().verify(completion, gold, kind=kind, extract=extract)


def verify_answer(answer: str, gold: str, *, kind: str = "math") -> Verdict:
    """The verdict on a bare final answer, with nothing to extract."""
    return verify(answer, gold, kind=kind, extract=())


def verify_cases(
    rows: Iterable[Mapping[str, str]],
    *,
    kind: str = "math",
    extract: Sequence[str] = ("boxed", "hash"),
    pool: VerifierPool | None = None,
) -> list[Verdict]:
    """Verdicts of rows with `gold` and either `completion` or a bare `answer`, in order.

    Raises InputError naming the first row (counted from 1, as lines of a file) that has neither or both.
    """
    pairs: list[tuple[str, str, bool]] = []
    for number, row in enumerate(rows, 1):
        given = [name for name in ("completion", "answer") if row.get(name) is not None]
        if len(given) != 1 or not isinstance(row.get("gold"), str) or not isinstance(row[given[0]], str):
            raise InputError(
                f"row {number}: needs strings `gold` and exactly one of `completion` and `answer`, "
                f"found {sorted(row)}"
            )
        pairs.append((row[given[0]], row["gold"], given[0] == "answer"))
    pool = pool or _default_pool()
    verdicts: dict[int, Verdict] = {}
    for bare in (False, True):
        chosen = [at for at, pair in enumerate(pairs) if pair[2] == bare]
        found = pool.verify_many([pairs[at][:2] for at in chosen], kind=kind, extract=() if bare else extract)
        verdicts.update(zip(chosen, found, strict=True))
    return [verdicts[at] for at in range(len(pairs))]
