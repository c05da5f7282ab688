"""Exact multilinear polynomials: what a contraction order costs while the sizes of its indices are unknown.

The number of elements of a value is a product of distinct indices, and a cost is a sum of such numbers. So a
`Polynomial` can stand wherever `tnmoe.costing.op_cost` takes a size, and the functions that price a concrete step give
the polynomial of a symbolic one: `forward_price(ops, {"b": Polynomial.variable("b"), …}, "flops")`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy

from tnmoe.errors import PlanError

Monomial = frozenset[str]
"""A product of distinct indices; the empty one is 1."""


class Polynomial:
    """A sum of square-free monomials with positive integer coefficients; immutable, equal by value.

    Products with a repeated index, and negative coefficients, raise `PlanError`: no cost has them.
    """

    __slots__ = ("terms",)

    terms: Mapping[Monomial, int]

    def __init__(self, terms: Mapping[Monomial, int] | None = None) -> None:
        self.terms = {m: c for m, c in (terms or {}).items() if c}
        for monomial, coefficient in self.terms.items():
            if coefficient < 0:
                raise PlanError(f"the coefficient of {_text(monomial, coefficient)} is negative; a cost adds up")

    @classmethod
    def variable(cls, index: str) -> Polynomial:
        """The size of `index`."""
        return cls({frozenset([index]): 1})

    @classmethod
    def of(cls, value: Polynomial | int) -> Polynomial:
        """`value` itself, or the constant."""
        return value if isinstance(value, Polynomial) else cls({frozenset(): value})

    # ---- arithmetic ------------------------------------------------------------------------------------------

    def __add__(self, other: Polynomial | int) -> Polynomial:
        if not isinstance(other, Polynomial | int):
            return NotImplemented
        terms = dict(self.terms)
        for monomial, coefficient in Polynomial.of(other).terms.items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return Polynomial(terms)

    def __mul__(self, other: Polynomial | int) -> Polynomial:
        if not isinstance(other, Polynomial | int):
            return NotImplemented
        terms: dict[Monomial, int] = {}
        for a, x in self.terms.items():
            for b, y in Polynomial.of(other).terms.items():
                if a & b:
                    raise PlanError(f"index {min(a & b)!r} would be squared; costs are multilinear")
                terms[a | b] = terms.get(a | b, 0) + x * y
        return Polynomial(terms)

    __radd__ = __add__
    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Polynomial | int):
            return NotImplemented
        return self.terms == Polynomial.of(other).terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    # ---- reading ---------------------------------------------------------------------------------------------

    def at(self, sizes: Mapping[str, int]) -> int:
        """The exact value at integer sizes."""
        return sum(c * math.prod([sizes[i] for i in m]) for m, c in self.terms.items())

    def affine(self, index: str) -> tuple[Polynomial, Polynomial]:
        """(p, q) with this polynomial = p + q · index, neither p nor q holding the index."""
        without = {m: c for m, c in self.terms.items() if index not in m}
        held = {m - {index}: c for m, c in self.terms.items() if index in m}
        return Polynomial(without), Polynomial(held)

    def minus_common(self, other: Polynomial) -> tuple[Polynomial, Polynomial]:
        """Both polynomials without what they share: common terms, common indices, a common integer factor.

        The comparison of the results is that of the originals at all sizes.
        """
        left, right = dict(self.terms), dict(other.terms)
        for monomial in left.keys() & right.keys():
            shared = min(left[monomial], right[monomial])
            left[monomial] -= shared
            right[monomial] -= shared
        sides = [{m: c for m, c in side.items() if c} for side in (left, right)]
        monomials = [m for side in sides for m in side]
        if not monomials:
            return Polynomial(), Polynomial()
        common = frozenset.intersection(*monomials)
        factor = math.gcd(*(c for side in sides for c in side.values()))
        a, b = (Polynomial({m - common: c // factor for m, c in side.items()}) for side in sides)
        return a, b

    def to_sympy(self) -> sympy.Expr:
        """The same as a sympy expression in positive integer symbols of the indices' names."""
        terms = [
            sympy.Mul(c, *(sympy.Symbol(i, positive=True, integer=True) for i in sorted(m)))
            for m, c in self.terms.items()
        ]
        return sympy.Add(*terms)

    def __str__(self) -> str:
        ordered = sorted(self.terms.items(), key=lambda term: (-len(term[0]), sorted(term[0])))
        return " + ".join(_text(m, c) for m, c in ordered) or "0"

    def __repr__(self) -> str:
        return f"Polynomial({self})"

    # ---- plain data ------------------------------------------------------------------------------------------

    def to_list(self) -> list[list[Any]]:
        """`[[coefficient, [index, …]], …]` in a fixed order, for JSON."""
        return sorted(([c, sorted(m)] for m, c in self.terms.items()), key=lambda term: (term[1], term[0]))

    @classmethod
    def from_list(cls, data: object) -> Polynomial:
        """What `to_list` gave.

        Raises:
            PlanError: if it is nothing of the kind.
        """
        terms: dict[Monomial, int] = {}
        for term in data if isinstance(data, list) else [data]:
            match term:
                case [int(coefficient), list(indices)] if _plain(coefficient, indices):
                    monomial = frozenset(indices)
                    if len(monomial) == len(indices) and monomial not in terms:
                        terms[monomial] = coefficient
                        continue
            raise PlanError(f"a polynomial is a list of [positive coefficient, [indices]], got {term!r}")
        return cls(terms)


def _plain(coefficient: int, indices: Sequence[object]) -> bool:
    return type(coefficient) is int and coefficient > 0 and all(isinstance(i, str) for i in indices)


def _text(monomial: Iterable[str], coefficient: int) -> str:
    names = sorted(monomial)
    shown = [] if coefficient == 1 and names else [str(coefficient)]
    return "·".join(shown + names)
