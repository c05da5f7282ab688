"""An op that nobody has timed raises wherever a time is asked for: it is not free, nor without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from support.device_by_hand import by_hand

import tnmoe
from tnmoe.ir.contractions import Multiply
from tnmoe.ir.initialise import Ones
from tnmoe.ir.program import Program
from tnmoe.ir.value import Parameter, Value
from tnmoe.timing import contraction_time, op_time, pointwise_time, routing_time
from tnmoe.timing.device import Device
from tnmoe.timing.predict import predict
from tnmoe.timing.predict_training import predict_training


@dataclass(frozen=True, slots=True)
class MadeUp:
    """It reads one value and writes another; of no family, though each family's rules are asked for it."""

    out: Value
    x: Value


SIZES = {"t": 3, "i": 5}
X, Y, SCALED, Z = (Value(name, ("t", "i")) for name in ("x", "y", "scaled", "z"))
WEIGHT = Parameter("weight", ("i",), Ones())
MADE_UP: Any = MadeUp(Y, X)
RATES = by_hand().of("float32")

RULES: dict[str, Callable[[], object]] = {
    "contraction: seconds": lambda: contraction_time.seconds(MADE_UP, SIZES, RATES, 4, 60),
    "contraction: nodes of the graph": lambda: contraction_time.graph_nodes(MADE_UP),
    "pointwise: seconds": lambda: pointwise_time.seconds(MADE_UP, SIZES, RATES, 60),
    "pointwise: how its gradient is made": lambda: pointwise_time.python_statements(MADE_UP),
    "pointwise: nodes of the graph": lambda: pointwise_time.graph_nodes(MADE_UP),
    "routing: seconds": lambda: routing_time.seconds(MADE_UP, SIZES, RATES, 4, 60),
    "routing: calls of torch": lambda: routing_time.calls(MADE_UP, SIZES),
    "routing: nodes of the graph": lambda: routing_time.graph_nodes(MADE_UP, SIZES),
    "routing: what its gradients are made of": lambda: routing_time.gradients(MADE_UP, frozenset({"x"})),
    "any: seconds": lambda: op_time.measured_seconds(MADE_UP, SIZES, RATES, 4, 60, None),
    "any: calls of torch": lambda: op_time.torch_calls(MADE_UP, SIZES),
    "any: nodes of the graph": lambda: op_time.graph_nodes(MADE_UP, SIZES),
}
DEVICES: dict[str, Device] = {"measured": by_hand(), "data sheet": tnmoe.datasheet("h100")}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_raises(rule: str) -> None:
    with pytest.raises(tnmoe.CostError, match="MadeUp"):
        RULES[rule]()


def program(*ops: Any) -> Program:
    """Ops one after the other, of which the last writes the output."""
    return Program(inputs=(X,), parameters=(WEIGHT,), buffers=(), ops=ops, output=ops[-1].out, sizes=SIZES)


PROGRAMS = {
    "alone": program(MADE_UP),
    "before a weight": program(MADE_UP, Multiply(Z, Y, Value("weight", ("i",)))),
    "behind a weight": program(Multiply(SCALED, X, Value("weight", ("i",))), MadeUp(Z, SCALED)),
}


@pytest.mark.parametrize("place", PROGRAMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_pass_that_runs_it_raises(device: str, place: str) -> None:
    with pytest.raises(tnmoe.CostError, match="MadeUp"):
        predict(PROGRAMS[place], DEVICES[device])
    with pytest.raises(tnmoe.CostError, match="MadeUp"):
        predict_training(PROGRAMS[place], DEVICES[device], inputs=["x"])


@pytest.mark.parametrize("device", DEVICES)
def test_what_raises_is_the_op_alone(device: str) -> None:
    """The same program without it has a time, forward and in training: the error is of nothing else."""
    known = program(Multiply(Z, X, Value("weight", ("i",))))
    training = predict_training(known, DEVICES[device], inputs=["x"])
    assert training is not None
    assert training.seconds > predict(known, DEVICES[device]).seconds > 0
