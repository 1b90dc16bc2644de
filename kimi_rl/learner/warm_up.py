"""Compiles the learner's GPU kernels before the first step, and says so.

On a fresh card fla's first forward and backward compile and autotune for more than a minute, in which a training that
has begun seems to hang. With a warm cache (see `kernels/compile_cache.py`) little of that is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

# Two prompts of two completions, longer than a chunk and no multiple of one.
PROMPTS, COMPLETIONS = (70, 33), (150, 90)
# What a kernel is tuned to does not depend on the lengths, but what is found to be fastest does: on a card the exercise
# is repeated side by side up to this many tokens, if a pack holds as many.
TUNED_AT = 8192


def warm_up(trainer: Any, say: Callable[[str], None]) -> float | None:
    """Run `exercise` on a card; returns its seconds. On a CPU nothing is compiled: None, and nothing is run or said."""
    if next(trainer.model.parameters()).device.type == "cpu":
        return None
    say(f"compiling GPU kernels, kept in {os.environ.get('TRITON_CACHE_DIR', '~/.triton/cache')}: "
        "up to two minutes the first time")  # fmt: skip
    start = time.perf_counter()
    exercise(trainer, min(TUNED_AT, trainer.packing.tokens) if trainer.packing.mode != "off" else 0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    say(f"GPU kernels ready after {seconds:.0f} s")
    return seconds


def exercise(trainer: Any, tokens: int = 0) -> None:
    """A forward without gradients and a forward and backward, by the trainer's own log-prob method, on about `tokens`.

    Leaves weights, gradients and the global random state as they are.
    """
    model = trainer.model
    device, training = next(model.parameters()).device, model.training
    left, right = max(PROMPTS), max(COMPLETIONS)
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    rows = 4 * max(1, tokens // (2 * sum(PROMPTS) + 2 * sum(COMPLETIONS)))
    ids, mask = torch.zeros(rows, left + right, dtype=torch.long), torch.zeros(rows, left + right, dtype=torch.long)
    for row in range(rows):
        prompt, completion = PROMPTS[row // 2 % 2], COMPLETIONS[row % 2]
        ids[row, left - prompt : left + completion] = 1 + row // 2 % (vocabulary - 1)
        ids[row, left : left + completion] = torch.randint(vocabulary, (completion,), generator=generator)
        mask[row, left - prompt : left + completion] = 1
    batch = (ids.to(device), mask.to(device), right)
    score = trainer._get_per_token_logps_and_entropies
    model.train()
    with torch.no_grad():
        score(model, *batch)
    logps, entropies, _ = score(model, *batch, compute_entropy=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad((logps + entropies).sum(), parameters, allow_unused=True)
    model.train(training)
