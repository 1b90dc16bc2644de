"""Several processes that train one model: each reads rows of its own, and all step by the mean of their gradients.

Every process holds the model, the optimizer and, in a distill stage, the teacher, and makes the same steps. The first
one leads: it alone measures, writes checkpoints and records. A process has an NVIDIA card of its own, where there are
cards (NCCL); on a CPU they share the cores (gloo).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from kimi_rl.errors import RunError, one_line

_PATIENCE = timedelta(minutes=60)  # of one that waits for the others to load, or for the leader to measure


@dataclass(frozen=True)
class Place:
    """One process among the `size` that train a stage together.

    `address`: host and port of the leader's store; `checkpoint`: where all of them go on from. Both are for those that
    follow.
    """

    rank: int = 0
    size: int = 1
    address: tuple[str, int] | None = None
    checkpoint: str | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0


# Starts one that follows: its actor, and what its work will answer.
Launch = Callable[[Place], tuple[Any, ray.ObjectRef]]


class TrainingGroup:
    """The processes that train a stage together, as one of them sees it. One alone needs no one: nothing happens."""

    def __init__(self, place: Place, meet: Callable[[], Any] | None = None):
        self.rank, self.size = place.rank, place.size
        self._meet = meet
        self._processes: Any = None
        self._fault: Exception | None = None

    def join(self) -> None:
        """Wait until all have loaded what they need. Raises what one of them raises meanwhile."""
        if self.size > 1:
            self._processes = self._meet()

    @torch.no_grad()
    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes the mean over all processes, in place. All call this with the same shapes, of one dtype.

        Raises RunError if one of them is gone.
        """
        if self.size == 1:
            return
        tensors = list(tensors)
        try:
            self._processes.allreduce_coalesced(tensors, dist.AllreduceCoalescedOptions()).wait()
        except Exception as error:
            cause = one_line(self._fault or error, 200)
            raise RunError(f"a process that trains beside this one is gone ({cause}); go on with --resume") from error
        torch._foreach_div_(tensors, self.size)

    def fail(self, error: Exception) -> None:
        """One is gone: whoever waits for it, on a card too, waits no longer."""
        self._fault = error
        self.close()

    def close(self) -> None:
        if self._processes is not None:
            self._processes.abort()


@contextlib.contextmanager
def training_group(
    place: Place, device: str, launch: Launch | None = None, checkpoint: Path | None = None
) -> Iterator[TrainingGroup]:
    """The group for the time of a stage. The leader starts the others with `launch`, and ends with them.

    They load while it loads; all call `join` before the first step.
    """
    if place.size == 1:
        yield TrainingGroup(place)
    elif place.leads:
        with _led(place, device, launch, checkpoint) as group:
            yield group
    else:
        store = dist.TCPStore(*place.address, place.size, is_master=False, timeout=_PATIENCE, wait_for_workers=False)
        group = TrainingGroup(place, lambda: _join(store, place, device))
        _kept.append(group)
        yield group


# The leader may still be reading what was sent last: it ends this process, and the group with it.
_kept: list[TrainingGroup] = []


@contextlib.contextmanager
def _led(place: Place, device: str, launch: Launch, checkpoint: Path | None) -> Iterator[TrainingGroup]:
    host = ray.util.get_node_ip_address()
    store = dist.TCPStore(host, 0, place.size, is_master=True, timeout=_PATIENCE, wait_for_workers=False)
    address, start = (host, store.port), str(checkpoint) if checkpoint else None
    others = [launch(Place(rank, place.size, address, start)) for rank in range(1, place.size)]
    answers = [answer for _, answer in others]

    def meet() -> Any:
        _wait_for(store, answers)
        processes = _join(store, place, device)
        threading.Thread(target=_watch, args=(group, answers), daemon=True, name="training group").start()
        return processes

    group = TrainingGroup(place, meet)
    try:
        yield group
        ray.get(answers)
    finally:
        for actor, _ in others:
            ray.kill(actor)
        group.close()


def _join(store: Any, place: Place, device: str) -> Any:
    """The process group, once all have loaded; apart from torch's default one, of which trainers know too much."""
    store.set(f"loaded {place.rank}", b"1")
    if device == "cpu":
        return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), place.rank, place.size, _PATIENCE)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _PATIENCE
    return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), place.rank, place.size, options)


def _wait_for(store: Any, answers: Sequence[ray.ObjectRef]) -> None:
    """Until all who follow have loaded. Raises what one of them raises meanwhile."""
    wanted = [f"loaded {rank}" for rank in range(1, len(answers) + 1)]
    while not store.check(wanted):
        done, _ = ray.wait(list(answers), num_returns=1, timeout=0.2)
        if done:
            ray.get(done)
            raise RunError("a process that was to train beside this one ended before the start")


def _watch(group: TrainingGroup, answers: Sequence[ray.ObjectRef]) -> None:
    """Tell the group of the first that fails."""
    left = list(answers)
    while left:
        done, left = ray.wait(left, num_returns=1)
        try:
            ray.get(done)
        except Exception as error:
            return group.fail(error)
