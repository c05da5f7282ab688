"""Exact planning by dynamic programming over subsets of tensors.

The cheapest way to contract a subset depends on the subset alone, because so do the indices of its result: those
that the output or a tensor outside it still needs. Every split of every subset is considered, outer products
included, so the path found is optimal. Two bounds spare most of the pricing and lose nothing: a split that costs
more than a greedy path for the whole network is dropped, and so is one whose product alone is too large.
O(3ⁿ) splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

from tnmoe.costing.objective import FLOPS, Objective
from tnmoe.costing.prices import Prices
from tnmoe.errors import PlanError
from tnmoe.ir.layer import Contraction
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath, Tree
from tnmoe.ir.value import Role, Value
from tnmoe.lowering.lower import Operand, leaf_operands, lower_step, lower_steps
from tnmoe.planners import greedy
from tnmoe.planners.path_cache import kept_path

MAX_TENSORS = 12

WORTH_KEEPING = 11
"""Tensors from which a path is kept in the cache; see docs/decisions/planning-time.md."""

VERSION = 1
"""To be raised when paths come to be others."""


def plan(
    network: Network, sizes: Mapping[str, int], objective: Objective = FLOPS, requires_grad: Set[str] = frozenset()
) -> ContractionPath:
    """The cheapest order of pairwise contractions.

    Args:
        network: up to 12 tensors; hyperedges, batch indices and a folded bias are priced as they will run.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps.
        requires_grad: names of the tensors that need a gradient, for the objectives about training.

    Raises:
        PlanError: if there are more than 12 tensors, or the objective is unknown.
    """
    prices = Prices(network, sizes, objective, requires_grad)
    n = len(network.tensors)
    if n > MAX_TENSORS:
        raise PlanError(
            f"the exact planner takes up to {MAX_TENSORS} tensors, this network has {n}; use planner='search'"
        )
    if n < WORTH_KEEPING:
        return _cheapest(network, sizes, objective, requires_grad, prices)
    depends = {"version": VERSION}
    return kept_path(
        "exact",
        network,
        sizes,
        objective,
        requires_grad,
        depends,
        lambda: _cheapest(network, sizes, objective, requires_grad, prices),
    )


def _cheapest(
    network: Network, sizes: Mapping[str, int], objective: Objective, requires_grad: Set[str], prices: Prices
) -> ContractionPath:
    n = len(network.tensors)
    full = (1 << n) - 1
    kept, held = _index_masks(network)
    volume = _Volumes([sizes[i] for i in network.indices])
    operand: dict[int, Operand] = {1 << k: leaf for k, leaf in enumerate(leaf_operands(network))}
    best: dict[int, int] = {1 << k: 0 for k in range(n)}
    split: dict[int, tuple[int, int]] = {}
    node = Contraction(Value("__result", network.output), network)
    bound = 0  # by steps, as everything here: what two steps keep costs either of them
    for ops in lower_steps(node, greedy.plan(network, sizes, objective, requires_grad)):
        bound += prices.of(ops)
        prices.follow(ops)
    data = sum(1 << k for k, t in enumerate(network.tensors) if t.role is Role.DATA)
    # A step's price depends on the operands' indices and on what is kept (and, under some objectives, on what needs a
    # gradient, varies or is a leaf); equal steps recur across subsets.
    known: dict[tuple[object, object, int], tuple[int, Operand]] = {}

    def shape(operand: Operand) -> object:
        extra = operand.extra
        indices = operand.main.indices, operand.folded, extra.indices if extra is not None else None
        if not prices.by_name:
            return indices
        return indices, *(prices.mark(v) for v in (operand.main, extra) if v is not None)

    for subset in range(1, full + 1):
        if subset in best:
            continue
        rest = subset & (subset - 1)  # all but the lowest tensor, so each split is met once
        candidates = []
        part = rest
        while part:
            if part in best and subset ^ part in best:
                candidates.append((best[subset ^ part] + best[part], subset ^ part, part))
            part = (part - 1) & rest
        candidates.sort()
        keep, varies = kept[subset], bool(subset & data)
        names = frozenset([i for k, i in enumerate(network.indices) if keep >> k & 1])
        cheapest = bound + 1
        for so_far, left, right in candidates:
            if so_far >= cheapest:
                break
            a, b = held[left], held[right]
            joint = (a & b) | ((a | b) & keep)  # what one operand alone has, and nobody needs, is summed first
            if so_far + prices.least(volume[joint], bool(joint & ~keep), varies) >= cheapest:
                continue
            lhs, rhs = operand[left], operand[right]
            key = (shape(lhs), shape(rhs), keep)
            if key not in known:
                ops, result = lower_step(lhs, rhs, names, f"_{subset}")
                known[key] = prices.of(ops), result
            step, result = known[key]
            if so_far + step < cheapest:
                cheapest, split[subset], operand[subset] = so_far + step, (left, right), result
        if subset in split:
            best[subset] = cheapest
            if prices.by_name:
                # Once more under a name of its own, for marks go by name, and equal steps share one.
                lhs, rhs = (operand[side] for side in split[subset])
                ops, operand[subset] = lower_step(lhs, rhs, names, f"_{subset}")
                prices.follow(ops)

    return ContractionPath.from_tree(_tree(split, full), n, "subset_dp", exact=True)


class _Volumes(dict[int, int]):
    """Number of elements spanned by a set of indices, given as a bit mask."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __missing__(self, mask: int) -> int:
        self[mask] = result = math.prod([size for k, size in enumerate(self.sizes) if mask >> k & 1])
        return result


def _index_masks(network: Network) -> tuple[list[int], list[int]]:
    """For every subset of tensors: the indices needed outside it, and those its contraction has, as bit masks."""
    n = len(network.tensors)
    bit = {index: 1 << k for k, index in enumerate(network.indices)}
    own = [sum(bit[i] for i in t.indices) for t in network.tensors]
    inside = [0] * (1 << n)
    for subset in range(1, 1 << n):
        low = subset & -subset
        inside[subset] = inside[subset ^ low] | own[low.bit_length() - 1]
    wanted = sum(bit[i] for i in network.output)
    kept = [wanted | inside[((1 << n) - 1) ^ subset] for subset in range(1 << n)]
    held = [inside[subset] & kept[subset] for subset in range(1 << n)]
    for k, mask in enumerate(own):
        held[1 << k] = mask  # a leaf still has the indices that it alone has
    return kept, held


def _tree(split: Mapping[int, tuple[int, int]], subset: int) -> Tree:
    if subset not in split:
        return subset.bit_length() - 1
    left, right = split[subset]
    return _tree(split, left), _tree(split, right)
