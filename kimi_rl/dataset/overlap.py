"""Do training problems appear among the evaluation problems?

Three kinds of finding, from worst to mildest:

- `exact`: the same problem, up to spacing, punctuation and how its LaTeX is spelt;
- `near`: nearly the same text with the same numbers in it: reworded, or another question about the same
setting;
- `variant`: nearly the same text with other numbers, as textbooks set exercises.

Two texts are near when their sets of character 8-grams (of the fingerprint) have a Jaccard similarity of at
least `threshold`. Every pair is compared, none is missed by sampling.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

GRAM = (
    8  # shorter ones meet by chance in any two English texts; longer ones miss texts with scattered changes
)

# LaTeX that changes how a formula looks, not what it says, and spellings of the same sign.
_LAYOUT = re.compile(
    r"\\(left|right|big|Big|bigg|Bigg|quad|qquad|displaystyle|text|textbf|mathrm|mbox|[,;:! ])(?![a-z])"
)
_SPELLINGS = (
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\[clv]dots(?![a-z])|…"), r"\\dots"),
    (re.compile(r"\\leq?(?![a-z])|≤"), r"\\le"),
    (re.compile(r"\\geq?(?![a-z])|≥"), r"\\ge"),
    (re.compile(r"[−–]"), "-"),
)
_OPERATORS = frozenset("+-=<>/^!|")  # x+1 and x-1 are different problems

Kind = Literal["exact", "near", "variant"]


@dataclass(frozen=True)
class Overlap:
    """A held-out problem and a training problem that overlap. `similarity`: Jaccard, 1 only when exact."""

    held_out_id: str
    train_id: str
    kind: Kind
    similarity: float


def fingerprint(text: str) -> str:
    """Letters, digits and operators, in lower case, without LaTeX layout: equal for one problem set twice."""
    plain = _LAYOUT.sub("", text)
    for spelling, one in _SPELLINGS:
        plain = spelling.sub(one, plain)
    kept = "".join(sign for sign in plain.casefold() if sign.isalnum() or sign in _OPERATORS)
    return kept or text


def find_overlap(
    train: Iterable[Mapping[str, str]], held_out: Iterable[Mapping[str, str]], *, threshold: float = 0.75
) -> list[Overlap]:
    """Every held-out problem that a training problem overlaps, with its most similar one; most similar first.

    `train`, `held_out`: rows with `id` and `question`, as `load_problems` gives. `threshold`: least Jaccard
    similarity of `near` and `variant`, in (0, 1].
    """
    train, held_out = list(train), list(held_out)
    best: dict[int, tuple[int, Kind, float]] = {}
    for at, number, kind, similarity in _pairs(train, held_out, threshold):
        if number not in best or similarity > best[number][2]:
            best[number] = at, kind, similarity
    found = [Overlap(held_out[n]["id"], train[at]["id"], kind, value) for n, (at, kind, value) in best.items()]
    return sorted(found, key=lambda overlap: (-overlap.similarity, overlap.held_out_id))


def repeats(
    train: Iterable[Mapping[str, str]], held_out: Iterable[Mapping[str, str]], *, threshold: float = 0.75
) -> set[int]:
    """Positions of the training rows that are `exact` or `near` to any held-out row (see `find_overlap`)."""
    return {at for at, _, kind, _ in _pairs(list(train), list(held_out), threshold) if kind != "variant"}


def _pairs(
    train: list[Mapping[str, str]], held_out: list[Mapping[str, str]], threshold: float
) -> Iterator[tuple[int, int, Kind, float]]:
    """(position in train, position in held_out, kind, similarity) of every pair of at least `threshold`."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], found {threshold}")
    prints = [fingerprint(row["question"]) for row in held_out]
    grams = [_grams(print_) for print_ in prints]
    with_gram = defaultdict(list)
    for number, found in enumerate(grams):
        for gram in found:
            with_gram[gram].append(number)
    for at, row in enumerate(train):
        print_ = fingerprint(row["question"])
        own = _grams(print_)
        shared = Counter(number for gram in own & with_gram.keys() for number in with_gram[gram])
        for number, count in shared.items():
            similarity = count / (len(own) + len(grams[number]) - count)
            if similarity < threshold:
                continue
            if print_ == prints[number]:
                yield at, number, "exact", 1.0
                continue
            same_numbers = _numbers(held_out[number]["question"]) == _numbers(row["question"])
            # Equal sets of grams in another order are not exact.
            yield at, number, "near" if same_numbers else "variant", round(min(similarity, 0.9999), 4)


def summarize(found: list[Overlap], examples: int = 3) -> str:
    """One line: how many of each kind, with the worst examples. Empty where nothing was found."""
    if not found:
        return ""
    counts = Counter(overlap.kind for overlap in found)
    parts = [f"{counts[kind]} {kind}" for kind in ("exact", "near", "variant") if counts[kind]]
    shown = ", ".join(
        f"{overlap.held_out_id} = {overlap.train_id} ({overlap.kind})" for overlap in found[:examples]
    )
    return f"{len(found)} held-out problems overlap the training problems: {', '.join(parts)}; {shown}"


def _grams(print_: str) -> set[str]:
    return {print_[start : start + GRAM] for start in range(max(1, len(print_) - GRAM + 1))}


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+", text))
