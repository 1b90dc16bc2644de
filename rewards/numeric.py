"""Evaluate sympy trees with bounds: exact rationals where possible, else enough digits to tell two numbers
apart.

sympy's own `simplify`, `evalf` and `==` are not used for this: they may take forever, and rounding to a
fixed number of decimals makes 1/2^99 equal 1/2^98.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from fractions import Fraction

import sympy
from mpmath import mp, mpc, mpf
from sympy.core.function import AppliedUndef

# 300,000 decimal digits: far above any honest answer, still exact in milliseconds.
_MOST_BITS = 1_000_000
_MOST_FACTORIAL = 20_000
# Largest power of ten that an inexact value may reach. More cannot be told apart in reasonable time.
_MOST_MAGNITUDE = 3_000
_BASE_DIGITS = 100
_POINTS = 10
_OVER_ZERO = re.compile(r"/\s*\(?\s*0(?![\d.])|\}\s*\{\s*0+\s*\}")
_WHOLE_NUMBER_NAMES = frozenset("nkmNKMj")


class TooLarge(ValueError):
    """A number too large to evaluate exactly."""


class Unsupported(ValueError):
    """A construct that this evaluator does not know."""


class Undefined(ValueError):
    """No finite value there (division by zero, logarithm of zero, ...)."""


def exact(expr: sympy.Basic) -> Fraction | None:
    """The rational value of `expr`, or None if it is not built of rational operations. Raises TooLarge,
    Undefined.
    """
    if isinstance(expr, sympy.Rational):
        return Fraction(expr.p, expr.q)
    if isinstance(expr, sympy.UnevaluatedExpr):
        return exact(expr.args[0])
    if not isinstance(
        expr, (sympy.Add, sympy.Mul, sympy.Pow, sympy.factorial, sympy.Abs, sympy.floor, sympy.ceiling)
    ):
        return None
    values = []
    for part in expr.args:
        value = exact(part)
        if value is None:
            return None
        values.append(value)
    if isinstance(expr, sympy.Add):
        return _bounded(sum(values, Fraction(0)))
    if isinstance(expr, sympy.Mul):
        product = Fraction(1)
        for value in values:
            product = _bounded(product * value)
        return product
    if isinstance(expr, sympy.Pow):
        return _exact_power(*values)
    value = values[0]
    if isinstance(expr, sympy.Abs):
        return abs(value)
    if isinstance(expr, sympy.factorial):
        if value.denominator != 1 or value < 0:
            return None
        if value > _MOST_FACTORIAL:
            raise TooLarge
        return Fraction(int(mp.fac(int(value))) if value < 20 else _factorial(int(value)))
    return Fraction(value.__floor__() if isinstance(expr, sympy.floor) else value.__ceil__())


def _factorial(n: int) -> int:
    product = 1
    for factor in range(2, n + 1):
        product *= factor
    return product


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent < 0:
        raise Undefined
    size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and abs(exponent.numerator) * size > _MOST_BITS:
        raise TooLarge
    if abs(exponent.numerator) > _MOST_BITS:  # Base 0, 1 or -1.
        return base if exponent % 2 else base * base
    return base**exponent.numerator


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator).bit_length(), value.denominator.bit_length()) > 2 * _MOST_BITS:
        raise TooLarge
    return value


def unknowns(expr: sympy.Basic) -> set[sympy.Basic]:
    """Symbols and applications of unknown functions, `f(2)`, which count as one unknown each."""
    return expr.atoms(sympy.Symbol, AppliedUndef)


def is_undefined(expr: sympy.Basic, text: str) -> bool:
    """Whether a constant part of `expr` has no value at all: 1/0, 0^{-1}, the logarithm of 0, x + 0/0. Infinity has.

    `text`: how it was written. `05:00` is no division, and the parser makes zoo of harmless texts, too (\\gamma^2-1).
    """
    if ":" in text:
        return False
    if expr.has(sympy.zoo, sympy.nan):
        return _OVER_ZERO.search(text) is not None
    for part in sympy.preorder_traversal(expr):
        if not isinstance(part, (sympy.Pow, sympy.log)) or unknowns(part) or part.has(sympy.oo, -sympy.oo):
            continue
        try:
            with mp.workdps(_BASE_DIGITS):
                if isinstance(part, sympy.Pow) and _is_zero(part.args[0]):
                    part = sympy.Pow(0, part.args[1], evaluate=False)
                _Evaluator({})(part)
        except Undefined:
            return True
        except (TooLarge, Unsupported):
            continue
    return False


def _is_zero(expr: sympy.Basic) -> bool:
    """Whether a constant is 0. What rounding leaves of one, as of `\\sin \\pi`, shrinks with the precision."""
    value = exact(expr)
    if value is not None:
        return value == 0
    rough = abs(_Evaluator({})(expr))
    with mp.workdps(2 * _BASE_DIGITS):
        return abs(_Evaluator({})(expr)) <= rough * mpf(10) ** -(_BASE_DIGITS // 2)


class _Evaluator:
    """Evaluates at the precision set in `mp`, and notes the largest power of ten met (of values and their
    inverses).
    """

    def __init__(self, values: Mapping[str, Fraction]):
        self.values, self.magnitude = values, 0

    def __call__(self, expr: sympy.Basic) -> mpf | mpc:
        try:
            value = self._value(expr)
        except (ZeroDivisionError, OverflowError, ValueError) as error:
            if isinstance(error, (TooLarge, Unsupported)):
                raise
            raise Undefined from error
        if not mp.isfinite(value):
            raise Undefined
        if value:
            self.magnitude = max(self.magnitude, abs(int(mp.mag(value) * 0.30103)))
            if self.magnitude > _MOST_MAGNITUDE:
                raise TooLarge
        return value

    def _value(self, expr: sympy.Basic) -> mpf | mpc:
        if isinstance(expr, sympy.Rational):
            return mpf(expr.p) / expr.q
        if isinstance(expr, sympy.Float):
            return mpf(str(expr))
        if isinstance(expr, (sympy.Symbol, AppliedUndef)):
            value = self.values.get(str(expr))
            if value is None:
                raise Unsupported(f"the symbol {expr}")
            return mpf(value.numerator) / value.denominator
        for constant, value in (
            (sympy.pi, mp.pi),
            (sympy.E, mp.e),
            (sympy.I, mpc(0, 1)),
            (sympy.GoldenRatio, mp.phi),
        ):
            if expr is constant:
                return +value
        if isinstance(expr, sympy.Add):
            return sum((self(part) for part in expr.args), mpf(0))
        if isinstance(expr, sympy.Mul):
            product = mpf(1)
            for part in expr.args:
                product = product * self(part)
            return product
        if isinstance(expr, (sympy.Pow, sympy.exp)):
            base, exponent = (sympy.E, expr.args[0]) if isinstance(expr, sympy.exp) else expr.args
            return self._power(self(base), self(exponent))
        function = _FUNCTIONS.get(type(expr).__name__)
        if function is None:
            raise Unsupported(type(expr).__name__)
        arguments = [self(part) for part in expr.args]
        if isinstance(expr, sympy.factorial) and abs(arguments[0]) > _MOST_FACTORIAL:
            raise TooLarge
        return function(*arguments)

    def _power(self, base: mpf | mpc, exponent: mpf | mpc) -> mpf | mpc:
        if base == 0:
            if mp.re(exponent) < 0:
                raise Undefined
            return mpf(1) if exponent == 0 else mpf(0)
        if abs(exponent) * abs(mp.log(abs(base), 10)) > _MOST_MAGNITUDE:
            raise TooLarge
        return mp.power(base, exponent)


_FUNCTIONS = {
    "Abs": abs,
    "log": mp.log,
    **{
        name: getattr(mp, name)
        for name in ["sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "asec", "acsc", "acot"]
    },
    **{
        name: getattr(mp, name)
        for name in ["sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "floor", "binomial", "factorial"]
    },
    "ceiling": mp.ceil,
    "UnevaluatedExpr": lambda value: value,
    "re": mp.re,
    "im": mp.im,
    "conjugate": mp.conj,
    "Max": max,
    "Min": min,
    "sign": mp.sign,
}


def _both(a: sympy.Basic, b: sympy.Basic, values: Mapping[str, Fraction]) -> tuple[mpf | mpc, mpf | mpc, mpf]:
    """Values of both, and the largest difference that rounding alone can explain."""
    digits = _BASE_DIGITS
    while True:
        with mp.workdps(digits):
            evaluator = _Evaluator(values)
            left, right = evaluator(a), evaluator(b)
            needed = 2 * evaluator.magnitude + 60
            if needed <= digits or digits > _BASE_DIGITS:
                return left, right, mpf(10) ** -(digits // 2)
        digits = needed


def constants_equal(a: sympy.Basic, b: sympy.Basic) -> bool:
    """Whether two constant expressions are the same number. Raises TooLarge, Unsupported, Undefined."""
    left, right = exact(a), exact(b)
    if left is not None and right is not None:
        return left == right
    x, y, tolerance = _both(a, b, {})
    with mp.workdps(2 * _BASE_DIGITS):
        return abs(x - y) <= tolerance


def rounds_to(expr: sympy.Basic, written: str) -> bool:
    """Whether the plain decimal `written` is the constant `expr`, correctly rounded, to at least six
    decimals.

    At least four significant digits are needed too: 0.000001 says too little about 1/2^20.
    """
    digits = written.lstrip("-+")
    decimals = len(digits.partition(".")[2])
    if decimals < 6 or len(digits.replace(".", "").lstrip("0")) < 4:
        return False
    value = _Evaluator({})
    with mp.workdps(decimals + len(digits) + 60):
        number = value(expr)
        target = Fraction(written)
        return abs(number - mpf(target.numerator) / target.denominator) <= mpf(10) ** -decimals / 2


def expressions_equal(a: sympy.Basic, b: sympy.Basic) -> bool:
    """Whether two expressions with symbols agree at random points, to a hundred digits.

    Symbols are real (complex if `i` is written); those named n, k, m, j stand for whole numbers. Points
    where either side is undefined, or not real without an `i` in sight, do not count. Raises Unsupported if
    fewer than 3 are left.
    """
    agreed = 0
    for left, right, tolerance in _at_points(a, b):
        with mp.workdps(2 * _BASE_DIGITS):
            if abs(left - right) > tolerance:
                return False
        agreed += 1
    if agreed < 3:
        raise Unsupported("hardly defined anywhere")
    return True


def constant_ratio(a: sympy.Basic, b: sympy.Basic) -> int:
    """Sign (1 or -1) of a/b if that is one real constant other than 0, else 0."""
    ratios = [
        left / right
        for left, right, tolerance in _at_points(a, b)
        if abs(right) > tolerance and abs(left) > tolerance
    ]
    if len(ratios) < 3 or any(abs(ratio - ratios[0]) > mpf(10) ** -12 * abs(ratios[0]) for ratio in ratios):
        return 0
    return 0 if mp.im(ratios[0]) else (1 if mp.re(ratios[0]) > 0 else -1)


def _at_points(a: sympy.Basic, b: sympy.Basic):
    atoms = {str(atom) for atom in unknowns(a) | unknowns(b)}
    imaginary = any(expr.has(sympy.I) for expr in (a, b))
    for point in range(_POINTS):
        values = {name: _coordinate(name, point) for name in atoms}
        try:
            left, right, tolerance = _both(a, b, values)
        except (Undefined, TooLarge):
            continue
        if not imaginary and (abs(mp.im(left)) > tolerance or abs(mp.im(right)) > tolerance):
            continue
        yield left, right, tolerance


def _coordinate(name: str, point: int) -> Fraction:
    """The value of a symbol at a point: the same on every machine. Three points of four are positive."""
    chosen = random.Random(f"{name}:{point}")
    if name in _WHOLE_NUMBER_NAMES:
        return Fraction(chosen.randint(2, 40))
    size = Fraction(chosen.randint(100, 4000), 997)
    return -size if chosen.random() < 0.5 and point % 2 == 0 else size
