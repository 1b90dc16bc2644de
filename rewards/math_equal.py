"""Whether two final answers are the same mathematics. Runs in a worker process only: sympy may take forever.

docs/rewards.md lists the rules with examples; tests/rewards/test_pairs.py holds them to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import sympy
from math_verify import verify as math_verify

from kimi_rl.rewards.exact import Outcome
from kimi_rl.rewards.normalize import Unreadable, normalize, squash
from kimi_rl.rewards.numeric import (
    TooLarge,
    Undefined,
    Unsupported,
    constant_ratio,
    constants_equal,
    expressions_equal,
    is_undefined,
    rounds_to,
    unknowns,
)
from kimi_rl.rewards.reading import (
    Based,
    Items,
    Matrix,
    Node,
    Relation,
    Scalar,
    Sequence,
    Union,
    Words,
    read,
    words_of,
)

# math-verify warns at every call that its own timeouts are off; the deadline of the worker replaces them.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "=": "=", "\\neq": "\\neq"}


def math_equal(answer: str, gold: str) -> Outcome:
    """Compare a final answer with the gold answer: (`correct` | `wrong` | `unparseable_gold`, reason)."""
    try:
        gold_text = normalize(gold)
        gold_node = read(gold_text)
    except (Unreadable, RecursionError) as error:
        return "unparseable_gold", f"the gold answer cannot be read: {error}"
    if any(is_undefined(scalar.expr, scalar.text) for scalar in _scalars(gold_node)):
        return "unparseable_gold", "the gold answer has no value: it divides by zero or the like"
    try:
        answer_text = normalize(answer)
        if squash(answer_text) == squash(gold_text):
            return "correct", "written the same"
        answer_node = read(answer_text)
    except (Unreadable, RecursionError) as error:
        return "wrong", f"the answer cannot be read: {error}"
    try:
        same = _equal(gold_node, answer_node)
    except TooLarge:
        return "wrong", "a number is too large to evaluate, and the two are not written the same"
    except (Undefined, Unsupported, RecursionError) as error:
        return "wrong", f"the two cannot be compared: {error or 'undefined'}"
    return ("correct", "equal") if same else ("wrong", f"not equal to {gold_text[:60]}")


def _scalars(node: Node) -> Iterator[Scalar]:
    """Every number and expression in the tree."""
    if isinstance(node, Scalar):
        yield node
    parts = [part for row in node.rows for part in row] if isinstance(node, Matrix) else []
    for part in (*getattr(node, "items", ()), *getattr(node, "sides", ()), *parts):
        yield from _scalars(part)


def _equal(gold: Node, answer: Node) -> bool:
    gold, answer = _single(gold), _single(answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _equal_relation(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        text = words_of(gold)
        return text is not None and text == words_of(answer)
    if isinstance(gold, Items) and isinstance(answer, Items):
        return _equal_items(gold, answer)
    if isinstance(gold, Items) or isinstance(answer, Items):
        return _equal_list_and_other(gold, answer)
    if type(gold) is not type(answer):
        return False
    if isinstance(gold, Scalar):
        return _equal_scalars(gold, answer)
    if isinstance(gold, Based):
        return gold == answer
    if isinstance(gold, Sequence):
        return _equal_sequences(gold, answer)
    if isinstance(gold, Union):
        return _matches_in_any_order(gold.items, answer.items)
    assert isinstance(gold, Matrix)
    return [len(row) for row in gold.rows] == [len(row) for row in answer.rows] and all(
        _equal(a, b)
        for left, right in zip(gold.rows, answer.rows, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def _single(node: Node) -> Node:
    return _single(node.items[0]) if isinstance(node, Items) and len(node.items) == 1 else node


def _matches_in_any_order(gold: tuple, answer: tuple) -> bool:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        match = next((at for at, other in enumerate(left) if _equal(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _equal_items(gold: Items, answer: Items) -> bool:
    gold_labels, answer_labels = (
        [getattr(item, "label", None) for item in node.items] for node in (gold, answer)
    )
    # "x = 1, y = 2" against "1, 2": the order is all that says which is which.
    named, bare = (gold_labels, answer_labels) if any(gold_labels) else (answer_labels, gold_labels)
    if len(set(named)) > 1 and all(named) and not any(bare):
        return _equal_in_order(gold.items, answer.items)
    return _matches_in_any_order(gold.items, answer.items)


def _equal_in_order(gold: tuple, answer: tuple) -> bool:
    return len(gold) == len(answer) and all(_equal(a, b) for a, b in zip(gold, answer, strict=True))


def _equal_list_and_other(gold: Node, answer: Node) -> bool:
    """A comma list against a tuple `(1, 2)` (in its order), a union (of inequalities), or one value given
    twice.
    """
    items, other = (gold, answer) if isinstance(gold, Items) else (answer, gold)
    assert isinstance(items, Items)
    if isinstance(other, Sequence) and not items.braces and (other.opening, other.closing) == ("(", ")"):
        return _equal_in_order(gold.items, answer.items)  # type: ignore[union-attr]
    if isinstance(other, Union) and all(isinstance(item, Sequence) and item.label for item in items.items):
        return _matches_in_any_order(gold.items, answer.items)  # type: ignore[union-attr]
    # "15 39/40 or 639/40": two spellings of one answer, all of which have to be right.
    return items is answer and not items.braces and all(_equal(gold, item) for item in items.items)


def _equal_sequences(gold: Sequence, answer: Sequence) -> bool:
    if (gold.opening, gold.closing) != (answer.opening, answer.closing):
        return False
    if gold.label and answer.label and gold.label != answer.label:
        return False
    return _equal_in_order(gold.items, answer.items)


def _equal_relation(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if gold.label and gold.label == answer.label:
            return _chain_is(answer, gold.sides[-1])
        # "x = 5" is a solution: an equation that merely has it (2x + 3 = 13, copied from the question) is
        # none.
        if gold.label and not _has_unknowns(gold.sides[-1]):
            return False
        return _equivalent_relations(gold, answer)
    if isinstance(gold, Relation):
        return gold.label is not None and _equal(gold.sides[-1], answer)
    assert isinstance(answer, Relation)
    return answer.label is not None and _chain_is(answer, gold)


def _chain_is(answer: Relation, gold: Node) -> bool:
    """Every member after the label equals `gold`: "x = 3 + 4 = 7" is 7, "x = 7 = 8" is neither."""
    return all(_equal(gold, side) for side in answer.sides[1:])


def _has_unknowns(node: Node) -> bool:
    if isinstance(node, Scalar):
        return bool(unknowns(node.expr))
    return any(_has_unknowns(item) for item in getattr(node, "items", ()))


def _equivalent_relations(gold: Relation, answer: Relation) -> bool:
    """Both are `left op right`, and left - right of one is a constant times that of the other."""
    if gold.ops == answer.ops and _equal_in_order(gold.sides, answer.sides):
        return True
    differences = []
    for relation in (gold, answer):
        if len(relation.ops) != 1:
            return False
        sides = [
            sympy.Symbol(s.text, real=True) if isinstance(s, Words) else getattr(s, "expr", None)
            for s in relation.sides
        ]
        if None in sides:
            return False
        differences.append(sympy.Add(sides[0], sympy.Mul(-1, sides[1], evaluate=False), evaluate=False))
    sign = constant_ratio(*differences)
    expected = gold.ops[0] if sign > 0 else _FLIPPED.get(gold.ops[0])
    same_kind = answer.ops[0] == expected or (sign != 0 and gold.ops[0] == answer.ops[0] in ("=", "\\neq"))
    return sign != 0 and same_kind


def _equal_scalars(gold: Scalar, answer: Scalar) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    a, b = gold.expr, answer.expr
    infinite = [expr in (sympy.oo, -sympy.oo, sympy.zoo) for expr in (a, b)]
    if any(infinite):
        return all(infinite) and a == b
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(math_verify(a, b, float_rounding=12, timeout_seconds=None))
    try:
        if unknowns(a) or unknowns(b):
            return expressions_equal(a, b)
        if constants_equal(a, b):
            return True
        # A rounded decimal is accepted against an exact form only, never against another decimal.
        if bool(gold.written) != bool(answer.written):
            return rounds_to(b, gold.written) if gold.written else rounds_to(a, answer.written or "")
        return False
    except Unsupported:
        return bool(math_verify(a, b, float_rounding=12, timeout_seconds=None))
