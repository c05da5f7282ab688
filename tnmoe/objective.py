"""What a plan minimises: a price for the ops of a contraction step.

All prices are additive over steps, so that dynamic programming over subsets is exact for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from tnmoe.backward import propagate, saved_inside, saved_values, training_cost
from tnmoe.cost import elements, op_cost
from tnmoe.errors import PlanError, unknown
from tnmoe.ops import Op

OBJECTIVES = ("flops", "macs", "training", "saved")
"""FLOPs or MACs of the forward pass; FLOPs of forward and backward; elements kept for the backward, then FLOPs."""

TRAINING = ("training", "saved")
"""Objectives that depend on what needs a gradient."""

_FIRST = 1 << 4096
"""Weight of the first of two lexicographic criteria: beyond any number of FLOPs that sizes below 2**63 can give."""


def check_objective(objective: object) -> str:
    """`objective` if it is one of `OBJECTIVES`, else a `PlanError`."""
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise PlanError(unknown("objective", objective, OBJECTIVES))
    return objective


def price(
    ops: tuple[Op, ...],
    sizes: Mapping[str, int],
    objective: str,
    needing: Set[str] = frozenset(),
    leaves: Set[str] = frozenset(),
) -> int:
    """The price of the ops of one step, as `tnmoe.cost` and `tnmoe.backward` count them.

    Args:
        ops: of one step.
        sizes: an integer for every index.
        objective: one of `OBJECTIVES`.
        needing: names of the operands that need a gradient.
        leaves: names of the network's tensors: they exist anyway, and are not counted as saved.
    """
    match objective:
        case "flops":
            return sum([op_cost(op, sizes).flops for op in ops])
        case "macs":
            return sum([op_cost(op, sizes).macs for op in ops])
        case "training":
            return training_cost(ops, sizes, needing).flops
    live = propagate(ops, needing)
    kept = {v.name: v for op in ops for v in saved_values(op, live) if v.name not in leaves}
    saved = sum([elements(v.indices, sizes) for v in kept.values()] + [saved_inside(op, sizes, live) for op in ops])
    return _FIRST * saved + training_cost(ops, sizes, needing).flops


def least_price(volume: int, sums: bool, objective: str) -> int:
    """What a step costs at least whose two operands span `volume` products, some of which are added if `sums`.

    Only a bound, to leave out steps unpriced; what is chosen is always priced by `price`.
    """
    return 2 * volume if sums and objective != "macs" else volume
