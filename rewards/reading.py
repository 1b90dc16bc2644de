"""Read a normalised answer into a tree: list, tuple or interval, union, relation, matrix, number, words.

The structure is read here, from the text; only scalars go through math-verify's LaTeX parser. That parser
accepts more than it should (`1 2` is 3, `43_5` is 43, `answer` is a product of six symbols) and forgets what
it read (`(2,1)` as an interval is empty), so those cases are settled first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify.grader import should_treat_as_complex

from kimi_rl.rewards.normalize import Unreadable, closes_at_end, split_top, squash
from kimi_rl.rewards.numeric import unknowns
from kimi_rl.rewards.units import split_unit


@dataclass(frozen=True)
class Words:
    """A text answer, compared as text."""

    text: str


@dataclass(frozen=True)
class Scalar:
    """A number or expression. `written`: the plain decimal it was written as, if it was one."""

    expr: sympy.Basic
    text: str
    unit: str | None = None
    written: str | None = None


@dataclass(frozen=True)
class Based:
    """A numeral in another base: `43_5`. Equal only to the same numeral, not to its value in base ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Items:
    """Several answers in no order: `1, 2`, `\\{1, 2\\}`, `\\pm 3`. `braces`: written as a set."""

    items: tuple
    braces: bool = False


@dataclass(frozen=True)
class Sequence:
    """Brackets around several things in order: a tuple, a point, an interval. `label`: the variable of `1 <
    x < 2`.
    """

    opening: str
    items: tuple
    closing: str
    label: str | None = None


@dataclass(frozen=True)
class Union:
    """A union of sets."""

    items: tuple


@dataclass(frozen=True)
class Matrix:
    rows: tuple


@dataclass(frozen=True)
class Relation:
    """`sides[0] ops[0] sides[1] ...`. `label`: the left side of an equation when it only names what
    follows.
    """

    sides: tuple
    ops: tuple
    label: str | None = None


Node = Words | Scalar | Based | Items | Sequence | Union | Matrix | Relation

# The parser's default makes P and p, Omega and omega one symbol.
_CASE_COUNTS = ConversionConfig(lowercase_symbols=False)
_RELATION = r"\\leq|\\geq|\\neq|\\approx|\\in(?![A-Za-z])|:=|<|>|="
_INTEGER = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+|[-+]?\d+")
_DECIMAL = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d*)\.\d*")
_THOUSANDS = re.compile(r"(?<![\d,.])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])")
_FRACTION = re.compile(r"\\frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*([-+]?\d+)\s*\}|(\d+)\s*/\s*(\d+)")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))")
_SCIENTIFIC = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+))\s*(?:[eE]|(?:\\times|\\cdot|x)\s*10\s*\^)\s*\{?\s*([-+]?\d{1,6})\s*\}?"
)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
_BASED = re.compile(
    r"(-?[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\s*_\s*(?:\{\s*)?(?:\\text\{\s*)?(\d{1,2}|two|three|four|five|six|seven|eight|nine)\s*\}*"
)
_BASE_WORDS = {
    word: str(at)
    for at, word in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine"], 2)
}
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.S)
_NAME = r"\\?[A-Za-z]+(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?'*"
_LABEL = re.compile(
    rf"(?:{_NAME}\s*(?:\(\s*[A-Za-z0-9]+(?:\s*,\s*[A-Za-z0-9]+)*\s*\))?|\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\))"
)
_NO_LABELS = {"\\pi", "e", "i", "\\infty", "\\text"}
_KNOWN = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "log",
        "ln",
        "lim",
        "exp",
        "max",
        "min",
        "gcd",
        "lcm",
        "det",
        "mod",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
    ]
)
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_SHORT_WORDS = {"no", "on", "if", "is", "am", "pm", "up", "at", "in", "it", "to"}


def read(text: str) -> Node:
    """The tree of a normalised answer. Raises Unreadable."""
    if not text:
        raise Unreadable("it is empty")
    if len(re.findall(r"\\(?:pm|mp)(?![A-Za-z])", text)) == 1:
        return Items(
            tuple(read(re.sub(r"\\(?:pm|mp)(?![A-Za-z])", f" {sign} ", text).strip(" +")) for sign in "+-")
        )
    if text.startswith("\\text{") and closes_at_end(text[5:]):
        inner = text[6:-1].strip()
        if re.fullmatch(r"[A-Za-z]{2,}", inner) or not re.search(r"[A-Za-z0-9]", inner):
            return Words(_words(inner))
        try:
            return read(inner)
        except Unreadable:
            return Words(_words(inner))
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return Matrix(tuple(tuple(_read_one(cell.strip()) for cell in row.split("&")) for row in rows))
    if "\\begin{" not in text:
        text = _join_thousands(text)
        parts = [part for part in split_top(text, r",|;") if part]
        if len(parts) > 1:
            return Items(tuple(_read_one(part) for part in parts))
    return _read_one(text)


def _join_thousands(text: str) -> str:
    """`1,234` as 1234 wherever it stands outside brackets; inside them the comma separates."""

    def join(match: re.Match[str]) -> str:
        before = text[: match.start()]
        depth = sum(before.count(char) for char in "([{") - sum(before.count(char) for char in ")]}")
        return match[1].replace(",", "") if depth == 0 else match[1]

    return _THOUSANDS.sub(join, text)


def _read_one(text: str) -> Node:
    """A part without a comma outside brackets."""
    if not text:
        raise Unreadable("a part of it is empty")
    parts = split_top(text, r"\\cup(?![A-Za-z])|(?<=[)\]])\s*U\s*(?=[(\[])")
    if len(parts) > 1:
        return Union(tuple(_read_one(part) for part in parts))
    if not text.startswith("\\text{"):
        sides = split_top(text, _RELATION)
        if len(sides) > 1 and "\\begin{" not in text:
            return _read_relation(text, sides)
    if text.startswith("\\{") and text.endswith("\\}") and closes_at_end(text[1:]):
        inner = text[2:-2].strip()
        if not inner:
            return Words("\\emptyset")
        return Items(tuple(_read_one(part) for part in split_top(inner, r",|;")), braces=True)
    if text[0] in "([" and closes_at_end(text):
        parts = split_top(text[1:-1], r",|;")
        if len(parts) > 1:
            return Sequence(text[0], tuple(_read_one(part) for part in parts), text[-1])
        if re.fullmatch(r"\(\s*[A-Z]\s*\)", text):
            return Words(_words(text))
        if text[0] == "(" and text[-1] == ")":
            return _read_one(parts[0])
    return _read_scalar(text)


def _read_relation(text: str, sides: list[str]) -> Node:
    ops = re.findall(_RELATION, text)
    if len(ops) != len(sides) - 1 or not all(sides):
        raise Unreadable("a relation sign stands without a side, or inside brackets")
    ops = ["=" if op in (":=", "\\approx") else op for op in ops]
    label = _label(sides[0])
    if ops == ["="] and label is None and (label := _label(sides[1])):
        sides = sides[::-1]
    if label and set(ops) <= {"=", "\\in"}:
        return Relation((Words(label), *(_read_one(side) for side in sides[1:])), tuple(ops), label)
    if "\\in" in ops:
        raise Unreadable("the left side of \\in is no variable")
    read_sides = tuple(_read_one(side) for side in sides)
    return _interval(read_sides, ops, sides) or Relation(read_sides, tuple(ops))


def _label(text: str) -> str | None:
    text = text.strip()
    return squash(text) if _LABEL.fullmatch(text) and text not in _NO_LABELS else None


def _interval(nodes: tuple, ops: list[str], sides: list[str]) -> Sequence | None:
    """`a < x \\leq b` and `x > a` as intervals, if the variable is a plain name and the bounds hold none."""
    up, down = {"<": "open", "\\leq": "closed"}, {">": "open", "\\geq": "closed"}
    names = [_label(side) for side in sides]
    bounds = [node for node, name in zip(nodes, names, strict=True) if name is None]
    if not all(isinstance(node, Scalar) and not unknowns(node.expr) for node in bounds):
        return None
    if len(ops) == 2 and names[1] and not names[0] and not names[2]:
        if all(op in down for op in ops):
            ops, nodes = [{">": "<", "\\geq": "\\leq"}[op] for op in reversed(ops)], nodes[::-1]
        if all(op in up for op in ops):
            ends = ("(" if ops[0] == "<" else "[", ")" if ops[1] == "<" else "]")
            return Sequence(ends[0], (nodes[0], nodes[2]), ends[1], names[1])
    if len(ops) == 1 and ops[0] in up | down and bool(names[0]) != bool(names[1]):
        grows = (ops[0] in down) == bool(names[0])  # The variable is above its bound.
        strict = ops[0] in "<>"
        infinity = Scalar(sympy.oo if grows else -sympy.oo, "\\infty" if grows else "-\\infty")
        if grows:
            return Sequence("(" if strict else "[", (bounds[0], infinity), ")", names[0] or names[1])
        return Sequence("(", (infinity, bounds[0]), ")" if strict else "]", names[0] or names[1])
    return None


def _words(text: str) -> str:
    """One spelling of a text answer: no \\text{}, no case (a single letter keeps its own), no brackets
    around it.
    """
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    plain = re.sub(r"\s+", " ", re.sub(r"\\dollar ", "$", plain)).strip(" .()")
    return plain if len(plain) == 1 else plain.casefold()


def words_of(node: Node) -> str | None:
    """The node as text, to compare with Words; None if it never was a text."""
    if isinstance(node, Words):
        return node.text
    return _words(node.text) if isinstance(node, Scalar) else None


def _read_scalar(text: str) -> Node:
    body, unit = split_unit(text)
    percent = body.endswith("%") or bool(re.search(r"\d\s*percent$", body))
    if percent:
        body = re.sub(r"\s*(?:%|percent)$", "", body)
    if not percent and (based := _BASED.fullmatch(body)) and re.search(r"\d", based[1]):
        return Based(based[1].upper(), int(_BASE_WORDS.get(based[2], based[2])))
    number = _plain_number(body)
    if number is not None:
        value, written = number
        value = value / 100 if percent else value
        expr = sympy.Rational(value.numerator, value.denominator)
        return Scalar(expr, text, unit, None if percent else written)
    # Degrees inside an argument, \cos(6 degrees), are a factor; at the end they were a unit.
    body = re.sub(r"(?<=\d)\s*\\text\{degrees\}", r"\\cdot\\frac{\\pi}{180}", body)
    bare = re.sub(r"\\text\{[^{}]*\}|_\{[^{}]*\}", " ", body)
    letters = [word for word in _LETTERS.findall(bare) if word not in _KNOWN]
    if letters or "\\text{" in body or body.lower() in _SHORT_WORDS:
        if not re.search(r"[A-Za-z]{2}", text) or re.search(r"\\(?!text|dollar|%)[A-Za-z]+", text):
            raise Unreadable("it mixes words and mathematics")
        return Words(_words(text))
    expr = _parse(body)
    return Scalar(expr / 100 if percent else expr, text, unit)


def _plain_number(text: str) -> tuple[Fraction, str | None] | None:
    """The value of a number written in digits, and its decimal spelling if it has a point."""
    text = re.sub(r"^([-+])\s+", r"\1", text.strip())
    if len(text) > 1000:
        return None
    if _INTEGER.fullmatch(text):
        return Fraction(text.replace(",", "")), None
    if _DECIMAL.fullmatch(text) and any(char.isdigit() for char in text):
        plain = text.replace(",", "")
        return Fraction(plain + "0"), plain if plain[-1] != "." else None
    sign, unsigned = (-1, text[1:].strip()) if text.startswith("-") else (1, text)
    if (match := _FRACTION.fullmatch(unsigned)) and int(match[2] or match[4]):
        return sign * Fraction(int(match[1] or match[3]), int(match[2] or match[4])), None
    if (match := _MIXED.fullmatch(text)) and int(match[4] or match[6]):
        part = Fraction(int(match[3] or match[5]), int(match[4] or match[6]))
        return (-1 if match[1] == "-" else 1) * (int(match[2]) + part), None
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2]), None
    if match := _REPEATING.fullmatch(text):
        whole, fixed, cycle = match[2] or "0", match[3], match[4]
        repeated = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return (-1 if match[1] == "-" else 1) * (Fraction(f"{whole}.{fixed or 0}") + repeated), None
    return None


@lru_cache(maxsize=2048)  # The gold answer comes back with every completion of its group.
def _parse(text: str) -> sympy.Basic:
    """The sympy tree of one LaTeX expression, unevaluated, decimals as exact fractions. Raises Unreadable."""
    if re.search(r"(?<![_\d])\d+\s+\d", text):
        raise Unreadable("two numbers stand side by side")
    if re.search(r"(?<![A-Za-z}])\d+\s*_", text):
        raise Unreadable("a number has a subscript")
    if "%" in text or "\\dollar" in text:
        raise Unreadable("a percent or dollar sign stands inside it")
    text = re.sub(
        r"(?<![\d_])(\d*)\.(\d+)", lambda m: rf"{{\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}}}", text
    )
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    # E_1 and e_1 are names; the parser would see Euler's number.
    text = re.sub(r"(?<![A-Za-z\\])([EeI])\s*_\s*(?:\{([A-Za-z0-9]+)\}|([A-Za-z0-9]))", r"Q_{\1\2\3}", text)
    text = re.sub(r"\\exp\s*\\\{(.*)\\\}", r"\\exp(\1)", text)
    try:
        expr = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CASE_COUNTS,
        )
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the parser raises bare exceptions of many kinds
        raise Unreadable("it is no expression that math-verify's parser knows") from error
    if not isinstance(expr, (sympy.Basic, sympy.MatrixBase)):
        raise Unreadable("it is no mathematical expression")
    return expr
