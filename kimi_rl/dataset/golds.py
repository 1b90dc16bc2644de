"""Can the gold answers be read? One that cannot would score every completion as unmeasured, without end."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

from kimi_rl.rewards import VerifierPool
from kimi_rl.rewards.exact import integer_value

log = logging.getLogger(__name__)

# At a few milliseconds each, more would keep a run waiting for minutes.
CHECK_LIMIT = 20_000
# Whole numbers, decimals and simple fractions need no verifier process.
_PLAIN = re.compile(r"-?\d{1,30}(\.\d{1,30})?|-?\\[dt]?frac\{\d{1,30}\}\{0*[1-9]\d{0,29}\}")
_known: dict[str, str | None] = {}  # gold -> why it cannot be used, or None; a run loads its problems several times


def unusable_golds(golds: Iterable[str]) -> dict[str, str]:
    """Gold answers (of `kind: math`) that do not verify against themselves, each with the reason.

    Verifier processes read them, so a gold that hangs or crashes the reader is found, too. Of more than 20,000
    different ones that are no plain numbers, only the first 20,000 are read, with a warning.
    """
    unique = list(dict.fromkeys(golds))
    todo = [gold for gold in unique if gold not in _known and not _is_plain(gold)]
    if len(todo) > CHECK_LIMIT:
        log.warning("%d gold answers to check: only the first %d are", len(todo), CHECK_LIMIT)
        todo = todo[:CHECK_LIMIT]
    if todo:
        workers = min(os.cpu_count() or 1, 8, 1 + len(todo) // 100)
        with VerifierPool(workers=workers) as pool:
            verdicts = pool.verify_many([(gold, gold) for gold in todo], kind="math", extract=())
        for gold, verdict in zip(todo, verdicts, strict=True):
            _known[gold] = None if verdict.status == "correct" else f"{verdict.status}: {verdict.reason}"
    return {gold: reason for gold in unique if (reason := _known.get(gold)) is not None}


def _is_plain(gold: str) -> bool:
    return _PLAIN.fullmatch(gold) is not None or integer_value(gold) is not None
