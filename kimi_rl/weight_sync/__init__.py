"""Learner -> rollout workers: every update has a version, is verified tensor by tensor, and served whole or not at all.

The learner packs its weights into buckets under their checkpoint names (whole layers, so that no engine ever sees one
shard of a fused parameter), with a manifest of checksums. A worker loads them, compares what its engine then holds
with the manifest, and only then serves the new version.
"""

from kimi_rl.weight_sync.checksum import ChecksumBatch, checksum_all, tensor_checksum
from kimi_rl.weight_sync.choice import TRANSPORTS, make_sync
from kimi_rl.weight_sync.nccl import NcclSync
from kimi_rl.weight_sync.transports import CudaIpcSync, ObjectStoreSync, WeightSync, card_of
from kimi_rl.weight_sync.update import (
    KEPT_FLOAT32,
    SyncTimes,
    WeightSyncError,
    WeightUpdate,
    apply_update,
    unpack,
    whole_layers,
)

__all__ = [
    "KEPT_FLOAT32",
    "TRANSPORTS",
    "ChecksumBatch",
    "CudaIpcSync",
    "NcclSync",
    "ObjectStoreSync",
    "SyncTimes",
    "WeightSync",
    "WeightSyncError",
    "WeightUpdate",
    "apply_update",
    "card_of",
    "checksum_all",
    "make_sync",
    "tensor_checksum",
    "unpack",
    "whole_layers",
]
