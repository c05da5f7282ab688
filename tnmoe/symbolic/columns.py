"""Formulas evaluated over whole columns of sizes: exact integers, as fast as NumPy allows.

A bound on every intermediate decides: 64-bit integers where nothing can overflow, else Python's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import sympy

from tnmoe.errors import CostError
from tnmoe.symbolic.dims import Dim

Column: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""Integers: of dtype int64, or Python's in an array of objects."""

RELATIONS = {
    sympy.StrictLessThan: np.less,
    sympy.LessThan: np.less_equal,
    sympy.StrictGreaterThan: np.greater,
    sympy.GreaterThan: np.greater_equal,
    sympy.Equality: np.equal,
    sympy.Unequality: np.not_equal,
}
"""What compares two columns as a relation says."""

SAFE = 2**63
"""What 64-bit integers stay below."""


def column(values: Iterable[int]) -> Column:
    """Integers as a column, 64-bit if they fit."""
    numbers = list(values)
    fits = all(-SAFE < v < SAFE for v in numbers)
    return np.array(numbers, dtype=np.int64 if fits else object)


class Columns:
    """Named columns of one length, and formulas in those names; what formulas share is computed once."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        lengths = {name: len(c) for name, c in columns.items()}
        if len(set(lengths.values())) > 1:
            raise CostError(f"columns must have one length, got {lengths}")
        self.named = dict(columns)
        self.length = next(iter(lengths.values()), 1)
        self._known: dict[sympy.Expr, tuple[Column, int]] = {}

    def evaluate(self, formula: Dim) -> Column:
        """The formula's value in each row, exactly.

        Raises:
            CostError: a symbol without a column, or a function that formulas do not have.
        """
        values, _ = self._value(sympy.sympify(formula))
        return np.broadcast_to(values, (self.length,)).copy()

    def _value(self, formula: sympy.Expr) -> tuple[Column, int]:
        """The values, and a bound on their magnitude."""
        if formula not in self._known:
            self._known[formula] = self._compute(formula)
        return self._known[formula]

    def _compute(self, formula: sympy.Expr) -> tuple[Column, int]:
        match formula:
            case sympy.Integer():
                return column([int(formula)]), abs(int(formula))
            case sympy.Symbol():
                return self._column(str(formula))
            case sympy.Add():
                parts = [self._value(a) for a in formula.args]
                bound = sum(b for _, b in parts)
                return reduce(np.add, _wide([v for v, _ in parts], bound)), bound
            case sympy.Mul() if all(a.is_integer for a in formula.args):
                parts = [self._value(a) for a in formula.args]
                bound = math.prod(max(1, b) for _, b in parts)
                return reduce(np.multiply, _wide([v for v, _ in parts], bound)), bound
            case sympy.Pow() if formula.exp.is_Integer and formula.exp > 0:
                base, most = self._value(formula.base)
                bound = max(1, most) ** int(formula.exp)
                return _wide([base], bound)[0] ** int(formula.exp), bound
            case sympy.Min() | sympy.Max():
                parts = [self._value(a) for a in formula.args]
                bound = max(b for _, b in parts)
                smaller = np.minimum if isinstance(formula, sympy.Min) else np.maximum
                return reduce(smaller, _wide([v for v, _ in parts], bound)), bound
            case sympy.floor() | sympy.ceiling():
                return self._rounded(formula)
            case sympy.Piecewise():
                return self._cases(formula)
        raise CostError(f"{formula} cannot be evaluated over columns: {type(formula).__name__} is no integer operation")

    def _column(self, name: str) -> tuple[Column, int]:
        if name not in self.named:
            raise CostError(f"{name} has no column; there are {', '.join(self.named)}")
        values = self.named[name]
        return values, int(max(abs(values.max()), abs(values.min()))) if len(values) else 0

    def _cases(self, formula: sympy.Piecewise) -> tuple[Column, int]:
        """The value of the first case whose condition holds."""
        parts = [self._value(value) for value, _ in formula.args]
        bound = max(b for _, b in parts)
        shape = (self.length,)
        values = [np.broadcast_to(v, shape) for v in _wide([v for v, _ in parts], bound)]
        conditions = [np.broadcast_to(self._holds(condition), shape) for _, condition in formula.args]
        return np.select(conditions, values), bound

    def _holds(self, condition: sympy.Basic) -> Column:
        """Where a relation between two formulas holds, or several do."""
        if condition in (sympy.true, sympy.false):
            return np.array([condition == sympy.true])
        if isinstance(condition, sympy.And | sympy.Or):
            join = np.logical_and if isinstance(condition, sympy.And) else np.logical_or
            return reduce(join, [self._holds(part) for part in condition.args])
        if type(condition) not in RELATIONS:
            raise CostError(f"{condition} is no relation of two formulas")
        above, below = (condition.lhs - condition.rhs).as_numer_denom()
        if not below.is_positive:
            raise CostError(f"{condition} divides by what may be negative")
        holds: Column = RELATIONS[type(condition)](self._value(sympy.expand(above))[0], 0)
        return holds

    def _rounded(self, formula: sympy.Expr) -> tuple[Column, int]:
        """⌊a / b⌋, ⌈a / b⌉ and ⌈log2 a⌉."""
        (inside,) = formula.args
        up = isinstance(formula, sympy.ceiling)
        if up and inside.has(sympy.log):
            values, _ = self._value(_power_of_two(inside))
            lengths = [(int(v) - 1).bit_length() for v in np.unique(values)]
            return np.array(lengths)[np.unique(values, return_inverse=True)[1]], 64
        above, below = inside.as_numer_denom()
        (over, most), (under, least) = self._value(above), self._value(below)
        over, under = _wide([over, under], max(most, least) + 1)
        return -(-over // under) if up else over // under, most + 1


def _wide(columns: list[Column], bound: int) -> list[Column]:
    """The columns in a type that holds every number up to `bound`."""
    return columns if bound < SAFE else [c.astype(object) for c in columns]


def _power_of_two(exponent: sympy.Expr) -> sympy.Expr:
    """2 to a sum of logarithms over log 2: the product of their arguments."""
    product = sympy.Integer(1)
    for term in sympy.Add.make_args(sympy.expand(exponent)):
        inner = [a for a in sympy.Mul.make_args(term) if isinstance(a, sympy.log)]
        if not inner and term.is_Integer and term >= 0:
            product *= 2**term
            continue
        power = term * sympy.log(2) / inner[0] if inner else sympy.nan
        if not power.is_Integer or power < 0:
            raise CostError(f"⌈{exponent}⌉ cannot be evaluated over columns: it is no logarithm to base 2")
        product *= inner[0].args[0] ** power
    return product
