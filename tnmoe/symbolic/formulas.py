"""Formulas as a person would write them: R(N + I + O) rather than a sum of products."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import reduce

import sympy

from tnmoe.symbolic.dims import Dim

MAX_TERMS = 500
"""A formula that expands to more terms is left as it is."""

Term = tuple[int, Mapping[sympy.Expr, int]]
"""A coefficient, and the powers of atoms (symbols, or whatever is no sum, product or power)."""


def simplify(formula: Dim) -> sympy.Expr:
    """The formula with common factors taken out, the one that most terms share first; its value is unchanged."""
    given = sympy.sympify(formula)
    if _terms(given) > MAX_TERMS or given.has(sympy.Min):
        return given
    terms: list[Term] = []
    for term in sympy.Add.make_args(sympy.expand(given)):
        coefficient, rest = term.as_coeff_Mul()
        powers = {base: power for base, power in rest.as_powers_dict().items() if base != 1}
        if not coefficient.is_Integer or not all(power.is_Integer and power > 0 for power in powers.values()):
            return given
        terms.append((int(coefficient), {base: int(power) for base, power in powers.items()}))
    return _nested(terms)


def _nested(terms: list[Term]) -> sympy.Expr:
    """A sum of terms, nested by the atom that most of them share."""
    if len(terms) == 1:
        return sympy.Integer(terms[0][0]) * _monomial(terms[0][1])
    divisor = reduce(math.gcd, (coefficient for coefficient, _ in terms))
    common = {a: min(p.get(a, 0) for _, p in terms) for a in terms[0][1]}
    common = {a: power for a, power in common.items() if power}
    if divisor > 1 or common:
        inner = _nested([(c // divisor, _over(powers, common)) for c, powers in terms])
        # Unevaluated, for sympy multiplies a lone number into a sum.
        return sympy.Mul(divisor, inner, evaluate=False) if not common else divisor * _monomial(common) * inner
    count = Counter(a for _, powers in terms for a in powers)
    shared, times = min(count.items(), key=lambda item: (-item[1], str(item[0])), default=(None, 0))
    if times < 2:
        return sympy.Add(*(c * _monomial(powers) for c, powers in terms))
    inside = [term for term in terms if shared in term[1]]
    outside = [term for term in terms if shared not in term[1]]
    return _nested(inside) + (_nested(outside) if outside else 0)


def _monomial(powers: Mapping[sympy.Expr, int]) -> sympy.Expr:
    return sympy.Mul(*(atom**power for atom, power in powers.items()))


def _over(powers: Mapping[sympy.Expr, int], common: Mapping[sympy.Expr, int]) -> dict[sympy.Expr, int]:
    return {a: left for a, power in powers.items() if (left := power - common.get(a, 0))}


def _terms(formula: sympy.Expr) -> int:
    """Number of terms after expansion, at most."""
    counts = [_terms(argument) for argument in formula.args]
    if isinstance(formula, sympy.Pow) and formula.exp.is_Integer and formula.exp > 0:
        return int(min(counts[0] ** int(formula.exp), MAX_TERMS + 1))
    total = math.prod(counts) if isinstance(formula, sympy.Mul) else sum(counts)
    return min(max(1, total), MAX_TERMS + 1)
