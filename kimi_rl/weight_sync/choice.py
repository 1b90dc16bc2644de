"""Which transport carries the weights: what the recipe asks for, or what the placement of the processes allows."""

from __future__ import annotations

import torch

from kimi_rl.errors import InputError
from kimi_rl.weight_sync.nccl import NcclSync
from kimi_rl.weight_sync.transports import CudaIpcSync, ObjectStoreSync, WeightSync

TRANSPORTS = ("auto", "object_store", "cuda_ipc", "nccl")


def make_sync(
    kind: str, served: dict[str, torch.dtype] | None, *, learner_card: str | None, worker_cards: set[str | None]
) -> WeightSync:
    """The transport that `rollout.weight_sync` asks for.

    Args:
        kind: one of `TRANSPORTS`; "auto" takes CUDA IPC if the learner and all workers share a card, NCCL if they are
            on several cards, else the object store. "gloo", no word of a recipe, is the code of "nccl" on a CPU.
        served: dtype that the workers serve each tensor in, by checkpoint name; None: as the learner holds it.
        learner_card, worker_cards: ids of the cards in use (`card_of`), None for the CPU.
    """
    cards = learner_card is not None and None not in worker_cards
    one_card = cards and worker_cards == {learner_card}
    found = (
        f"here the learner is on {learner_card or 'the CPU'} and workers on "
        f"{', '.join(sorted(c or 'the CPU' for c in worker_cards))}"
    )
    if kind == "cuda_ipc" and not one_card:
        raise InputError(
            "rollout.weight_sync: cuda_ipc needs the learner and every rollout worker on one NVIDIA card; "
            f"{found}; use auto or object_store"
        )
    if kind == "nccl" and (one_card or not cards):
        raise InputError(
            f"rollout.weight_sync: nccl needs the learner and rollout workers on several NVIDIA cards; {found}; "
            "use auto, or set rollout.cards"
        )
    if kind not in (*TRANSPORTS, "gloo"):
        raise InputError(f"rollout.weight_sync: unknown transport {kind!r}; known: {', '.join(TRANSPORTS)}")
    if kind in ("nccl", "gloo") or (kind == "auto" and cards and not one_card):
        return NcclSync(served, backend="gloo" if kind == "gloo" else "nccl")
    return CudaIpcSync(served) if one_card and kind != "object_store" else ObjectStoreSync(served)
