"""Texts to distil on: tokenized, put end to end in rows, each row a function of the seed and its number."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kimi_rl.dataset import Problems
from kimi_rl.dataset.files import read_json_lines
from kimi_rl.dataset.prompt_order import EndlessShuffle
from kimi_rl.errors import InputError
from kimi_rl.learner.packing import Pack, pack_whole


@dataclass
class Texts:
    """Token ids of texts of 2 to `max_length` tokens; longer ones are cut, and `cut` counts them."""

    max_length: int
    ids: list[list[int]] = field(default_factory=list)
    cut: int = 0
    # All texts end to end, int64, and where each begins: made when the first row is packed.
    _tokens: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _starts: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def add(self, ids: Sequence[int]) -> None:
        self.cut += len(ids) > self.max_length
        if len(ids) > 1:  # nothing predicts a first token
            self.ids.append(list(ids[: self.max_length]))

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def pack(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Pack:
        """The texts of these numbers as one packed row, in which every token but the first of a text is scored."""
        if len(self._starts) != len(self.ids):  # since then texts came
            self._tokens = torch.tensor([token for ids in self.ids for token in ids])
            self._starts = [0, *itertools.accumulate(self.lengths)][:-1]
        starts, lengths = [self._starts[row] for row in rows], [len(self.ids[row]) for row in rows]
        return pack_whole(self._tokens, starts, lengths, rows, device)


def add_problems(texts: Texts, tokenizer: Any, rows: Any) -> None:
    """Question and worked solution of each row of a `Problems` split, as the chat template writes them."""
    pairs = zip(rows["prompt"], rows["solution"], strict=True)
    conversations = [[*prompt, {"role": "assistant", "content": solution}] for prompt, solution in pairs]
    for ids in tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=False) if conversations else []:
        texts.add(ids)


def add_file(texts: Texts, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of a file that `check_texts` has passed."""
    for row in rows:
        texts.add(tokenizer(row["text"])["input_ids"] if "text" in row else row["prompt_ids"] + row["token_ids"])


def check_texts(path: str, where: str) -> list[dict[str, Any]]:
    """The rows of a file of texts: `text`, or `prompt_ids` and `token_ids` as `kimi-rl generate --json` writes them.

    Raises InputError naming the row.
    """
    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)

    rows = read_json_lines(Path(path))
    for number, row in enumerate(rows, 1):
        if "token_ids" in row and "prompt_ids" in row and ids(row["prompt_ids"]) and ids(row["token_ids"]):
            row.pop("text", None)
        elif not isinstance(row.get("text"), str):
            raise InputError(f"{where}: {path}, row {number}: needs `text`, or `prompt_ids` and `token_ids` (lists)")
    return rows


def shuffled_rows(lengths: Sequence[int], budget: int, count: int, seed: int) -> list[list[int]]:
    """`count` rows of text numbers, each of at most `budget` tokens: texts in random order, again and again.

    A row ends before the first text that would not fit, which opens the next one.
    """
    order = EndlessShuffle(len(lengths), seed, "distil order")
    rows: list[list[int]] = []
    place = 0
    for _ in range(count):
        row, used = [], 0
        while not row or used + lengths[order.at(place)] <= budget:
            row.append(order.at(place))
            used += lengths[row[-1]]
            place += 1
        rows.append(row)
    return rows


def rows_in_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Every text once, in order, in rows of at most `budget` tokens (a longer text has a row of its own)."""
    rows: list[list[int]] = []
    used = 0
    for number, length in enumerate(lengths):
        if not rows or used + length > budget:
            rows.append([])
            used = 0
        rows[-1].append(number)
        used += length
    return rows


def training_texts(tokenizer: Any, problems: Sequence[Problems], file: Sequence[dict], max_length: int) -> Texts:
    texts = Texts(max_length)
    for found in problems:
        add_problems(texts, tokenizer, found.train)
    add_file(texts, tokenizer, file)
    return texts


def held_out_texts(tokenizer: Any, problems: Sequence[Problems], max_length: int) -> Texts:
    texts = Texts(max_length)
    for found in problems:
        add_problems(texts, tokenizer, found.held_out)
    return texts
