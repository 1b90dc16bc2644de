"""Difficulty pre-selection: keep the training problems that a model solves sometimes.

A problem solved always or never gives every completion of its group the same reward, and so no gradient.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_rl.errors import InputError
from kimi_rl.evaluate import Generate, Verify
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.run_dir import atomic_write_text
from kimi_rl.seeds import derive_seed

COLUMNS = ("id", "question", "solution", "answer")
_CHUNK = 512  # problems scored between two progress reports


@dataclass(frozen=True)
class Selection:
    """How many problems were scored, and where their pass rates lie: below `low`, kept, above `high`, unmeasured."""

    scored: int
    kept: int
    too_hard: int
    too_easy: int
    unmeasured: int
    mean_pass_rate: float


def check_bounds(k: int, low: float, high: float) -> None:
    """Raises InputError unless 0 <= low <= high <= 1 and some number of k right answers lies between."""
    if not 0 <= low <= high <= 1:
        raise InputError(f"--low, --high: need 0 <= low <= high <= 1, found {low:g} and {high:g}")
    if not any(low <= right / k <= high for right in range(k + 1)):
        raise InputError(f"--low, --high: no pass rate of {k} samples lies from {low:g} to {high:g}; widen them or --k")


def pass_rates(
    generate: Generate,
    verify: Verify,
    prompts: Sequence[Sequence[int]],
    golds: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    *,
    k: int,
    params: SamplingParams,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Share of right answers among k samples of each problem: float64 [problems], NaN where the gold is unreadable."""
    rates = np.empty(len(prompts))
    for start in range(0, len(prompts), _CHUNK):
        chosen = range(start, min(start + _CHUNK, len(prompts)))
        requests = [Request(prompts[i], derive_seed(seed, "select", i, j)) for i in chosen for j in range(k)]
        texts = [decode(completion.token_ids) for completion in generate(requests, params)]
        verdicts = verify(list(zip(texts, (golds[i] for i in chosen for _ in range(k)), strict=True)))
        for at, i in enumerate(chosen):
            own = verdicts[at * k : (at + 1) * k]
            readable = all(v.status != "unparseable_gold" for v in own)
            rates[i] = sum(v.status == "correct" for v in own) / k if readable else np.nan
        progress(chosen.stop)
    return rates


def write_selection(rows: Sequence[dict[str, Any]], rates: np.ndarray, low: float, high: float, out: Path) -> Selection:
    """Write the rows with low <= rate <= high to `out` as JSON lines, with their `pass_rate`.

    `data.path` accepts the file: it has the columns id, question, solution and answer. Raises InputError, and writes
    nothing, where no problem is kept.
    """
    unmeasured = np.isnan(rates)
    hard, easy = rates < low, rates > high
    kept = ~(unmeasured | hard | easy)
    counts = f"{int(hard.sum())} below {low:g}, {int(easy.sum())} above {high:g}, {int(unmeasured.sum())} unmeasured"
    if not kept.any():
        raise InputError(f"select: none of {len(rates)} problems is kept ({counts}); widen --low and --high")
    lines = [
        json.dumps({**{name: row[name] for name in COLUMNS}, "pass_rate": float(rate)}, ensure_ascii=False) + "\n"
        for row, rate, keep in zip(rows, rates, kept, strict=True)
        if keep
    ]
    atomic_write_text(out, "".join(lines))
    return Selection(
        scored=len(rates),
        kept=int(kept.sum()),
        too_hard=int(hard.sum()),
        too_easy=int(easy.sum()),
        unmeasured=int(unmeasured.sum()),
        mean_pass_rate=float(np.mean(rates[~unmeasured])),
    )
