"""What an update is, and how a worker applies one: whole and verified, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from kimi_rl.weight_sync.checksum import tensor_checksum

# Parameters that every engine computes with in float32, and that are sent so whatever the model is served in.
KEPT_FLOAT32 = (".A_log", ".dt_bias", "_conv1d.weight", ".e_score_correction_bias")

_LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


class WeightSyncError(RuntimeError):
    """An update was incomplete, corrupt or out of order. The worker serves nothing until a whole one arrives."""


@dataclass(frozen=True)
class WeightUpdate:
    """One version of the weights, ready to be loaded: buckets of named tensors and the checksum of each tensor.

    A bucket is a list of (checkpoint name, tensor), a Ray reference to one, or an object whose `open()` gives one
    (see `transports.IpcBucket`).
    """

    version: int
    buckets: list[Any]
    checksums: dict[str, int]


@dataclass
class SyncTimes:
    """What one synchronisation cost. `pause_s` is the time during which no worker could generate."""

    version: int
    transport: str = ""
    bytes: int = 0
    names: int = 0
    pack_s: float = 0.0
    pause_s: float = 0.0
    workers: int = 0


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


def unpack(update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """The update's tensors in the order they were packed: exactly those of the manifest, or an error."""
    seen = set()
    for bucket in update.buckets:
        for name, tensor in _open(bucket):
            if name not in update.checksums:
                raise WeightSyncError(f"version {update.version}: tensor {name} is not in the manifest")
            seen.add(name)
            yield name, tensor
    missing = sorted(set(update.checksums) - seen)
    if missing:
        raise WeightSyncError(f"version {update.version}: {len(missing)} tensors did not arrive, first {missing[0]}")


def _open(bucket: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(bucket, ray.ObjectRef):
        return ray.get(bucket)
    return bucket.open() if hasattr(bucket, "open") else bucket


def apply_update(engine: Any, update: WeightUpdate) -> None:
    """Load `update` into `engine` and verify what the engine then holds. Any failure leaves the engine refusing.

    The engine's own checksums are compared with the manifest, which the sender computed: a tensor that was damaged on
    its way, loaded wrongly or not at all differs. Only then is it asked which of these happened.
    """
    if update.version <= engine.policy_version:
        raise WeightSyncError(
            f"version {update.version} was sent to an engine that already serves version {engine.policy_version}"
        )
    engine.begin_update()
    engine.load_weights(unpack(update))
    held = engine.checksums()
    for name, checksum in update.checksums.items():
        if held.get(name) != checksum:
            raise WeightSyncError(f"version {update.version}: tensor {name} {_what_happened(update, name, held)}")
    unsent = sorted(set(held) - set(update.checksums))
    if unsent:
        raise WeightSyncError(f"version {update.version}: tensor {unsent[0]} of the engine was not in the update")
    engine.finish_update(update.version)


def _what_happened(update: WeightUpdate, name: str, held: dict[str, int]) -> str:
    arrived = next(tensor for n, tensor in unpack(update) if n == name)
    if tensor_checksum(arrived) != update.checksums[name]:
        return "arrived with a wrong checksum"
    return "is missing in the engine" if name not in held else "is different in the engine after loading"
