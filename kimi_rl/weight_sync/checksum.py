"""64-bit checksums of tensors, computed where the tensors are; many at once without waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

_MASK = 0xFFFFFFFFFFFFFFFF
_ROW = 1024  # words summed together
# Words summed by one round of kernels. On a card 64 MiB of them, which bounds temporary memory to about 200 MiB; on a
# CPU so few that the temporaries stay in its cache.
_GROUP = {"cpu": 1 << 17, "cuda": 1 << 24}


def tensor_checksum(tensor: torch.Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes: the definition. For many tensors use `checksum_all`.

    Every 4-byte word is weighted by its position, so that swapped values are seen too. Equal bytes give equal sums
    on any device; a changed dtype or shape changes the sum.
    """
    words = _words(tensor).long()
    weights = 2 * torch.arange(words.numel(), device=words.device) + 1  # odd, so every bit of a word counts
    return (int((words * weights).sum().item()) ^ _tag(tensor.dtype, tuple(tensor.shape))) & _MASK


def checksum_all(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """`tensor_checksum` of every (name, tensor), by name, with one wait for the device at the end."""
    batch = ChecksumBatch()
    for name, tensor in tensors:
        batch.add(name, tensor)
    return batch.result()


class ChecksumBatch:
    """Checksums of a stream of named tensors. `add` only queues work on the tensors' device; `result` waits for it.

    Tensors are joined and summed by the same few kernels: a model has hundreds of small ones, whose checksums one by
    one would cost more in launches than in reading. A tensor must not change between its `add` and
    `result`.
    """

    def __init__(self) -> None:
        self._tags: dict[str, int] = {}
        self._pending: list[tuple[str, torch.Tensor, int]] = []  # name, words, number of the first row in the tensor
        self._pending_words = 0
        self._sums: list[tuple[list[str], torch.Tensor]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._tags:
            raise ValueError(f"tensor {name} is listed twice")
        self._tags[name] = _tag(tensor.dtype, tuple(tensor.shape))
        words = _words(tensor)
        if self._pending and self._pending[0][1].device != words.device:
            self._flush()
        group = _GROUP[words.device.type]
        for start in range(0, words.numel(), group):
            piece = words[start : start + group]
            self._pending.append((name, piece, start // _ROW))
            self._pending_words += piece.numel()
            if self._pending_words >= group:
                self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        device = self._pending[0][1].device
        zeros = torch.zeros(_ROW, dtype=torch.int32, device=device)
        parts: list[torch.Tensor] = []
        rows: list[int] = []
        offsets: list[int] = []  # row number within its tensor - row number within the group
        total = 0
        for _, words, first_row in self._pending:
            offsets.append(first_row - total)
            rows.append(-(-words.numel() // _ROW))
            total += rows[-1]
            parts += [words, zeros[: -words.numel() % _ROW]]
        x = torch.cat(parts).view(-1, _ROW)
        owner = torch.repeat_interleave(
            torch.arange(len(rows), device=device), torch.tensor(rows, device=device), output_size=total
        )
        row = torch.arange(total, device=device) + torch.tensor(offsets, device=device)[owner]
        # Word j of row r has weight 2 (1024 r + j) + 1. All of it is exact: int64 wraps as the definition's sum does.
        within = (x * torch.arange(1, 2 * _ROW, 2, device=device)).sum(-1)
        sums = within + 2 * _ROW * row * x.sum(-1, dtype=torch.int64)
        sums = torch.zeros(len(rows), dtype=torch.int64, device=device).index_add_(0, owner, sums)
        self._sums.append(([name for name, _, _ in self._pending], sums))
        self._pending, self._pending_words = [], 0

    def result(self) -> dict[str, int]:
        """Checksum of every tensor added so far, by name, in the order of `add`."""
        self._flush()
        words = dict.fromkeys(self._tags, 0)
        for names, sums in self._sums:
            for name, value in zip(names, sums.tolist(), strict=True):
                words[name] += value
        return {name: ((words[name] & _MASK) ^ tag) for name, tag in self._tags.items()}


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes as 4-byte words [N] int32, padded with zeros; a view where that is possible."""
    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8)
    if raw.numel() % 4 or flat.storage_offset() * flat.element_size() % 4:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 4))
    return raw.view(torch.int32)


@functools.lru_cache(maxsize=4096)
def _tag(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """FNV-1a, 64 bits, of dtype and shape: the same in every process, unlike `hash`."""
    value = 0xCBF29CE484222325
    for byte in f"{dtype}{shape}".encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value
