"""What the ops of a contraction step cost under an objective.

All prices are additive over steps, so that dynamic programming over subsets is exact for each of them; they are
integers, the criteria of an objective packed into one, so that prices add and compare as lists of criteria do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from fractions import Fraction
from typing import assert_never, cast

from tnmoe.costing.backward import training_cost
from tnmoe.costing.objective import ForwardPrice, Objective, Term
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.saved import saved_inside, saved_values
from tnmoe.costing.traffic import forward_traffic
from tnmoe.ir.dataflow import elements
from tnmoe.ir.network import Network
from tnmoe.ir.ops import Op, propagate, results
from tnmoe.ir.value import Role, Value

_FIRST = 1 << 4096
"""Weight of a criterion over the next one: beyond any figure that sizes below 2**63 can give."""


def forward_price(ops: Iterable[Op], sizes: Mapping[str, int], which: ForwardPrice) -> int:
    """FLOPs or MACs of the forward pass of some ops."""
    if which == "flops":
        return sum([op_cost(op, sizes).flops for op in ops])
    return sum([op_cost(op, sizes).macs for op in ops])


def price(
    ops: Iterable[Op],
    sizes: Mapping[str, int],
    objective: Objective,
    requires_grad: Set[str] = frozenset(),
    leaves: Set[str] = frozenset(),
    varying: Set[str] = frozenset(),
) -> int:
    """The price of some ops, as `tnmoe.costing.op_cost` and `tnmoe.costing.backward` count them.

    Args:
        ops: of one step, or of several.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps.
        requires_grad: names of the operands that need a gradient.
        leaves: names of the network's tensors: they exist anyway, and are not counted as saved.
        varying: names of the operands that differ from call to call, for "inference".

    Raises:
        PlanError: an objective that is no sum over steps.
    """
    if objective.forward is not None:
        return forward_price(ops, sizes, objective.forward)
    ops = tuple(ops)
    total = 0
    for criterion in objective.criteria:
        figures = [weight * _figure(term, ops, sizes, requires_grad, leaves, varying) for term, weight in criterion]
        total = total * _FIRST + sum(figures)
    return total


def _figure(
    term: Term,
    ops: tuple[Op, ...],
    sizes: Mapping[str, int],
    requires_grad: Set[str],
    leaves: Set[str],
    varying: Set[str],
) -> int:
    match term.name:
        case "flops" | "macs" as which:
            return forward_price(ops, sizes, which)
        case "training":
            return training_cost(ops, sizes, requires_grad).flops
        case "saved":
            live = propagate(ops, requires_grad)
            kept = {v.name: v for op in ops for v in saved_values(op, sizes, live) if v.name not in leaves}
            values = [elements(v.indices, sizes) for v in kept.values()]
            return sum(values + [saved_inside(op, sizes, live).elements for op in ops])
        case "traffic":
            moved = [forward_traffic(op, sizes) for op in ops]
            return cast(int, sum(t.read + t.written for t in moved))
        case "inference":
            each = forward_price(_reached(ops, varying), sizes, "flops")
            all_ = forward_price(ops, sizes, "flops")
            return each if term.calls is None else term.calls * each + (all_ - each)
    assert_never(term.name)


def _reached(ops: Iterable[Op], varying: Set[str]) -> list[Op]:
    """The ops that have to run at every call, for what they read differs."""
    live = propagate(ops, varying)
    return [op for op in ops if any(v.name in live for v in results(op))]


class Prices:
    """Prices of the steps of one network under an objective, and what they depend on besides the ops.

    Args:
        network: what is contracted; its data tensors vary from call to call, its weights do not.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps.
        requires_grad: names of the tensors that need a gradient, for the objectives about training.

    Raises:
        PlanError: an objective that is no sum over steps.
    """

    def __init__(
        self, network: Network, sizes: Mapping[str, int], objective: Objective, requires_grad: Set[str] = frozenset()
    ) -> None:
        self.sizes, self.objective = sizes, objective
        self.leaves = network.leaf_names
        self.requires_grad = set(requires_grad) if objective.of_training else set()
        data = [t.name for t in network.tensors if t.role is Role.DATA]
        self.varying = set(data) if "inference" in objective.names else set()
        self._least = {key: _least(objective, *key) for key in ((s, v) for s in (False, True) for v in (False, True))}

    @property
    def by_name(self) -> bool:
        """True if equal ops of other operands may have other prices."""
        return bool(self.requires_grad or self.varying)

    def of(self, ops: Iterable[Op]) -> int:
        """The price of ops whose operands are leaves, or results that `follow` was told of."""
        return price(ops, self.sizes, self.objective, self.requires_grad, self.leaves, self.varying)

    def follow(self, ops: Iterable[Op]) -> None:
        """Take note of what the results of a step depend on."""
        if self.requires_grad:
            self.requires_grad |= propagate(ops, self.requires_grad)
        if self.varying:
            self.varying |= propagate(ops, self.varying)

    def mark(self, value: Value) -> tuple[bool, bool, bool]:
        """All that a price depends on besides the indices of an operand."""
        return value.name in self.requires_grad, value.name in self.leaves, value.name in self.varying

    def least(self, volume: int, sums: bool, varies: bool) -> int:
        """What a step costs at least whose operands span `volume` products, some of which are added if `sums`.

        Only a bound, to leave out steps unpriced; what is chosen is always priced by `of`. `varies` says whether
        the result differs from call to call.
        """
        return self._least[sums, varies] * volume


def _least(objective: Objective, sums: bool, varies: bool) -> int:
    total = 0
    for criterion in objective.criteria:
        figure = 0
        for term, weight in criterion:
            each = 0 if term.name in ("saved", "traffic") else 2 if sums and term.name != "macs" else 1
            if term.name == "inference":
                each *= (term.calls or 1) if varies else int(term.calls is not None)
            figure += weight * each
        total = total * _FIRST + figure
    return total


def amounts(total: int, objective: Objective) -> tuple[Fraction, ...]:
    """A price by criterion, in the units of the objective."""
    units: list[Fraction] = []
    for criterion in reversed(objective.criteria):
        total, figure = divmod(total, _FIRST)
        term, weight = criterion[0]
        units.insert(0, figure * term.weight / weight)
    return tuple(units)
