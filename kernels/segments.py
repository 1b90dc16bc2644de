"""Which tokens of a packed row belong together, and which sequence goes on from which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch


def to_device(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on `device`; the host does not wait for a card to take it."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Segments:
    """The sequences of one packed row, in order.

    `bounds` [0, end_1, ..., T]: sequence n is the tokens from bounds[n] up to bounds[n + 1]. `parents`, one number a
    sequence: the sequence whose end it goes on from, or -1 if it starts by itself. A token sees the tokens before it in
    its own sequence, and all of its sequence's parent. Sequences that start by themselves come first, so that one
    border splits the row; a parent starts by itself (there is one level).

    Built once a forward and handed to every layer: what a layer needs on the device is made once, and nothing has to be
    read back from it. Raises `ValueError` naming what is wrong: a wrong border would silently mix two sequences.
    """

    def __init__(
        self, bounds: Sequence[int], parents: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ):
        self.bounds, self.device = tuple(map(int, bounds)), torch.device(device)
        if len(self.bounds) < 2 or self.bounds[0] != 0:
            raise ValueError(f"cu_seqlens must start with 0 and have an end, found {list(self.bounds[:2])}")
        if any(b < a for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"cu_seqlens must not decrease, found {list(self.bounds)}")
        parents = [-1] * len(self) if parents is None else list(map(int, parents))
        if len(parents) != len(self):
            raise ValueError(f"parents must have one number a sequence ({len(self)}), found {len(parents)}")
        self.roots = next((n for n, parent in enumerate(parents) if parent >= 0), len(self))
        for n, parent in enumerate(parents):
            if not (parent == -1 if n < self.roots else 0 <= parent < self.roots):
                raise ValueError(
                    f"parents[{n}]: found {parent}; the sequences that start by themselves (-1) come first, and the "
                    f"others name one of these {self.roots}"
                )
        self.parents = tuple(parents)
        self._tables: dict[tuple[str, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return self.bounds[-1]

    @property
    def border(self) -> int:
        """The first token of the sequences that go on from another; the length where there is none."""
        return self.bounds[self.roots]

    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`bounds` as int64 [N + 1] on the device. Always the same tensor: fla keeps what it derives from one."""
        return to_device(self.cu_seqlens_cpu, self.device)

    @cached_property
    def cu_seqlens_cpu(self) -> torch.Tensor:
        """The same on the host, where fla counts chunks without a read from the card."""
        return torch.tensor(self.bounds)

    def chunk_indices(self, size: int) -> torch.Tensor:
        """int64 [chunks, 2]: sequence, and place in it, of every chunk of up to `size` tokens. Made once."""
        return self._made(("chunks", size), lambda: self._chunks(size))

    def _chunks(self, size: int) -> torch.Tensor:
        counts = (self.cu_seqlens_cpu.diff() + size - 1) // size
        sequence = torch.repeat_interleave(torch.arange(len(self)), counts)
        return torch.stack([sequence, torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]], dim=1)

    def before(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 and bool [N, count]: the places of the `count` tokens before each sequence's first, and whether there
        is one: its parent's last tokens, or none."""
        places = self._made(("before", count), lambda: self._before(count))
        return places.clamp(min=0), places >= 0

    def _before(self, count: int) -> torch.Tensor:
        ends = torch.tensor([self.bounds[parent + 1] for parent in self.parents])
        starts = torch.tensor([self.bounds[parent] if parent >= 0 else self.length for parent in self.parents])
        places = ends[:, None] - count + torch.arange(count)
        return torch.where(places >= starts[:, None], places, -1)

    @cached_property
    def ends_of_parents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [N] each: first token of each sequence's parent, and the token after its last. Without a parent the
        first lies behind every token."""
        ends = [(self.bounds[p], self.bounds[p + 1]) if p >= 0 else (2**30, 0) for p in self.parents]
        first, last = to_device(torch.tensor(ends, dtype=torch.int32).T.contiguous(), self.device)
        return first, last

    @cached_property
    def children(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The continuing sequences by parent, int64 [N - roots], and the borders between parents, int64 [roots + 1]."""
        parents = torch.tensor(self.parents[self.roots :], dtype=torch.long)
        counts = torch.bincount(parents, minlength=self.roots)
        both = torch.cat([parents.argsort(stable=True) + self.roots, counts.new_zeros(1), counts.cumsum(0)])
        children, bounds = to_device(both, self.device).split([len(parents), self.roots + 1])
        return children, bounds

    @cached_property
    def _in_order(self) -> bool:
        """Whether the continuing sequences stand in the order of their parents."""
        parents = self.parents[self.roots :]
        return all(a <= b for a, b in zip(parents, parents[1:], strict=False))

    def sum_over_children(self, values: torch.Tensor) -> torch.Tensor:
        """values [N - roots, ...] of the continuing sequences -> their sums by parent [roots, ...].

        In a fixed order, unlike `index_add_`, and unlike `index_put_(accumulate=True)` without two reads from the card
        (it looks whether its indices are in range): a layer's backward would wait there until the card has caught up.
        """
        children, bounds = self.children
        if not self._in_order:
            values = values[children - self.roots]
        rows = values.contiguous().view(len(values), -1)
        sums = torch.segment_reduce(rows, "sum", offsets=bounds, axis=0, unsafe=True)  # unsafe: reads nothing back
        return sums.view(self.roots, *values.shape[1:])

    def _made(self, key: tuple[str, int], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._tables:
            self._tables[key] = to_device(make(), self.device)
        return self._tables[key]

    @cached_property
    def starting(self) -> Segments:
        """The sequences that start by themselves, as a row of their own: the tokens before `border`."""
        return self if self.roots == len(self) else Segments(self.bounds[: self.roots + 1], device=self.device)

    @cached_property
    def continuing(self) -> Segments | None:
        """The others, as a row of their own, without their parents: the tokens from `border` on."""
        if self.roots == len(self):
            return None
        return Segments([b - self.border for b in self.bounds[self.roots :]], device=self.device)

    @cached_property
    def parent_of_continuing(self) -> torch.Tensor:
        """int64 [N - roots]: for each continuing sequence its parent."""
        return to_device(torch.tensor(self.parents[self.roots :], dtype=torch.long), self.device)

    @cached_property
    def sequence_of_token(self) -> torch.Tensor:
        """int64 [T]."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.device), self.cu_seqlens.diff(), output_size=self.length
        )

    @cached_property
    def parent_of_token(self) -> torch.Tensor:
        """int64 [T], -1 where the token's sequence has no parent."""
        return to_device(torch.tensor(self.parents), self.device)[self.sequence_of_token]
