"""An op that nobody has given rules raises everywhere: it is never free, never kept for nothing, never emitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import tnmoe
from tnmoe.costing import contraction_cost, pointwise_cost, routing_cost
from tnmoe.costing.backward import backward_cost
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.saved import saved_inside, saved_values
from tnmoe.footprint import contraction_allocations, pointwise_allocations, routing_allocations
from tnmoe.footprint.allocations import backward_traces, forward_trace
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.ir import contractions, fused_ops, routing_ops
from tnmoe.ir.bound import as_bound
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

TENSORS = TensorBytes(as_bound(PROGRAM), 4, NEEDING)

RULES: dict[str, Callable[[], object]] = {
    "work": lambda: op_cost(OP, SIZES),
    "work of gradients": lambda: backward_cost(OP, SIZES, NEEDING),
    "kept values": lambda: saved_values(OP, SIZES, NEEDING),
    "kept inside": lambda: saved_inside(OP, SIZES, NEEDING),
    "allocations": lambda: forward_trace(OP, TENSORS, evaluation=False),
    "allocations of gradients": lambda: backward_traces(OP, TENSORS),
    "indices": lambda: verify(PROGRAM),
    # One that is of a family, but that the family's file does not know:
    "contraction: indices": lambda: contractions.fault(OP, laid_out=True),
    "contraction: work": lambda: contraction_cost.forward(OP, SIZES),
    "contraction: work of gradients": lambda: contraction_cost.backward(OP, SIZES, NEEDING),
    "contraction: kept values": lambda: contraction_cost.saved(OP, NEEDING),
    "contraction: kept inside": lambda: contraction_cost.inside(OP),
    "contraction: allocations": lambda: contraction_allocations.forward(OP, TENSORS),
    "contraction: allocations of gradients": lambda: contraction_allocations.backward(OP, TENSORS),
    "contraction: gradients handed on": lambda: contraction_allocations.passes_on(OP, OP.x, TENSORS),
    "pointwise: work": lambda: pointwise_cost.forward(OP, SIZES),
    "pointwise: work of gradients": lambda: pointwise_cost.backward(OP, SIZES, NEEDING),
    "pointwise: kept values": lambda: pointwise_cost.saved(OP),
    "pointwise: kept inside": lambda: pointwise_cost.inside(OP, SIZES),
    "pointwise: allocations": lambda: pointwise_allocations.forward(OP, TENSORS, evaluation=False),
    "pointwise: allocations of gradients": lambda: pointwise_allocations.backward(OP, TENSORS),
    "routing: indices": lambda: routing_ops.fault(OP),
    "routing: work": lambda: routing_cost.forward(OP, SIZES),
    "routing: work of gradients": lambda: routing_cost.backward(OP, SIZES, NEEDING),
    "routing: kept values": lambda: routing_cost.saved(OP, SIZES, NEEDING),
    "routing: kept inside": lambda: routing_cost.inside(OP, SIZES, NEEDING),
    "routing: allocations": lambda: routing_allocations.forward(OP, TENSORS, evaluation=False),
    "routing: allocations of gradients": lambda: routing_allocations.backward(OP, TENSORS),
    "fused: what it stands for": lambda: fused_ops.unfused(OP),
}


@pytest.mark.parametrize("rule", RULES)
def test_it_raises(rule: str) -> None:
    with pytest.raises(tnmoe.TnmoeError, match="MadeUp"):
        RULES[rule]()
