"""Integers at which a formula in one size is negative or zero, exactly.

Formulas are polynomials, with three things that padding and gates bring in: floors and ceilings of polynomials with
rational coefficients, which are polynomials in each residue class of their denominators; cases, told apart by where
another polynomial is positive; and ceilings of binary logarithms, constant between powers of two. So the integers fall
into finitely many cells, in each of whose residue classes the formula is a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import sympy

from tnmoe.errors import CostError
from tnmoe.symbolic.columns import Columns, column
from tnmoe.symbolic.dims import LARGEST

Range = tuple[int, int | None]
"""First and last integer; None is no end, or where logarithms occur the largest size."""

MOST_CLASSES = 4096
"""Residue classes at most."""

MOST_SINGLES = 4096
"""Integers at most that are looked at one by one, where the classes between two roots differ in sign."""


def integer_ranges(formula: sympy.Expr, size: sympy.Symbol) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Integers from 1 on at which a formula is negative, and at which it is zero.

    The sign of each integer beside a root is found by substitution; between them and beyond them it cannot change.

    Raises:
        CostError: a formula of another kind, or one whose sign depends on the residue class without end.
    """
    starts = sorted({1, *(s for s in _starts(formula, size) if 1 < s <= LARGEST)})
    signs: list[tuple[int, int | None, int]] = []
    for low, after in pairwise([*starts, None]):
        assert low is not None
        signs += _signs(_classes(formula, size, low), size, low, None if after is None else after - 1)
    return _joined(signs, -1), _joined(signs, 0)


def _starts(formula: sympy.Expr, size: sympy.Symbol) -> Iterable[int]:
    """Integers at which another case, or another value of a logarithm, may begin."""
    for relation in formula.atoms(sympy.core.relational.Relational):
        for root in _roots(_polynomial(relation.lhs - relation.rhs, size)):
            yield from (int(sympy.floor(root)) + 1, int(sympy.ceiling(root)))
    for logarithm in formula.atoms(sympy.log):
        inside = logarithm.args[0]
        if inside.is_number:
            continue
        grows = _polynomial(inside, size)
        for power in range(LARGEST.bit_length()):
            for root in _roots(grows - 2**power):
                yield from (int(sympy.floor(root)) + 1, int(sympy.ceiling(root)))


def _classes(formula: sympy.Expr, size: sympy.Symbol, at: int) -> list[sympy.Poly]:
    """The polynomial of each residue class, in the cell that begins with `at`."""

    def case(*pairs: sympy.Basic) -> sympy.Basic:
        return next(value for value, condition in pairs if condition.subs(size, at) == sympy.true)

    def steady(part: sympy.Basic) -> bool:
        return isinstance(part, sympy.ceiling | sympy.floor) and bool(part.atoms(sympy.log))

    def value(part: sympy.Expr) -> sympy.Integer:
        return sympy.Integer(int(Columns({str(size): column([at])}).evaluate(part)[0]))

    simple = formula.replace(sympy.Piecewise, case).replace(steady, value)
    rounded_ = simple.atoms(sympy.floor, sympy.ceiling)
    inside = {r: _polynomial(r.args[0], size) for r in rounded_}
    classes = math.lcm(*(int(c.q) for p in inside.values() for c in p.all_coeffs()))
    if classes > MOST_CLASSES:
        raise CostError(f"{classes:,} residue classes of {size} to tell apart, more than {MOST_CLASSES:,}")
    polynomials = []
    for residue in range(classes):
        values = {}
        for r, p in inside.items():
            exact = p.eval(residue)
            # What rounding takes away depends on the class alone.
            values[r] = p.as_expr() + (type(r)(exact) - exact)
        polynomials.append(_polynomial(simple.xreplace(values), size))
    return polynomials


def _polynomial(formula: sympy.Expr, size: sympy.Symbol) -> sympy.Poly:
    expanded = sympy.expand(formula)
    if not expanded.is_polynomial(size):
        raise CostError(f"no polynomial in {size}, with or without rounding: {expanded}")
    polynomial = sympy.Poly(expanded, size)
    if not all(c.is_Rational for c in polynomial.all_coeffs()):
        raise CostError(f"coefficients of {expanded} are no rational numbers")
    return polynomial


def _roots(polynomial: sympy.Poly) -> list[sympy.Expr]:
    return [] if polynomial.degree() < 1 else sympy.real_roots(polynomial, multiple=True)


def _bound(polynomial: sympy.Poly) -> int:
    """An integer that no root exceeds (Cauchy's bound)."""
    first, *rest = polynomial.all_coeffs()
    return 1 + max((int(abs(c / first)) + 1 for c in rest), default=0) if first else 0


def _floors(polynomial: sympy.Poly) -> set[int]:
    """The floor of every real root; of a square root perhaps one less."""
    match polynomial.degree():
        case 1:
            slope, offset = polynomial.all_coeffs()
            return {int(sympy.floor(-offset / slope))}
        case 2:
            a, b, c = (int(x) for x in polynomial.clear_denoms(convert=True)[1].all_coeffs())
            inside = b * b - 4 * a * c
            if inside < 0:
                return set()
            root = math.isqrt(inside)
            return {floor - k for s in (-root, root) for floor in [(-b + s) // (2 * a)] for k in (0, 1)}
    return {int(sympy.floor(root)) for root in _roots(polynomial)}


def _signs(
    classes: list[sympy.Poly], size: sympy.Symbol, low: int, high: int | None
) -> list[tuple[int, int | None, int]]:
    """Stretches of one sign in a cell, from `low` to `high`."""

    def sign(at: int) -> int:
        return int(sympy.sign(classes[at % len(classes)].eval(at)))

    within = [p for p in set(classes) if low <= _bound(p)]
    beside = {floor + k for p in within for floor in _floors(p) for k in (-1, 0, 1, 2)}
    points = sorted({low, *(p for p in beside if low < p and (high is None or p <= high))})
    signs: list[tuple[int, int | None, int]] = []
    for here, after in pairwise([*points, None]):
        assert here is not None
        end = high if after is None else after - 1
        signs.append((here, here, sign(here)))
        if end is not None and end <= here:
            continue
        stretch = range(here + 1, here + 1 + len(classes))
        seen = {sign(at) for at in stretch if end is None or at <= end}
        if len(seen) == 1:
            signs.append((here + 1, end, seen.pop()))
        elif end is not None and end - here <= MOST_SINGLES:
            signs += [(at, at, sign(at)) for at in range(here + 1, end + 1)]
        else:
            raise CostError(f"which is less depends on {size} modulo {len(classes)} from {here + 1:,} on")
    return signs


def _joined(stretches: Iterable[tuple[int, int | None, int]], wanted: int) -> tuple[Range, ...]:
    ranges: list[Range] = []
    for low, high, sign in stretches:
        if sign != wanted:
            continue
        if ranges and ranges[-1][1] == low - 1:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return tuple(ranges)
