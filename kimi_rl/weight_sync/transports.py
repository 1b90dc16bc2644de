"""Ways for weights to travel on one machine: Ray's object store, or CUDA IPC on one card. Between cards: `nccl.py`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import torch

from kimi_rl.weight_sync.checksum import ChecksumBatch, checksum_all
from kimi_rl.weight_sync.update import KEPT_FLOAT32, SyncTimes, WeightSyncError, WeightUpdate, whole_layers

Weights = Iterable[tuple[str, torch.Tensor]]
_ALIGN = 256  # bytes; every tensor in a staging buffer starts at a multiple


class WeightSync(Protocol):
    """A transport. `name` is the recipe's word for it."""

    name: str

    def pack(self, weights: Weights, version: int) -> tuple[WeightUpdate, SyncTimes]:
        """Make `weights` ready for workers. What an earlier call returned may be unusable afterwards."""
        ...

    def close(self) -> None:
        """Serve no worker any more."""
        ...


def card_of(device: str | torch.device) -> str | None:
    """An id of the card that `device` stands for in this process, the same in every process; None for the CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return str(torch.cuda.get_device_properties(index).uuid)


def sent_dtype(name: str, held: torch.dtype, served: dict[str, torch.dtype] | None) -> torch.dtype:
    """What a tensor is sent in: what the workers serve it in, so that no byte travels only to be rounded off there."""
    return held if served is None or name.endswith(KEPT_FLOAT32) else served.get(name, held)


class ObjectStoreSync:
    """Weights through Ray's object store: shared memory on one machine, a transfer between several."""

    name = "object_store"

    def __init__(self, served: dict[str, torch.dtype] | None = None):
        self._served = served

    def pack(self, weights: Weights, version: int) -> tuple[WeightUpdate, SyncTimes]:
        start = time.perf_counter()
        times = SyncTimes(version, self.name)
        sums = ChecksumBatch()
        buckets = []
        for layer in whole_layers(weights):
            bucket = []
            for name, tensor in layer:
                tensor = tensor.detach().to(sent_dtype(name, tensor.dtype, self._served))
                sums.add(name, tensor)
                times.bytes += tensor.numel() * tensor.element_size()
                bucket.append((name, tensor.to("cpu")))
            buckets.append(ray.put(bucket))
        checksums = sums.result()
        times.names = len(checksums)
        times.pack_s = time.perf_counter() - start
        return WeightUpdate(version, buckets, checksums), times

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a staging buffer. `start` is in bytes."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


def buffer_size(slots: tuple[Slot, ...]) -> int:
    """Bytes of the staging buffer that `slots` lie in."""
    return slots[-1].start + slots[-1].bytes


@dataclass(frozen=True)
class IpcBucket:
    """A staging buffer of the learner, as another process can open it."""

    handle: Any
    slots: tuple[Slot, ...]

    def open(self) -> list[tuple[str, torch.Tensor]]:
        """(checkpoint name, tensor): views of the learner's own buffer, which no later version has overwritten yet."""
        buffer = import_buffer(self.handle)
        return [(slot.name, slot.view(buffer)) for slot in self.slots]


class StagedSync:
    """The learner copies its weights, cast to the dtypes that are served, into one buffer that lives as long as this
    object; what is sent says how a worker comes by the buffer's bytes (`bucket`).

    The pool has one update in flight at a time and keeps no worker that has not answered, so nobody reads the buffer
    when the next version is written into it. Costs one copy of the served weights in memory.
    """

    name: str

    def __init__(self, served: dict[str, torch.dtype] | None = None):
        self._served = served
        self._slots: tuple[Slot, ...] = ()
        self._buffer: torch.Tensor | None = None
        self._handle: Any = None

    def export(self, buffer: torch.Tensor) -> Any:
        """What other processes need to map a new buffer, or None where they cannot."""
        return export_buffer(buffer)

    def bucket(self, version: int, handle: Any, slots: tuple[Slot, ...]) -> Any:
        """What is sent for `version`, which the buffer holds (see `WeightUpdate.buckets`)."""
        raise NotImplementedError

    def pack(self, weights: Weights, version: int) -> tuple[WeightUpdate, SyncTimes]:
        start = time.perf_counter()
        weights = [(name, tensor.detach()) for name, tensor in weights]
        slots = self._layout(weights)
        if slots != self._slots:
            device = weights[0][1].device
            self._slots, self._buffer = slots, None  # give the old buffer back before the new one is taken
            self._buffer = torch.empty(buffer_size(slots), dtype=torch.uint8, device=device)
            self._handle = self.export(self._buffer)
        views = [(slot.name, slot.view(self._buffer)) for slot in slots]
        for (_, tensor), (_, view) in zip(weights, views, strict=True):
            view.copy_(tensor)
        checksums = checksum_all(views)  # reads what was copied and waits for it: the buffer is ready to be read
        times = SyncTimes(version, self.name, sum(slot.bytes for slot in slots), len(slots))
        times.pack_s = time.perf_counter() - start
        return WeightUpdate(version, [self.bucket(version, self._handle, slots)], checksums), times

    def _layout(self, weights: list[tuple[str, torch.Tensor]]) -> tuple[Slot, ...]:
        slots, end = [], 0
        for name, tensor in weights:
            slot = Slot(name, sent_dtype(name, tensor.dtype, self._served), tensor.shape, -(-end // _ALIGN) * _ALIGN)
            slots.append(slot)
            end = slot.start + slot.bytes
        return tuple(slots)

    def close(self) -> None:
        pass


class CudaIpcSync(StagedSync):
    """Weights that never leave the card: workers map the learner's buffer and load from it."""

    name = "cuda_ipc"

    def bucket(self, version: int, handle: Any, slots: tuple[Slot, ...]) -> IpcBucket:
        return IpcBucket(handle, slots)


@dataclass(frozen=True)
class _Handle:
    card: str
    arguments: tuple  # of torch's rebuild_cuda_tensor


_DEVICE_ARGUMENT = 6  # place of the device's number, which differs between processes, in `_Handle.arguments`
_opened: dict[str, torch.Tensor] = {}


def export_buffer(buffer: torch.Tensor) -> _Handle:
    """A handle with which processes on the same card can map `buffer`, as often as they like, while it lives."""
    from torch.multiprocessing.reductions import reduce_tensor

    return _Handle(card_of(buffer.device), reduce_tensor(buffer)[1])


def import_buffer(handle: _Handle) -> torch.Tensor:
    """Map another process's buffer. The mapping is kept, so that later versions in the same buffer cost nothing."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    key = repr(handle.arguments[_DEVICE_ARGUMENT + 1 :])
    if key not in _opened:
        _opened.clear()  # a learner has one buffer at a time: an older one is gone
        cards = {card_of(f"cuda:{i}"): i for i in range(torch.cuda.device_count())}
        if handle.card not in cards:
            raise WeightSyncError(
                f"the learner's card {handle.card} is not visible to this worker; set rollout.weight_sync: object_store"
            )
        arguments = list(handle.arguments)
        arguments[_DEVICE_ARGUMENT] = cards[handle.card]
        _opened[key] = rebuild_cuda_tensor(*arguments)
    return _opened[key]
