"""An op that nobody has given rules raises everywhere: it is never free, never kept for nothing, never emitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.device_by_hand import by_hand

import tnmoe
from tnmoe.autodiff.reverse_mode import gradients
from tnmoe.backends.numpy.contractions import run_contraction
from tnmoe.backends.numpy.execute import execute
from tnmoe.backends.numpy.pointwise import run_pointwise
from tnmoe.backends.numpy.routing import run_routing
from tnmoe.backends.torch import contractions as torch_contractions
from tnmoe.backends.torch import pointwise as torch_pointwise
from tnmoe.backends.torch.routing import routing_expression
from tnmoe.backends.torch.statements import Writer
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
from tnmoe.lowering.assign_layouts import assign_layouts
from tnmoe.timing import contraction_time, op_time, pointwise_time, routing_time
from tnmoe.timing.predict import op_seconds, predict
from tnmoe.timing.predict_training import predict_training


@dataclass(frozen=True, slots=True)
class MadeUp:
    """It reads one value and writes another."""

    out: Value
    x: Value


OP: Any = MadeUp(Value("y", ("t", "i")), Value("x", ("t", "i")))
SIZES = {"t": 3, "i": 5}
NEEDING = frozenset({"x"})
PROGRAM = Program(inputs=(OP.x,), parameters=(), buffers=(), ops=(OP,), output=OP.out, sizes=SIZES)

RATES = by_hand().of("float32")
ARRAYS = {"x": np.ones((3, 5))}
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
    "layouts": lambda: assign_layouts(PROGRAM, SIZES),
    "seconds by a profile": lambda: op_seconds(OP, SIZES, by_hand(), "float32"),
    "seconds by a data sheet": lambda: op_seconds(OP, SIZES, tnmoe.datasheet("h100"), "float32"),
    "a forward pass": lambda: predict(PROGRAM, by_hand()),
    "training": lambda: predict_training(PROGRAM, by_hand(), inputs=["x"]),
    "calls of torch": lambda: op_time.torch_calls(OP, SIZES),
    "nodes of the graph": lambda: op_time.graph_nodes(OP, SIZES),
    "contraction: seconds": lambda: contraction_time.seconds(OP, SIZES, RATES, 4, 60),
    "pointwise: seconds": lambda: pointwise_time.seconds(OP, SIZES, RATES, 60),
    "pointwise: how its gradient is made": lambda: pointwise_time.python_statements(OP),
    "routing: seconds": lambda: routing_time.seconds(OP, SIZES, RATES, 4, 60),
    "routing: calls of torch": lambda: routing_time.calls(OP, SIZES),
    "NumPy": lambda: execute(PROGRAM, {"x": np.ones((3, 5))}),
    "NumPy: contraction": lambda: run_contraction(OP, ARRAYS, SIZES),
    "NumPy: pointwise": lambda: run_pointwise(OP, ARRAYS, training=False),
    "NumPy: routing": lambda: run_routing(OP, dict(ARRAYS), SIZES, False),
    "torch": lambda: Writer(PROGRAM).statement(OP),
    "torch: contraction": lambda: torch_contractions.expression(OP, Writer(PROGRAM)),
    "torch: pointwise": lambda: torch_pointwise.expression(OP, Writer(PROGRAM)),
    "torch: routing": lambda: routing_expression(OP, PROGRAM, {"x": "x", "y": "y"}),
    "a backward pass of its own": lambda: gradients(PROGRAM, (OP,), OP.out, frozenset({"x", "y"})),
}


@pytest.mark.parametrize("rule", RULES)
def test_it_raises(rule: str) -> None:
    with pytest.raises(tnmoe.TnmoeError, match="MadeUp"):
        RULES[rule]()
