"""Weights from card to card, through NCCL (gloo where tensors are on a CPU: the same code, for tests).

Each worker has a process group of two with the learner, apart from every other group in their processes (vLLM has one
of its own). One group of all would need everybody at the same moment; but workers die, hang and come back, and with
overlapped rollouts each takes new weights at a time of its own. A worker asks for the version it was told of over a
TCP connection, on which either side also sees at once that the other has gone: NCCL by itself would wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import ray
import torch
import torch.distributed as dist

from kimi_rl.weight_sync.transports import Slot, StagedSync, buffer_size, card_of, export_buffer, import_buffer
from kimi_rl.weight_sync.update import SyncTimes, WeightSyncError, WeightUpdate

log = logging.getLogger(__name__)

_SENDER = "weight sync to a worker"  # name of a thread
_JOIN = timedelta(seconds=60)  # for the two sides of a group to find each other
_TURN_S = 0.001  # between looks at whether a transfer is done


@dataclass(frozen=True)
class Endpoint:
    """Where a learner serves weights."""

    backend: str  # "nccl" or "gloo"
    address: tuple[str, int]  # of its listener
    key: bytes  # shown by a worker that connects


class NcclSync(StagedSync):
    """The learner's side: a staging buffer, and a thread for each worker that sends it when the worker asks."""

    def __init__(self, served: dict[str, torch.dtype] | None = None, backend: str = "nccl"):
        super().__init__(served)
        self.name = backend
        host, key = ray.util.get_node_ip_address(), secrets.token_bytes(16)
        self._listener = Listener((host, 0), backlog=64, authkey=key)
        self._endpoint = Endpoint(backend, self._listener.address, key)
        self._ready = -1  # version that the buffer holds; -1: none, or it is being written
        self._closing = False
        threading.Thread(target=self._accept, daemon=True, name="weight sync").start()

    def export(self, buffer: torch.Tensor) -> Any:
        # NCCL takes no two processes on one card; workers beside the learner map the buffer instead.
        return export_buffer(buffer) if buffer.is_cuda else None

    def bucket(self, version: int, handle: Any, slots: tuple[Slot, ...]) -> PairBucket:
        return PairBucket(self._endpoint, version, handle, slots)

    def pack(self, weights: Any, version: int) -> tuple[WeightUpdate, SyncTimes]:
        self._ready = -1
        packed = super().pack(weights, version)
        self._ready = version
        return packed

    def _accept(self) -> None:
        while not self._closing:
            with contextlib.suppress(Exception):  # whoever broke off while connecting
                connection = self._listener.accept()
                if not self._closing:
                    name = f"{_SENDER} {connection.fileno()}"
                    threading.Thread(target=self._serve, args=(connection,), daemon=True, name=name).start()
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        """Send one worker what it asks for, until it goes away."""
        line, group = _Line(connection), None
        try:
            group = _join(line, self._endpoint.backend, rank=0)
            # A stream of its own, so that nothing waits for what the learner has queued. The buffer is ready: see pack.
            stream = torch.cuda.Stream(self._buffer.device) if self._endpoint.backend == "nccl" else None
            while True:
                refusal = "" if line.hear() == self._ready else f"the learner holds version {self._ready}"
                line.say(refusal)
                if not refusal:
                    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                        _transfer(group, self._buffer, line)
        except (EOFError, OSError):
            pass  # the worker is gone; the pool sees that too
        except Exception as error:
            log.warning("weight sync: sending to a worker failed: %s", error)
            with contextlib.suppress(OSError):
                line.say(str(error))
        finally:
            connection.close()  # first, so that the worker waits no longer
            if group is not None:
                group.abort()  # ends what NCCL has running on the card

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(Exception):
            Client(self._endpoint.address, authkey=self._endpoint.key).close()  # wakes the thread that accepts


@dataclass(frozen=True)
class PairBucket:
    """A learner's staging buffer, for a worker to receive, or to map where it is on the learner's card."""

    endpoint: Endpoint
    version: int
    handle: Any
    slots: tuple[Slot, ...]

    def open(self) -> list[tuple[str, torch.Tensor]]:
        """(checkpoint name, tensor): views of a buffer that no later version has overwritten yet."""
        if self.handle is not None and self.handle.card == card_of("cuda"):
            buffer = import_buffer(self.handle)
        else:
            buffer = _receive(self.endpoint, self.version, buffer_size(self.slots))
        return [(slot.name, slot.view(buffer)) for slot in self.slots]


class _Link:
    """A worker's side: its connection to a learner, their group, and a buffer with the last version received."""

    def __init__(self, endpoint: Endpoint):
        self.line = _Line(Client(endpoint.address, authkey=endpoint.key))
        self.group = _join(self.line, endpoint.backend, rank=1)
        self.device = "cuda" if endpoint.backend == "nccl" else "cpu"
        self.buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.version = -1

    def receive(self, version: int, size: int) -> torch.Tensor:
        if version == self.version:
            return self.buffer  # opened once more, to say what was wrong with it
        self.version = -1
        if self.buffer.numel() != size:
            self.buffer = None  # give the old one back before the new one is taken
            self.buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.line.say(version)
        if refusal := self.line.hear():
            raise WeightSyncError(refusal)
        _transfer(self.group, self.buffer, self.line)
        self.version = version
        return self.buffer

    def close(self) -> None:
        self.line.connection.close()
        self.group.abort()


_links: dict[Endpoint, _Link] = {}  # of this process: at most one, since a worker has one learner


def _receive(endpoint: Endpoint, version: int, size: int) -> torch.Tensor:
    """The learner's buffer for `version`, uint8 [size], on the device in use. Kept for later versions."""
    try:
        if endpoint not in _links:
            while _links:
                _links.popitem()[1].close()
            _links[endpoint] = _Link(endpoint)
        return _links[endpoint].receive(version, size)
    except Exception as error:
        if endpoint in _links:
            _links.pop(endpoint).close()
        raise WeightSyncError(
            f"version {version} did not arrive through {endpoint.backend} ({type(error).__name__}: {error}); "
            "should this go on, set rollout.weight_sync: object_store"
        ) from error


class _Line(dist.Store):
    """What a learner and a worker say to each other, and the store through which the sides of their group meet.

    A value that one side sets goes to the other at once. Both notice when the other is gone (EOFError, OSError). A
    group needs its line kept alive: torch does not hold the Python side of a store.
    """

    def __init__(self, connection: Connection):
        super().__init__()
        self.connection = connection
        self._values: dict[str, bytes] = {}
        self._words: deque[Any] = deque()

    def say(self, word: Any) -> None:
        self.connection.send((None, word))

    def hear(self) -> Any:
        """The next word; waits for it."""
        while not self._words:
            self._take()
        return self._words.popleft()

    def watch(self, seconds: float) -> None:
        """Raise what the other side says it failed of (ConnectionError), or that it is gone, within so many seconds.

        What a worker asks for is no failure, and stays for `hear`.
        """
        if self.connection.poll(seconds):
            self._take()
            if self._words and isinstance(self._words[-1], str):
                raise ConnectionError(self._words.pop())

    def _take(self) -> None:
        key, value = self.connection.recv()
        if key is None:
            self._words.append(value)
        else:
            self._values[key] = value

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        self.connection.send((key, value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta = _JOIN) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        while not all(key in self._values for key in keys):
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"the other side of the group did not come within {timeout.total_seconds():g} s")
            self._take()


_constructing = threading.Lock()


def _join(line: _Line, backend: str, rank: int) -> Any:
    """The group of the learner (rank 0) and the worker (rank 1) at the two ends of `line`."""
    if backend == "gloo":
        return dist.ProcessGroupGloo(line, rank, 2, _JOIN)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _JOIN
    # A group has a watchdog that ends the whole process when a transfer fails: the learner, because a worker has died.
    # It is left out with this variable, which is read here only. `_transfer` watches in its place.
    variable = "TORCH_NCCL_BLOCKING_WAIT"
    with _constructing:
        before = os.environ.get(variable)
        os.environ[variable] = "1"
        try:
            return dist.ProcessGroupNCCL(line, rank, 2, options)
        finally:
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before


def _transfer(group: Any, buffer: torch.Tensor, line: _Line) -> None:
    """Rank 0's `buffer` into rank 1's. Raises when the other side goes away, or says why it cannot go on."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    work = group.broadcast([buffer], options)
    # A worker that has everything may ask for the next version before this is done here: that is no reason to end.
    while not work.is_completed():
        line.watch(_TURN_S)
    work.wait()
