"""Predicted time of training: a forward pass with autograd, and the backward pass after it.

Gradients that are ops of the closed set (`tnmoe.autodiff.reverse_mode`) take the time of these ops, which are the
kernels that autograd runs, too. Those of gates, norms and GELU have kernels of their own, whose rates a calibration
measures; those of routing take what the kernels take that they are made of. What autograd itself takes is counted: a
backward pass, the nodes of its graph, the gradients that it hands out, the functions in Python
(`tnmoe.timing.rates.GRAPH`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.reverse_mode import DIFFERENTIABLE, fresh, gradients
from tnmoe.costing.backward import backward_cost, gradient_names
from tnmoe.costing.op_cost import op_cost
from tnmoe.errors import CostError, no_rule
from tnmoe.ir.contractions import Add, ContractionOp, Multiply
from tnmoe.ir.dataflow import elements
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import BatchNorm, Gelu, GeluBackward, PointwiseOp, RowwiseOp
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Role, Value
from tnmoe.render.table import Cell, Table
from tnmoe.timing import routing_time
from tnmoe.timing.device import Device
from tnmoe.timing.op_time import graph_nodes
from tnmoe.timing.pointwise_time import python_statements
from tnmoe.timing.predict import op_seconds, predict, working_set


@dataclass(frozen=True, slots=True)
class TrainingPrediction:
    """Predicted seconds of one training pass, without an optimizer's step.

    Attributes:
        profile: name and source of the profile used.
        dtype: of weights, activations and gradients.
        forward: of the forward pass without autograd.
        graph: of autograd's graph, recorded and visited.
        gradients: of the gradients of each forward op (or of what a function's backward pass runs), by result.
    """

    profile: str
    dtype: str
    forward: float
    graph: float
    gradients: tuple[tuple[str, float], ...]

    @property
    def backward(self) -> float:
        """Of the gradients."""
        return math.fsum(seconds for _, seconds in self.gradients)

    @property
    def seconds(self) -> float:
        """Of it all."""
        return self.forward + self.graph + self.backward

    def table(self, title: str = "one training pass") -> Table:
        """Nanoseconds of the forward pass, of each step backward, and of autograd's graph, with their shares."""
        parts = [("forward", self.forward), *((f"backward of {name}", s) for name, s in self.gradients)]
        rows: list[tuple[Cell, ...]] = [
            (name, round(1e9 * s), f"{s / self.seconds:.1%}")
            for name, s in (*parts, ("graph", self.graph), ("total", self.seconds))
        ]
        columns = (("part", "part"), ("nanoseconds", "ns"), ("share", "share"))
        notes = (f"Profile: {self.profile}.", "A model of one forward and backward pass, without an optimizer's step.")
        return Table(f"Predicted time of {title}, {self.dtype}", columns, tuple(rows), notes)


def predict_training(
    program: Program,
    profile: Device,
    dtype: str = "float32",
    *,
    inputs: Iterable[str] = (),
    adjoint: Adjoint | None = None,
    flavour: str = "portable",
) -> TrainingPrediction | None:
    """Predicted time of a forward and backward pass; None if nothing needs a gradient.

    Args:
        program: bound.
        profile: of the device, measured or a data sheet.
        dtype: of all values.
        inputs: names of the inputs that need a gradient.
        adjoint: of what is emitted with a backward pass of its own; None if autograd makes it all.
        flavour: of that function's products.

    Raises:
        CostError: as `op_seconds`; or a profile of before training was measured.
    """
    leaves = frozenset(inputs)
    requires_grad = gradient_names(program, leaves)
    if program.output.name not in requires_grad:
        return None
    timer = _Gradients(program, profile, dtype, flavour == "fast")
    own = () if adjoint is None else tuple(op for op in adjoint.backward_program.ops)
    steps = [(op.out.name, timer.of(op, own=True)) for op in own]
    nodes, functions, uses = 0, int(adjoint is not None), Counter[Value]()
    for op in reversed(program.ops if adjoint is None else adjoint.before):
        wanted = [v for v in operands(op) if v.name in requires_grad]
        if wanted:
            nodes += graph_nodes(op, program.sizes)
            functions += isinstance(op, PointwiseOp) and python_statements(op) > 0
            uses.update(wanted)
            steps.append((op.out.name, timer.backward(op, requires_grad)))
    sums = [(f"sum {v.name}", (count - 1) * timer.of(Add(v, v, v))) for v, count in uses.items() if count > 1]
    forward = predict(program, profile, dtype, adjoint=adjoint, flavour=flavour)
    statistics = math.fsum(timer.statistics(op) for op in program.ops if isinstance(op, BatchNorm))
    handed = sum(p.role is Role.WEIGHT for p in program.parameters) + len(leaves & {v.name for v in program.inputs})
    graph = profile.graph_seconds(dtype, nodes=nodes, functions=functions, leaves=handed)
    return TrainingPrediction(forward.profile, dtype, forward.seconds + statistics, graph, (*steps, *sums))


@dataclass(frozen=True)
class _Gradients:
    """Seconds of ops of the backward pass; `fast` says that a function's products are those of that flavour."""

    program: Program
    device: Device
    dtype: str
    fast: bool

    def of(self, op: Op, *, own: bool = False) -> float:
        """Of one op; `own` says that it runs in the emitted function."""
        if isinstance(op, GeluBackward):
            kernel = self._kernel("Gelu", op.x, None, 3)
            return self.of(Gelu(op.out, op.x)) if kernel is None else kernel
        fast = own and self.fast
        return op_seconds(op, self.program.sizes, self.device, self.dtype, working_set=self._touched, fast=fast)

    @cached_property
    def _touched(self) -> int:
        """Bytes that a pass touches: each value and its gradient."""
        return 2 * working_set(self.program, self.dtype)

    def statistics(self, op: BatchNorm) -> float:
        """What a batch norm takes more in training, where it takes the statistics of its rows."""
        kernel = self._kernel("BatchNormTraining", op.x, op.index, 2)
        return 0.0 if kernel is None else max(0.0, kernel - self.of(op))

    def backward(self, op: Op, requires_grad: frozenset[str]) -> float:
        """Of the gradients of an op's operands, as autograd makes them."""
        if isinstance(op, DIFFERENTIABLE):
            seed = replace(op.out, name=fresh(self.program, f"{op.out.name}_grad"))
            made, _ = gradients(replace(self.program, output=op.out), (op,), seed, requires_grad)
            return math.fsum(map(self.of, made))
        if isinstance(op, PointwiseOp):
            return self._pointwise(op, requires_grad)
        if isinstance(op, RoutingOp):
            return self._routing(op, requires_grad)
        if isinstance(op, ContractionOp):  # whose gradients are no ops of the set
            return self._scaled(op, requires_grad)
        if isinstance(op, FusedOp):
            raise CostError(f"{op.out.name!r} is fused, which is in functions with a backward pass of their own alone")
        no_rule(op, "the time of its gradients")

    def _pointwise(self, op: PointwiseOp, requires_grad: frozenset[str]) -> float:
        """By the kernel of the gradient; where none is known, by its statements, or as its FLOPs are to the op's."""
        kernel = self._kernel(type(op).__name__, op.x, op.index if isinstance(op, RowwiseOp) else None, 3)
        if kernel is not None:
            return kernel
        if statements := python_statements(op):
            return statements * self.of(Multiply(op.out, op.out, op.out))
        return self._scaled(op, requires_grad)

    def _routing(self, op: RoutingOp, requires_grad: frozenset[str]) -> float:
        """By the ops that the gradients are made of, and as FLOPs are to FLOPs where they are of no others."""
        made = routing_time.gradients(op, requires_grad)
        seconds = self._scaled(op, requires_grad) if made.scaled else 0.0
        seconds += math.fsum(map(self.of, made.ops))
        filled = 0 if made.filled is None else int(elements(made.filled.indices, self.program.sizes))
        return seconds + (self.device.fill_seconds(self.dtype, filled) if filled else 0.0)

    def _kernel(self, kind: str, x: Value, index: str | None, passes: int) -> float | None:
        """Of a gradient with a kernel of its own, which reads and writes so many values of the shape of `x`."""
        sizes = self.program.sizes
        count = int(elements(x.indices, sizes))
        length = None if index is None else int(elements((index,), sizes))
        return self.device.gradient_seconds(kind, self.dtype, count=count, length=length, passes=passes)

    def _scaled(self, op: Op, requires_grad: frozenset[str]) -> float:
        """Seconds of the gradients' FLOPs at the rate at which the op runs; of one without any, its own."""
        flops = int(backward_cost(op, self.program.sizes, requires_grad).flops)
        own = int(op_cost(op, self.program.sizes).flops)
        seconds = self.of(op)
        return seconds * max(flops, 1) / own if own else seconds
