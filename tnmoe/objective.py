"""What a plan minimises: a price for the ops of a contraction step."""

from __future__ import annotations

from collections.abc import Mapping

from tnmoe.cost import op_cost
from tnmoe.errors import PlanError
from tnmoe.ops import Op

OBJECTIVES = ("flops", "macs")


def check_objective(objective: object) -> str:
    """`objective` if it is one of `OBJECTIVES`, else a `PlanError`."""
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise PlanError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    return objective


def price(ops: tuple[Op, ...], sizes: Mapping[str, int], objective: str) -> int:
    """FLOPs (all classes) or MACs of the ops of one step, as `tnmoe.cost` counts them."""
    total = 0
    for op in ops:
        cost = op_cost(op, sizes)
        total += cost.flops if objective == "flops" else cost.macs
    return total


def least_price(volume: int, sums: bool, objective: str) -> int:
    """What a step costs at least whose two operands span `volume` products, some of which are added if `sums`.

    Only a bound, to leave out steps unpriced; what is chosen is always priced by `price`.
    """
    return 2 * volume if sums and objective == "flops" else volume
