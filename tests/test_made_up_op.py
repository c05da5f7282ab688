"""An op that nobody has given rules raises everywhere: it is never free, never kept for nothing, never emitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import tnmoe
from tnmoe.costing.backward import backward_cost
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.routing_cost import backward
from tnmoe.costing.routing_saved import inside, saved
from tnmoe.costing.saved import saved_inside, saved_values
from tnmoe.footprint.allocations import backward_scripts, forward_script
from tnmoe.footprint.routing_allocations import backward as routed_backward
from tnmoe.footprint.routing_allocations import forward as routed_forward
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value
from tnmoe.ir.verify import verify


@dataclass(frozen=True, slots=True)
class MadeUp:
    """It reads one value and writes another."""

    out: Value
    x: Value


OP: Any = MadeUp(Value("y", ("t", "i")), Value("x", ("t", "i")))
SIZES = {"t": 3, "i": 5}
NEEDING = frozenset({"x"})
PROGRAM = Program(inputs=(OP.x,), parameters=(), buffers=(), ops=(OP,), output=OP.out, sizes=SIZES)

RULES: dict[str, Callable[[], object]] = {
    "work": lambda: op_cost(OP, SIZES),
    "work of gradients": lambda: backward_cost(OP, SIZES, NEEDING),
    "kept values": lambda: saved_values(OP, SIZES, NEEDING),
    "kept inside": lambda: saved_inside(OP, SIZES, NEEDING),
    "allocations": lambda: forward_script(OP, SIZES, 4, evaluation=False),
    "allocations of gradients": lambda: backward_scripts(OP, SIZES, 4, NEEDING),
    "indices": lambda: verify(PROGRAM),
    "routed work of gradients": lambda: backward(OP, SIZES, NEEDING),
    "routed kept values": lambda: saved(OP, SIZES, NEEDING),
    "routed kept inside": lambda: inside(OP, SIZES, NEEDING),
    "routed allocations": lambda: routed_forward(OP, SIZES, 4, NEEDING, evaluation=False),
    "routed allocations of gradients": lambda: routed_backward(OP, SIZES, 4, NEEDING, frozenset()),
}


@pytest.mark.parametrize("rule", RULES)
def test_it_raises(rule: str) -> None:
    with pytest.raises(tnmoe.TnmoeError, match="MadeUp"):
        RULES[rule]()
