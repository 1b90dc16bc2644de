"""Calibration: texts to look at the source with, and the closed forms that fit a converted layer to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kimi_rl.dataset import load_problems
from kimi_rl.dataset.files import read_json_lines
from kimi_rl.dataset.tasks import TASKS, is_task
from kimi_rl.errors import InputError
from kimi_rl.learner.texts import Texts, add_file, add_problems, check_texts
from kimi_rl.recipe import DataSection

TEXT_TOKENS = 512  # longest text; the built-in conversations are about as long


def read_calibration(data: str | None) -> list[dict[str, Any]] | Any | None:
    """What `--calibration` names, checked: rows with `text` or token ids, or problems; None: the built-in texts."""
    if data is None:
        return None
    path = Path(data).expanduser()
    if path.suffix == ".jsonl":
        first = read_json_lines(path)[0]
        if "text" in first or "token_ids" in first:
            return check_texts(str(path), "--calibration")
    section = DataSection(task=data) if is_task(data) else DataSection(path=data)
    return load_problems(section).train


def calibration_texts(
    tokenizer: PreTrainedTokenizerBase, data: list[dict[str, Any]] | Any | None, tokens: int, seed: int = 0
) -> Texts:
    """About `tokens` tokens of the texts that `read_calibration` found, or of the built-in ones."""
    texts = Texts(TEXT_TOKENS)
    if data is None:
        _add_conversations(texts, tokenizer, tokens, seed)
    elif isinstance(data, list):
        _add_until(texts, tokens, len(data), lambda i: add_file(texts, tokenizer, data[i : i + 1]))
    else:
        _add_until(texts, tokens, len(data), lambda i: add_problems(texts, tokenizer, data.select([i])))
    if len(texts.ids) < 4:
        raise InputError(f"--calibration: {len(texts.ids)} texts found; give at least 4, better some thousand tokens")
    return texts


def _add_until(texts: Texts, tokens: int, rows: int, add) -> None:
    for number in range(rows):
        if sum(texts.lengths) >= tokens:
            return
        add(number)


def _add_conversations(texts: Texts, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> None:
    """Conversations of procedural problems and their solutions, several turns each: text that is always at hand."""
    sections = (DataSection(task=name, train_size=1000, held_out_size=1, seed=seed) for name in TASKS)
    problems = [load_problems(section).train for section in sections]
    order = random.Random(seed)
    messages: list[dict[str, str]] = []
    while sum(texts.lengths) < tokens:
        rows = order.choice(problems)
        row = rows[order.randrange(len(rows))]
        messages += [*row["prompt"], {"role": "assistant", "content": row["solution"]}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        if len(ids) >= TEXT_TOKENS:
            texts.add(ids)
            messages = []


# --- least squares ----------------------------------------------------------------------------------------------


def fit_constant(x: torch.Tensor) -> torch.Tensor:
    """u [d] for which u · x is as close to 1 as can be on x [T, d], in float64.

    Kimi Linear has no biases in its projections. The states that a layer reads have a large common part, so that a
    bias b can be written into a weight as b u^T.
    """
    gram, target = x.double().T @ x.double(), x.double().sum(0)
    return torch.linalg.solve(gram + _ridge(gram, len(x)), target)


def head_scales(gram: torch.Tensor, cross: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """One factor per head [H] for which sum_h c_h out_h f_h is closest to the wanted output.

    gram = f^T f [F, F] and cross = f^T y [F, d] of features f [T, F = H D] and wanted outputs y [T, d]; out [d, H, D].
    """
    width, heads, size = out.shape
    flat = out.reshape(width, -1)
    power = (gram * (flat.T @ flat)).view(heads, size, heads, size).sum((1, 3))
    return torch.linalg.solve(
        power + 1e-3 * power.diagonal().mean() * torch.eye(heads, dtype=power.dtype),
        (cross * flat.T).view(heads, -1).sum(-1),
    )


def fit_output(gram: torch.Tensor, cross: torch.Tensor, start: torch.Tensor, tokens: int) -> torch.Tensor:
    """Output projection [d, F] that is closest to the wanted outputs, drawn towards `start` where texts say little.

    Ridge regression; gram and cross as in `head_scales`, over `tokens` tokens. The ridge weighs F / tokens of the mean
    power of a feature, so that it fades as there is more text.
    """
    shrunk = gram + _ridge(gram, tokens)
    return start + torch.linalg.solve(shrunk, cross - gram @ start.T).T


def _ridge(gram: torch.Tensor, tokens: int) -> torch.Tensor:
    weight = len(gram) / tokens * gram.diagonal().mean()
    return weight * torch.eye(len(gram), dtype=gram.dtype)
