"""Proof that an order never wins: multipliers found by linear programming, checked in exact rationals.

On each free index the domain is lower·u + upper·v with u + v = 1 (or lower + v, if it is open above), u and v ≥ 0; in
these coordinates the corner numbers of a polynomial are its coefficients. If weights w ≥ 0 exist with

    Σ_s Σ_T w[s, T] · m_T · (p_t - p_s)   having no negative coefficient,

m_T running over monomials of the same degree in u and v, then at no point all p_s are above p_t: p_t never wins.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec

import numpy as np

from tnmoe.planners.atlas.dominance import Domain
from tnmoe.planners.atlas.polynomial import Polynomial

INSTALLED = find_spec("scipy") is not None

_DIGITS = (2, 6, 12, 24, 50)
"""Binary digits to which the solver's weights are rounded, the shortest certificate first."""

_SLACK = 1e-4
_MOST_ENTRIES = 300_000
_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Multipliers:
    """A proof that a cost is nowhere strictly the smallest.

    Attributes:
        degree: indices in which the monomials m_T are linear (in u or v); in the others they are constant.
        weights: (place of s, the indices T of the monomial, positive integer weight).
    """

    degree: tuple[str, ...]
    weights: tuple[tuple[int, tuple[str, ...], int], ...]


def prove_out(
    loser: Polynomial,
    others: Sequence[Polynomial],
    places: Sequence[int],
    domain: Domain,
    until: float = math.inf,
) -> Multipliers | None:
    """Multipliers over `others[place] for place in places`, or None if none were found.

    A search, not a decision: monomials are tried in growing sets until the clock (`time.monotonic`) passes `until`,
    and floats are rounded to small fractions.
    """
    if not INSTALLED:
        return None
    own = domain.corners(loser, domain.free)
    differences = [
        (s, [a - b for a, b in zip(own, domain.corners(others[s], domain.free), strict=True)]) for s in places
    ]
    for s, difference in differences:  # the usual case: one order is below it everywhere
        if min(difference) >= 0:
            return Multipliers((), ((s, (), 1),))
    for degree in _degrees(domain, len(places)):
        if time.monotonic() > until:
            break
        proof = _solve(differences, degree, domain)
        if proof is not None:
            return proof
    return None


def _degrees(domain: Domain, count: int) -> Iterator[tuple[str, ...]]:
    """Sets of indices for the monomials, the cheap ones first."""
    free = domain.free
    yield ()
    for size in (2, 3, 4):
        if math.comb(len(free), size) <= 40 and 2 ** (len(free) + size) * count <= _MOST_ENTRIES:
            yield from itertools.combinations(free, size)
    if 4 ** len(free) * count <= _MOST_ENTRIES:
        yield free


def _solve(differences: Sequence[tuple[int, list[int]]], degree: tuple[str, ...], domain: Domain) -> Multipliers | None:
    from scipy.optimize import linprog  # takes longer to import than all of tnmoe, and few need it
    from scipy.sparse import csr_matrix, hstack, identity

    free = domain.free
    ternary = [sum(3**k for k in range(len(free)) if corner >> k & 1) for corner in range(2 ** len(free))]
    monomials = [
        frozenset(chosen) for size in range(len(degree) + 1) for chosen in itertools.combinations(degree, size)
    ]
    code = [sum(3**k for k, i in enumerate(free) if i in m) for m in monomials]
    # Units in which the coefficients of one row are of one magnitude, or the solver would round them away.
    unit = {i: (high / low if high is not None else 1 / low) for i, (low, high) in domain.bounds.items()}
    scale = [math.prod([unit[i] for i in m]) for m in monomials]
    rows: list[int] = []
    columns: list[int] = []
    numbers: list[float] = []
    for a, (_, difference) in enumerate(differences):
        filled = [(ternary[k], float(n)) for k, n in enumerate(difference) if n]
        for b in range(len(monomials)):
            rows += [place + code[b] for place, _ in filled]
            columns += [a * len(monomials) + b] * len(filled)
            numbers += [n * scale[b] for _, n in filled]
    _, row = np.unique(rows, return_inverse=True)
    number = np.array(numbers)
    largest = np.zeros(row.max() + 1)
    np.maximum.at(largest, row, np.abs(number))
    shape = (len(largest), len(differences) * len(monomials))
    matrix = csr_matrix((-number / largest[row], (row, np.array(columns))), shape=shape)
    # Slack up to `_SLACK` is rewarded in every row: a solution away from its constraints survives the rounding.
    count = shape[0]
    answer = linprog(
        np.concatenate([np.zeros(shape[1]), np.full(count, -1.0)]),
        A_ub=hstack([matrix, identity(count)], format="csr"),
        b_ub=np.zeros(count),
        A_eq=np.concatenate([np.ones(shape[1]), np.zeros(count)])[None, :],
        b_eq=[1],
        bounds=[(0, None)] * shape[1] + [(0, _SLACK)] * count,
        method="highs",
        options={"time_limit": _SECONDS},
    )
    if answer.status != 0:
        return None
    solved = {divmod(k, len(monomials)): float(x) for k, x in enumerate(answer.x[: shape[1]]) if x > 1e-12}
    for digits in _DIGITS:
        weights = {(a, b): _rounded(x, digits) * Fraction(scale[b]) for (a, b), x in solved.items()}
        if _holds(weights, differences, ternary, code):
            common = math.lcm(*(w.denominator for w in weights.values()))
            whole = {key: int(w * common) for key, w in weights.items()}
            shared = math.gcd(*whole.values())
            named = [(differences[a][0], tuple(sorted(monomials[b])), w // shared) for (a, b), w in whole.items()]
            return Multipliers(degree, tuple(named))
    return None


def _rounded(value: float, digits: int) -> Fraction:
    """A positive number with so many significant binary digits."""
    mantissa, exponent = math.frexp(value)
    return Fraction(round(mantissa * 2**digits)) * Fraction(2) ** (exponent - digits)


def _holds(
    weights: dict[tuple[int, int], Fraction],
    differences: Sequence[tuple[int, list[int]]],
    ternary: Sequence[int],
    code: Sequence[int],
) -> bool:
    total: dict[int, Fraction] = {}
    for (a, b), weight in weights.items():
        for corner, number in enumerate(differences[a][1]):
            if number:
                place = ternary[corner] + code[b]
                total[place] = total.get(place, Fraction(0)) + weight * number
    return all(n >= 0 for n in total.values())
