"""Terms added to a verdict: length, repetition, and their weighted sum. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kimi_rl.errors import InputError


def soft_overlong_punishment(length: int, *, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), between 0 and -1.

    `length` tokens cost nothing up to `max_length - cache`, then linearly up to -1 at `max_length`, and -1
    beyond.
    """
    if not 0 < cache <= max_length:
        raise InputError(f"soft_overlong_punishment: cache ({cache}) must be in 1..max_length ({max_length})")
    free = max_length - cache
    return 0.0 if length <= free else max(-1.0, (free - length) / cache)


def k15_length_rewards(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Kimi K1.5's length reward (arXiv 2501.12599, section 2.3.3) of the completions of one prompt.

    With lambda = 0.5 - (length - shortest) / (longest - shortest): lambda for a correct completion, min(0,
    lambda) for a wrong one, so that a short wrong answer earns nothing; 0 for all if all have one length.
    Between -0.5 and 0.5.
    """
    if len(lengths) != len(correct):
        raise InputError(
            f"k15_length_rewards: {len(lengths)} lengths but {len(correct)} verdicts; they must match"
        )
    if not lengths or min(lengths) == max(lengths):
        return [0.0] * len(lengths)
    shortest, span = min(lengths), max(lengths) - min(lengths)
    scores = [0.5 - (length - shortest) / span for length in lengths]
    return [score if right else min(0.0, score) for score, right in zip(scores, correct, strict=True)]


def repetition_penalty(tokens: Sequence[Hashable], *, n: int = 3, max_penalty: float = -1.0) -> float:
    """`max_penalty` times the share of n-grams that repeat an earlier one; 0.0 for fewer than `n` tokens.

    `tokens`: token ids, or the words of a text (as in "Demystifying Long CoT", arXiv 2502.03373).
    """
    if n < 1 or max_penalty > 0:
        raise InputError(
            f"repetition_penalty: needs n >= 1 and max_penalty <= 0, found n={n}, max_penalty={max_penalty}"
        )
    total = len(tokens) - n + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(tokens[at : at + n]) for at in range(total)})
    return max_penalty * (1 - distinct / total)


def weighted_sum(terms: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float | None]:
    """Per completion, the sum of `weights[i] * terms[i]`. A None in any term makes the sum None.

    None says that nothing was measured (an unparseable gold); a sum without that term could not be compared
    with the others of its group.
    """
    if len(terms) != len(weights):
        raise InputError(
            f"weighted_sum: {len(terms)} terms but {len(weights)} weights; give one weight a term"
        )
    if len({len(term) for term in terms}) > 1:
        raise InputError(f"weighted_sum: terms of different lengths {[len(term) for term in terms]}")
    return [
        None if None in row else sum(w * value for w, value in zip(weights, row, strict=True))
        for row in zip(*terms, strict=True)
    ]
