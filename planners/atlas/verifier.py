"""Checks a plan atlas: `python atlas_verifier.py atlas.json`. Standard library only; trusts nothing of tnmoe.

What is proven: for all sizes within the bounds, one of the listed orders costs no more than any order of pairwise
contractions. The file lists for every subset of the tensors some polynomials. By induction over subsets, every order
of a subset is somewhere matched or undercut: whatever two parts of a split may cost, the sum of a polynomial listed
for each and of the step that joins them is, everywhere on the bounds, at least some polynomial listed for the subset.
For all tensors, each listed polynomial is the cost of a listed order, or `multipliers` prove that at every point some
order is below it. Costs are restated here from the definition; integers are Python's.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Monomial = frozenset[str]
Polynomial = dict[Monomial, int]
Terms = list[tuple[Monomial, int]]
Operand = tuple[Monomial, bool, Monomial | None]
"""Indices, whether it holds the folded index, and its slice there (None: all ones)."""


class Rejected(Exception):
    """The atlas proves less than it says."""


def need(condition: bool, why: str) -> None:
    """Reject unless `condition` holds."""
    if not condition:
        raise Rejected(why)


# ---- what a step costs -----------------------------------------------------------------------------------------


class Costs:
    """Costs of steps of a network, as lists of (indices, coefficient)."""

    def __init__(self, atlas: Mapping[str, Any]) -> None:
        network = atlas["network"]
        self.tensors, bias = network["tensors"], network.get("bias")
        self.output = frozenset(network["output"])
        self.sets = [frozenset(t["indices"]) for t in self.tensors]
        self.indices = frozenset().union(*self.sets)
        self.flops = atlas["objective"] == "flops"
        need(self.flops or atlas["objective"] == "macs", "unknown objective")
        self.calls, constant = atlas["calls"], atlas["constant"]
        need(type(self.calls) is int and self.calls >= 1, "calls must be a positive integer")
        self.data = [t["name"] not in constant for t in self.tensors]
        self.leaves: list[Operand] = [(s, False, None) for s in self.sets]
        if bias is not None:
            for k, t in enumerate(self.tensors):
                if t["name"] == bias["data"]:
                    self.leaves[k] = (self.sets[k], True, None)
                elif t["name"] == bias["weight"]:
                    self.leaves[k] = (self.sets[k], True, frozenset(bias["indices"]))

    def reduce(self, x: Monomial, keep: Monomial) -> tuple[Terms, Monomial]:
        """Sum the indices that nobody needs."""
        return ([(x, 1)] if self.flops and x - keep else []), x & keep

    def pair(self, x: Monomial, y: Monomial, keep: Monomial) -> tuple[Terms, Monomial]:
        """Multiply two arrays; what only one has and nobody needs is summed first."""
        cost: Terms = []
        for a, b in ((x, y), (y, x)):
            if self.flops and a - b - keep:
                cost.append((a, 1))
        joint = (x & y) | ((x | y) & keep)
        return [*cost, (joint, 2 if self.flops and joint - keep else 1)], joint & keep

    def step(self, lhs: Operand, rhs: Operand, subset: int) -> tuple[Polynomial, Operand]:
        """Cost of joining two operands into `subset`, and the result."""
        outside = [s for k, s in enumerate(self.sets) if not subset >> k & 1]
        keep = self.output.union(*outside)
        cost, main = self.pair(lhs[0], rhs[0], keep)
        more: Terms = []
        result: Operand = (main, False, None)
        if lhs[1] and rhs[1]:
            slices = [s for s in (lhs[2], rhs[2]) if s is not None]
            need(bool(slices), "two folded operands without a bias meet")
            more, _ = self.pair(slices[0], slices[1], keep) if len(slices) == 2 else self.reduce(slices[0], keep)
            more = more + ([(main, 1)] if self.flops else [])  # the slice is added
        elif lhs[1] or rhs[1]:
            folded, other = (lhs, rhs) if lhs[1] else (rhs, lhs)
            if folded[2] is None:
                more, extra = self.reduce(other[0], keep)
            else:
                more, extra = self.pair(folded[2], other[0], keep)
            result = (main, True, extra)
        times = self.calls if any(d for k, d in enumerate(self.data) if subset >> k & 1) else 1
        return add([[(m, c * times) for m, c in cost + more]]), result

    def path(self, steps: Sequence[Sequence[int]]) -> Polynomial:
        """Cost of a whole order."""
        n = len(self.leaves)
        need(len(steps) == n - 1, "an order has too few or too many steps")
        if n == 1:
            terms, _ = self.reduce(self.sets[0], self.output)
            return add([[(m, c * (self.calls if self.data[0] else 1)) for m, c in terms]])
        live = {k: (leaf, 1 << k) for k, leaf in enumerate(self.leaves)}
        total = []
        for k, (i, j) in enumerate(steps):
            need(i != j and i in live and j in live, "an order uses an operand that is not there")
            (a, left), (b, right) = live.pop(i), live.pop(j)
            cost, result = self.step(a, b, left | right)
            live[n + k] = (result, left | right)
            total.append(cost)
        return add(total)


def add(polynomials: Iterable[Polynomial | Terms]) -> Polynomial:
    """Sum of polynomials given as pairs or as a mapping."""
    total: Polynomial = {}
    for p in polynomials:
        for monomial, coefficient in p.items() if isinstance(p, dict) else p:
            total[monomial] = total.get(monomial, 0) + coefficient
    return total


def value(polynomial: Polynomial, sizes: Mapping[str, int]) -> int:
    """Its exact value."""
    return sum(c * math.prod(sizes[i] for i in m) for m, c in polynomial.items())


def read(polynomial: Sequence[tuple[int, list[str]]], indices: Monomial) -> Polynomial:
    """A polynomial of the file: [[coefficient, [index, …]], …]."""
    terms: Polynomial = {}
    for coefficient, names in polynomial:
        monomial = frozenset(names)
        need(type(coefficient) is int and coefficient > 0, "a coefficient is not a positive integer")
        need(len(monomial) == len(names) and monomial <= indices and monomial not in terms, "a monomial is malformed")
        terms[monomial] = coefficient
    return terms


# ---- comparison on the bounds ----------------------------------------------------------------------------------


class Corners:
    """p ≤ q on the bounds if and only if it holds for each corner number: a multilinear function on a box takes its
    extremes at the vertices; where an index is open above, its value at the lower bound and its slope take their place.
    All corner numbers of a polynomial are packed into one integer, with a spare bit each, to be compared at once."""

    def __init__(self, bounds: Mapping[str, tuple[int, int | None]]) -> None:
        for low, high in bounds.values():
            need(type(low) is int and low >= 1, "a lower bound is not a positive integer")
            need(high is None or (type(high) is int and high >= low), "an upper bound is below the lower one")
        self.bounds = bounds
        self.free = [i for i, (low, high) in bounds.items() if low != high]
        self.count = 2 ** len(self.free)
        self.known: dict[Monomial, list[int]] = {}
        self.width = self.spare = 0

    def monomial(self, monomial: Monomial) -> list[int]:
        """Corner numbers of a product of indices; bit k of a position is free index k at its upper bound."""
        if monomial not in self.known:
            numbers = [math.prod(self.bounds[i][0] for i in monomial if i not in self.free)]
            for i in self.free:
                low, high = self.bounds[i]
                if i in monomial:
                    first, second = low, 1 if high is None else high
                else:
                    first, second = 1, 0 if high is None else 1
                numbers = [n * first for n in numbers] + [n * second for n in numbers]
            self.known[monomial] = numbers
        return self.known[monomial]

    def numbers(self, polynomial: Polynomial) -> list[int]:
        """Corner numbers of a polynomial."""
        rows = [[c * n for n in self.monomial(m)] for m, c in polynomial.items()]
        return [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * self.count

    def set_width(self, largest: int) -> None:
        """Room for numbers up to `largest`."""
        self.width = largest.bit_length() + 2
        self.spare = sum(1 << (k * self.width + self.width - 1) for k in range(self.count))

    def pack(self, polynomial: Polynomial) -> int:
        """All corner numbers in one integer; sums of such integers are those of sums."""
        return sum(n << (k * self.width) for k, n in enumerate(self.numbers(polynomial)))

    def at_most(self, p: int, q: int) -> bool:
        """Is packed p ≤ packed q in every corner? (A borrow clears the spare bit.)"""
        return ((q | self.spare) - p) & self.spare == self.spare


# ---- the proof -------------------------------------------------------------------------------------------------


def check_subsets(costs: Costs, corners: Corners, kept: Mapping[int, list[Polynomial]]) -> None:
    """The induction: whatever is left out of a subset's list is undercut by the list."""
    n = len(costs.leaves)
    operand = {1 << k: leaf for k, leaf in enumerate(costs.leaves)}
    steps: dict[tuple[int, int], Polynomial] = {}
    for subset in range(1, 1 << n):
        part = rest = subset & (subset - 1)
        while part:
            steps[subset, part], operand[subset] = costs.step(operand[subset ^ part], operand[part], subset)
            part = (part - 1) & rest
    listed = [max(corners.numbers(p)) for ps in kept.values() for p in ps]
    single = [max(corners.numbers(s)) for s in steps.values()]
    corners.set_width(2 * max(listed, default=0) + max(single, default=0))
    packed = {subset: [corners.pack(p) for p in ps] for subset, ps in kept.items()}
    for (subset, part), cost in steps.items():
        step, below = corners.pack(cost), packed[subset]
        for left in packed[subset ^ part]:
            for right in packed[part]:
                total = left + right + step
                for place, candidate in enumerate(below):
                    if corners.at_most(candidate, total):
                        below.insert(0, below.pop(place))  # what helped once helps again soon
                        break
                else:
                    raise Rejected(f"subset {subset:b}: a way to split it is not covered by its list")


def check_out(proof: Mapping[str, Any], costs: Costs, corners: Corners, orders: Sequence[Polynomial]) -> None:
    """Multipliers: a positive combination of (p - order) without a negative coefficient."""
    loser = corners.numbers(read(proof["cost"], costs.indices))
    degree = proof["degree"]
    need(len(set(degree)) == len(degree) and set(degree) <= set(corners.free), "multipliers over a fixed index")
    need(bool(proof["weights"]), "a proof without multipliers")
    ternary = [sum(3**k for k in range(len(corners.free)) if c >> k & 1) for c in range(corners.count)]
    total: dict[int, int] = {}
    for place, names, weight in proof["weights"]:
        need(type(weight) is int and weight > 0, "a multiplier is not a positive integer")
        need(type(place) is int and 0 <= place < len(orders), "a multiplier of no order")
        need(len(set(names)) == len(names) and set(names) <= set(degree), "a multiplier is malformed")
        shift = sum(3**k for k, i in enumerate(corners.free) if i in names)
        for corner, (a, b) in enumerate(zip(loser, corners.numbers(orders[place]), strict=True)):
            key = ternary[corner] + shift
            total[key] = total.get(key, 0) + weight * (a - b)
    need(min(total.values()) >= 0, "multipliers do not prove that an order never wins")


def verify(atlas: Mapping[str, Any]) -> tuple[int, int]:
    """Check an atlas, as parsed from JSON.

    Returns: (number of orders, how many of them are witnessed).
    Raises: Rejected, saying what does not hold.
    """
    need(atlas.get("format") == "tnmoe-atlas-1", "not an atlas")
    costs = Costs(atlas)
    bounds = {i: tuple(b) for i, b in atlas["bounds"].items()}
    need(set(bounds) == costs.indices, "the bounds are not those of the network's indices")
    corners = Corners(bounds)
    orders = [read(o["cost"], costs.indices) for o in atlas["orders"]]
    need(bool(orders), "no order is listed")
    for order, cost in zip(atlas["orders"], orders, strict=True):
        need(costs.path(order["steps"]) == cost, "an order does not cost what is written")
    witnessed = 0
    for place, order in enumerate(atlas["orders"]):
        sizes = order["witness"]
        if sizes is None:
            continue
        need(set(sizes) == costs.indices, "a witness lacks a size")
        for index, (low, high) in bounds.items():
            size = sizes[index]
            need(type(size) is int and size >= low and (high is None or size <= high), "a witness is out of bounds")
        own = value(orders[place], sizes)
        need(all(k == place or value(o, sizes) > own for k, o in enumerate(orders)), "a witness does not win")
        witnessed += 1
    need(atlas["closed"] is (witnessed == len(orders)), "closed, but some order is without a witness, or not closed")
    n = len(costs.leaves)
    kept: dict[int, list[Polynomial]] = {1 << k: [{}] for k in range(n)} if n > 1 else {}
    for key, polynomials in atlas["certificate"]["kept"].items():
        kept[int(key)] = [read(p, costs.indices) for p in polynomials]
    need(set(kept) == set(range(1, 1 << n)), "a subset has no list")
    if n == 1:
        need(kept[1] == [costs.path([])], "a single tensor is only summed")
    else:
        need(all(kept[1 << k] == [{}] for k in range(n)), "a leaf costs nothing")
        check_subsets(costs, corners, kept)
    out = [read(p["cost"], costs.indices) for p in atlas["certificate"]["out"]]
    for proof in atlas["certificate"]["out"]:
        check_out(proof, costs, corners, orders)
    need(all(p in orders or p in out for p in kept[2**n - 1]), "a candidate is neither listed nor proven out")
    return len(orders), witnessed


def main(arguments: Sequence[str]) -> int:
    """Check the files named on the command line; the exit status is 1 if one is rejected."""
    if not arguments:
        print("usage: python atlas_verifier.py ATLAS.json …", file=sys.stderr)
        return 2
    status = 0
    for name in arguments:
        try:
            with open(name, encoding="utf-8") as file:
                orders, witnessed = verify(json.load(file))
            rest = f", {orders - witnessed} undecided" if orders > witnessed else ""
            print(f"{name}: proven. {orders} orders hold every optimum; {witnessed} win somewhere{rest}.")
        except Rejected as reason:
            print(f"{name}: rejected: {reason}")
            status = 1
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            print(f"{name}: rejected: not a readable atlas ({type(error).__name__}: {error})")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
