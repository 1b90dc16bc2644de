"""Learner -> rollout workers: every update has a version, is verified tensor by tensor, and served whole or not at all.

The learner packs its weights into buckets under their checkpoint names (whole layers, so that no engine ever sees one
shard of a fused parameter), with a manifest of checksums. A worker checks what it received, loads it, checks what its
engine now holds, and only then serves the new version.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch

_LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


class WeightSyncError(RuntimeError):
    """An update was incomplete, corrupt or out of order. The worker serves nothing until a whole one arrives."""


def tensor_checksum(tensor: torch.Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes, computed on its device.

    Every 4-byte word is weighted by its position, so that swapped values are seen too. Equal bytes give equal sums
    on any device; a changed dtype or shape changes the sum.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 4)).view(torch.int32).long()
    weights = torch.arange(1, 2 * raw.numel(), 2, device=raw.device)  # odd, so every bit of a word counts
    words = int((raw * weights).sum().item())
    shape = hash_text(f"{tensor.dtype}{tuple(tensor.shape)}")
    return (words ^ shape) & 0xFFFFFFFFFFFFFFFF


def hash_text(text: str) -> int:
    """FNV-1a, 64 bits: the same in every process, unlike `hash`."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def whole_layers(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group adjacent tensors so that each group holds a whole layer (or one tensor outside the layers)."""
    group: list[tuple[str, torch.Tensor]] = []
    current = None
    for name, tensor in weights:
        match = _LAYER.match(name)
        key = match.group(1) if match else name
        if group and key != current:
            yield group
            group = []
        group.append((name, tensor))
        current = key
    if group:
        yield group


@dataclass(frozen=True)
class WeightUpdate:
    """One version of the weights, ready to be loaded: buckets of named tensors and the checksum of each tensor."""

    version: int
    buckets: list[Any]  # references, each to a list of (checkpoint name, tensor)
    checksums: dict[str, int]


@dataclass
class SyncTimes:
    """What one synchronisation cost. `pause_s` is the time during which no worker could generate."""

    version: int
    bytes: int = 0
    pack_s: float = 0.0
    pause_s: float = 0.0
    workers: int = 0
    names: int = field(default=0)


class WeightSync(Protocol):
    """A transport of weights from the learner to the workers."""

    def pack(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> tuple[WeightUpdate, SyncTimes]: ...


class ObjectStoreSync:
    """Weights through Ray's object store: shared memory on one machine, a transfer between several."""

    def pack(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> tuple[WeightUpdate, SyncTimes]:
        start = time.perf_counter()
        times = SyncTimes(version)
        checksums: dict[str, int] = {}
        buckets = []
        for layer in whole_layers(weights):
            bucket = []
            for name, tensor in layer:
                if name in checksums:
                    raise WeightSyncError(f"version {version}: tensor {name} is listed twice")
                tensor = tensor.detach().to("cpu")
                checksums[name] = tensor_checksum(tensor)
                times.bytes += tensor.numel() * tensor.element_size()
                bucket.append((name, tensor))
            buckets.append(ray.put(bucket))
        times.pack_s = time.perf_counter() - start
        times.names = len(checksums)
        return WeightUpdate(version, buckets, checksums), times


def unpack_verified(update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """The update's tensors, each checked on arrival against the manifest; complete, or an error."""
    seen = set()
    for reference in update.buckets:
        bucket = ray.get(reference) if isinstance(reference, ray.ObjectRef) else reference
        for name, tensor in bucket:
            if name not in update.checksums:
                raise WeightSyncError(f"version {update.version}: tensor {name} is not in the manifest")
            if tensor_checksum(tensor) != update.checksums[name]:
                raise WeightSyncError(f"version {update.version}: tensor {name} arrived with a wrong checksum")
            seen.add(name)
            yield name, tensor
    missing = sorted(set(update.checksums) - seen)
    if missing:
        raise WeightSyncError(f"version {update.version}: {len(missing)} tensors did not arrive, first {missing[0]}")


def apply_update(engine: Any, update: WeightUpdate) -> None:
    """Load `update` into `engine` and verify what the engine then holds. Any failure leaves the engine refusing."""
    if update.version <= engine.policy_version:
        raise WeightSyncError(
            f"version {update.version} was sent to an engine that already serves version {engine.policy_version}"
        )
    engine.begin_update()
    engine.load_weights(unpack_verified(update))
    held = engine.checksums()
    for name, checksum in update.checksums.items():
        if held.get(name) != checksum:
            found = "missing" if name not in held else "different"
            raise WeightSyncError(f"version {update.version}: tensor {name} is {found} in the engine after loading")
    unsent = sorted(set(held) - set(update.checksums))
    if unsent:
        raise WeightSyncError(f"version {update.version}: tensor {unsent[0]} of the engine was not in the update")
    engine.finish_update(update.version)
