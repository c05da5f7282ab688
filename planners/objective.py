"""What a planner minimises: a price for the ops of one contraction step."""

from __future__ import annotations

from collections.abc import Mapping

from tnmoe.cost import op_cost
from tnmoe.errors import PlanError
from tnmoe.ops import Op

OBJECTIVES = ("flops", "macs")


def check_objective(objective: str) -> None:
    """Raise `PlanError` unless `objective` is one of `OBJECTIVES`."""
    if objective not in OBJECTIVES:
        raise PlanError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")


def price(ops: tuple[Op, ...], sizes: Mapping[str, int], objective: str) -> int:
    """FLOPs (all classes) or MACs of the ops of one step, as `tnmoe.cost` counts them."""
    total = 0
    for op in ops:
        cost = op_cost(op, sizes)
        total += cost.flops if objective == "flops" else cost.macs
    return total
