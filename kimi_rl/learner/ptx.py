"""The supervised stream beside the RL loss (PTX): worked solutions, loss on the assistant turn only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kimi_rl.dataset.prompt_order import EndlessShuffle
from kimi_rl.errors import InputError
from kimi_rl.tokenizer import prompt_ids


class PTXStream:
    """Batches of tokenized solutions. Batch `n` is a function of the seed and of n, so a resumed run goes on the same.

    Samples longer than `max_length` tokens are left out; `dropped` counts them.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence,
        solutions: Sequence[str],
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        where: str,
    ):
        self._batch_size = batch_size
        self._pad = tokenizer.pad_token_id
        self._samples: list[tuple[list[int], int]] = []  # token ids, length of the prompt
        self.dropped = 0
        for prompt, solution in zip(prompts, solutions, strict=True):
            sample = _tokenize(tokenizer, prompt, solution, where)
            if len(sample[0]) > max_length:
                self.dropped += 1
            else:
                self._samples.append(sample)
        if not self._samples:
            raise InputError(
                f"{where}.max_length: all {self.dropped} solutions are longer than {max_length} tokens; raise it"
            )
        self._order = EndlessShuffle(len(self._samples), seed, "ptx order")

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """Batch `number` (from 0): input_ids, attention_mask and labels, each int64 [batch_size, T], right-padded."""
        first = number * self._batch_size
        samples = [self._samples[self._order.at(position)] for position in range(first, first + self._batch_size)]
        longest = max(len(ids) for ids, _ in samples)
        batch = {
            "input_ids": torch.full((len(samples), longest), self._pad),
            "attention_mask": torch.zeros((len(samples), longest), dtype=torch.long),
            "labels": torch.full((len(samples), longest), -100),
        }
        for row, (ids, prompt_length) in enumerate(samples):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
        return batch


def _tokenize(tokenizer: Any, prompt: Sequence[dict], solution: str, where: str) -> tuple[list[int], int]:
    messages = [*prompt, {"role": "assistant", "content": solution}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    before = prompt_ids(tokenizer, prompt)
    if ids[: len(before)] != before:
        raise InputError(
            f"{where}: the chat template does not put the answer after the generation prompt, so the answer cannot be "
            "told from the question; use another template"
        )
    return ids, len(before)
