"""Exact comparison of multilinear polynomials over a box of sizes, many at a time.

A multilinear polynomial is a tuple of *corner numbers*, two for each free index: its values at the lower and the
upper bound; or, where the upper bound is open, its value at the lower bound and its slope. p ≤ q holds on the whole
box if and only if it holds corner by corner: for values because a multilinear function takes its extremes at the
vertices, for slopes because q - p, expanded at lower + y, is non-negative for all y ≥ 0 only if no coefficient is
negative (let the y of one coefficient grow, the others be 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.errors import PlanError
from tnmoe.planners.atlas.polynomial import Monomial, Polynomial

Bounds = Mapping[str, tuple[int, int | None]]
"""Lower and upper bound of every index; None leaves it open above."""

_SURE = 2.0**-44
"""Relative distance from which floats decide: sums of fewer than 100 non-negative terms err by less than 2**-45."""

_WRAP_LIMIT = 2**105
"""Below it, two numbers that floats cannot tell apart differ by less than 2**63: 64-bit wrap-around is exact."""

_FLOAT_LIMIT = 2**1000

_FEW = 24
"""Columns that are compared first."""


@dataclass(frozen=True)
class Rows:
    """Corner numbers of several polynomials over the same indices, one row each.

    Attributes:
        approx: as floats, of the relative error that `_SURE` allows for.
        exact: modulo 2**64, as int64; or Python integers where they may be too large for `_WRAP_LIMIT`.
    """

    approx: NDArray[np.float64]
    exact: NDArray[Any]

    def __len__(self) -> int:
        return len(self.approx)

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(self.approx[rows], self.exact[rows])

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.approx + other.approx, self.exact + other.exact)

    def least(self) -> Rows:
        """One row: the smallest number of each corner."""
        if self.exact.dtype == object:
            return Rows(self.approx.min(0, keepdims=True), self.exact.min(0, keepdims=True))
        # What is smallest is only known up to the floats' doubt, so pick the float's choice and then mend it.
        at = self.approx.argmin(0)[None, :]
        low = Rows(np.take_along_axis(self.approx, at, 0), np.take_along_axis(self.exact, at, 0))
        close = self.approx <= low.approx * (1 + _SURE)
        behind = np.where(close, self.exact - low.exact, 0).min(0, keepdims=True)
        return Rows(low.approx, low.exact + behind)

    @cached_property
    def _few(self) -> NDArray[np.float64]:
        """Some spread columns, on which most comparisons fail."""
        columns = self.approx.shape[1]
        return np.ascontiguousarray(self.approx[:, :: max(1, columns // _FEW)])

    def above(self, other: Rows, among: NDArray[np.intp] | None = None) -> NDArray[np.bool_]:
        """For each row (or each of `among`): is it, in every corner, at least `other` (one row)? Exact."""
        rows = np.arange(len(self)) if among is None else among
        above = np.zeros(len(rows), dtype=bool)
        some = np.flatnonzero((self._few[rows] >= other._few * (1 - _SURE)).all(1))
        some = some[(self.approx[rows[some]] >= other.approx * (1 - _SURE)).all(1)]
        if len(some):
            rest = self[rows[some]]
            no_less = (rest.exact - other.exact) >= 0
            if self.exact.dtype != object:
                no_less |= rest.approx > other.approx * (1 + _SURE)
            above[some] = no_less.all(1)
        return above

    def below(self, other: Rows) -> NDArray[np.bool_]:
        """For each row: is it, in every corner, at most `other` (one row)? Exact."""
        maybe = np.flatnonzero((self._few <= other._few * (1 + _SURE)).all(1))
        maybe = maybe[(self.approx[maybe] <= other.approx * (1 + _SURE)).all(1)]
        below = np.zeros(len(self), dtype=bool)
        if len(maybe):
            rest = self[maybe]
            no_more = (other.exact - rest.exact) >= 0
            if self.exact.dtype != object:
                no_more |= other.approx > rest.approx * (1 + _SURE)
            below[maybe] = no_more.all(1)
        return below

    def undominated(self) -> NDArray[np.intp]:
        """Rows that no other row is below or equal to (of equal rows the first), ascending by a mean of logarithms."""
        alive = np.argsort(np.log1p(self.approx).sum(1), kind="stable")
        kept: list[int] = []
        while len(alive):
            first, alive = int(alive[0]), alive[1:]
            kept.append(first)
            alive = alive[~self.above(self[first : first + 1], alive)]
        return np.array(kept, dtype=np.intp)


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other."""
    return Rows(np.concatenate([p.approx for p in parts]), np.concatenate([p.exact for p in parts]))


@dataclass(frozen=True)
class Domain:
    """The sizes an atlas is for.

    Attributes:
        bounds: of every index; one integer stands for an index of that size alone.
        scale: the largest factor by which the cost of a step is multiplied, i.e. the calls.

    Raises:
        PlanError: a bound that is no positive integer, or an empty interval.
    """

    bounds: Bounds
    scale: int = 1

    def __post_init__(self) -> None:
        plain = {index: _interval(index, given) for index, given in self.bounds.items()}
        object.__setattr__(self, "bounds", plain)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Indices of more than one size; the others are numbers."""
        return tuple(i for i, (low, high) in self.bounds.items() if low != high)

    @cached_property
    def _widenings(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[NDArray[np.intp], NDArray[np.bool_]]]:
        return {}

    @cached_property
    def limit(self) -> int:
        """More than any corner number of any cost over this domain."""
        # An order of at most 12 tensors has 11 steps of at most 5 ops, each at most 2 × the product of all sizes.
        return 128 * self.scale * math.prod([high or low for low, high in self.bounds.values()])

    def corners(self, polynomial: Polynomial, indices: Sequence[str]) -> list[int]:
        """Its corner numbers over free `indices`; bit k of a position chooses the second number of `indices[k]`."""
        total = [0] * 2 ** len(indices)
        for monomial, coefficient in polynomial.terms.items():
            for k, number in enumerate(self._monomial(monomial, indices)):
                total[k] += coefficient * number
        return total

    def _monomial(self, monomial: Monomial, indices: Sequence[str]) -> list[int]:
        numbers = [math.prod([self.bounds[i][0] for i in monomial if i not in indices])]
        for index in indices:
            low, high = self.bounds[index]
            if index in monomial:
                first, second = low, 1 if high is None else high
            else:
                first, second = 1, 0 if high is None else 1
            numbers = [n * first for n in numbers] + [n * second for n in numbers]
        return numbers

    def rows(self, polynomials: Iterable[Polynomial], indices: Sequence[str]) -> Rows:
        """Corner numbers of polynomials."""
        if self.limit >= _FLOAT_LIMIT:
            raise PlanError("the bounds are too wide: the product of all upper bounds must stay below 2**993")
        exact = [self.corners(p, indices) for p in polynomials]
        shape = (len(exact), 2 ** len(indices))
        approx = np.array([[float(n) for n in row] for row in exact], dtype=np.float64).reshape(shape)
        if self.limit >= _WRAP_LIMIT:
            return Rows(approx, np.array(exact, dtype=object).reshape(shape))
        wrapped = np.array([[n % 2**64 for n in row] for row in exact], dtype=np.uint64).reshape(shape)
        return Rows(approx, wrapped.view(np.int64))

    def widen(self, rows: Rows, old: Sequence[str], new: Sequence[str]) -> Rows:
        """The same polynomials over more indices, which they do not hold."""
        if tuple(old) == tuple(new):
            return rows
        key = tuple(old), tuple(new)
        if key not in self._widenings:
            self._widenings[key] = self._widening(*key)
        source, kept = self._widenings[key]
        exact = rows.exact[:, source]
        return Rows(rows.approx[:, source] * kept, exact * kept.astype(np.int64))

    def _widening(self, old: tuple[str, ...], new: tuple[str, ...]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        place = {index: k for k, index in enumerate(old)}
        positions = np.arange(2 ** len(new))
        source = np.zeros_like(positions)
        kept = np.ones(len(positions), dtype=bool)
        for k, index in enumerate(new):
            bit = positions >> k & 1
            if index in place:
                source |= bit << place[index]
            elif self.bounds[index][1] is None:
                kept &= bit == 0  # no slope in an index it does not hold
        return source, kept

    def outside(self, sizes: Mapping[str, int]) -> str | None:
        """What is wrong with `sizes`, or None if they lie within the bounds."""
        for index, (low, high) in self.bounds.items():
            if index not in sizes:
                return f"index {index!r} has no size"
            size = sizes[index]
            if size < low or (high is not None and size > high):
                return f"{index} = {size} is outside its bounds, {low} to {'∞' if high is None else high}"
        return None


def _interval(index: str, given: object) -> tuple[int, int | None]:
    match given:
        case int() if type(given) is int:
            low, high = given, given
        case (low, high) if type(low) is int and (high is None or type(high) is int):
            pass
        case _:
            raise PlanError(
                f"the bounds of {index!r} must be one integer or (lowest, highest), highest None if open; got {given!r}"
            )
    if low < 1:
        raise PlanError(f"the lowest size of {index!r} must be at least 1, got {low}")
    if high is not None and high < low:
        raise PlanError(f"the bounds of {index!r} are empty: {low} is above {high}; swap them")
    return low, high
