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

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.reverse_mode import DIFFERENTIABLE, fresh, gradients
from tnmoe.costing.backward import backward_cost, gradient_names
from tnmoe.costing.op_cost import op_cost
from tnmoe.errors import CostError
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Multiply, Permute, matmul_groups
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Gather, GroupedContract, RoutingOp, ScatterAdd, Unsort
from tnmoe.ir.value import DTYPE_BYTES, Role, Value
from tnmoe.render.table import Cell, Table
from tnmoe.timing.datasheet import Datasheet
from tnmoe.timing.predict import Device, op_seconds, predict, view_count, working_set
from tnmoe.timing.rates import Training
from tnmoe.timing.routing_time import calls, grouped_products

IN_PYTHON = {Entmax15: 11, Sparsemax: 7}
"""Gates whose gradients a function in Python makes, with its statements over all entries, autograd's own for the square
included."""


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
    needing = gradient_names(program, leaves)
    if program.output.name not in needing:
        return None
    clock = _Seconds(program, profile, dtype, flavour == "fast")
    own = () if adjoint is None else tuple(op for op in adjoint.backward_program.ops)
    found = [(op.out.name, clock.of(op, own=True)) for op in own]
    nodes, functions, uses = 0, int(adjoint is not None), Counter[Value]()
    for op in reversed(program.ops if adjoint is None else adjoint.before):
        wanted = [v for v in operands(op) if v.name in needing]
        if wanted:
            nodes += _nodes(op, program)
            functions += type(op) in IN_PYTHON
            uses.update(wanted)
            found.append((op.out.name, clock.backward(op, needing)))
    sums = [(f"sum {v.name}", (count - 1) * clock.of(Add(v, v, v))) for v, count in uses.items() if count > 1]
    forward = predict(program, profile, dtype, adjoint=adjoint, flavour=flavour)
    statistics = math.fsum(clock.statistics(op) for op in program.ops)
    handed = sum(p.role is Role.WEIGHT for p in program.parameters) + len(leaves & {v.name for v in program.inputs})
    graph = clock.graph(nodes, functions, handed)
    return TrainingPrediction(forward.profile, dtype, forward.seconds + statistics, graph, (*found, *sums))


def _nodes(op: Op, program: Program) -> int:
    """Nodes of autograd's graph that an op records, one for each differentiated call of torch, views included."""
    if isinstance(op, Contract | ContractAdd):
        groups = matmul_groups(op)
        bias = isinstance(op, ContractAdd) and len(op.bias.indices) != 1
        return (BATCHED_NODES if groups.batch else 1) + bias + view_count(op)
    if isinstance(op, GroupedContract):  # each product; what takes the slices apart, and what joins the results
        return round(grouped_products(op, program.sizes)) + 3 + (op.bias is not None)
    if isinstance(op, RoutingOp):
        return min(calls(op, program.sizes), ROUTING_NODES)
    return 2 if isinstance(op, Entmax15) else 1


BATCHED_NODES = 6
"""Of a batched product: torch expands and views both operands, multiplies them, and views the result."""

ROUTING_NODES = 4
"""Nodes of an op that routes at most: of its many calls of torch, those on positions record none."""


@dataclass(frozen=True)
class _Seconds:
    """Seconds of ops of the backward pass; `fast` says that a function's products are those of that flavour."""

    program: Program
    profile: Device
    dtype: str
    fast: bool

    @property
    def training(self) -> Training:
        """What the profile knows of training.

        Raises:
            CostError: if it is of before that was measured.
        """
        assert not isinstance(self.profile, Datasheet)
        if (found := self.profile.of(self.dtype).training) is None:
            raise CostError(
                f"the profile of {self.profile.name!r} is of before training was measured: run `tnmoe calibrate` again"
            )
        return found

    def graph(self, nodes: int, functions: int, leaves: int) -> float:
        """Of autograd itself. By a data sheet a node costs the least overhead of an op twice: recorded, and visited."""
        if isinstance(self.profile, Datasheet):
            return 2 * nodes * self.profile.overhead
        each = self.training.graph
        return each["pass"] + nodes * each["node"] + functions * each["function"] + leaves * each["leaf"]

    def of(self, op: Op, *, own: bool = False) -> float:
        """Of one op; `own` says that it runs in the emitted function."""
        touched = 2 * working_set(self.program, self.dtype)  # each value and its gradient
        if isinstance(op, GeluBackward):
            if not isinstance(self.profile, Datasheet):
                return self._kernel("Gelu", op.x, None, 3)
            op, own = Gelu(op.out, op.x), False
        fast = own and self.fast
        return op_seconds(op, self.program.sizes, self.profile, self.dtype, working_set=touched, fast=fast)

    def statistics(self, op: Op) -> float:
        """What a batch norm takes more in training, where it takes the statistics of its rows."""
        if not isinstance(op, BatchNorm) or isinstance(self.profile, Datasheet):
            return 0.0
        return max(0.0, self._kernel("BatchNormTraining", op.x, op.index, 2) - self.of(op))

    def backward(self, op: Op, needing: frozenset[str]) -> float:
        """Of the gradients of an op's operands, as autograd makes them."""
        measured = not isinstance(self.profile, Datasheet)
        match op:
            case _ if isinstance(op, DIFFERENTIABLE):
                seed = replace(op.out, name=fresh(self.program, f"{op.out.name}_grad"))
                made, _ = gradients(replace(self.program, output=op.out), (op,), seed, needing)
                return math.fsum(map(self.of, made))
            case Sigmoid(_, x) if measured:
                return self._kernel("Sigmoid", x, None, 3)
            case (
                Softmax(_, x, index)
                | Entmax15(_, x, index)
                | Sparsemax(_, x, index)
                | LayerNorm(_, x, index)
                | BatchNorm(_, x, index)
            ) if measured:
                return self._kernel(type(op).__name__, x, index, 3)
            case Entmax15() | Sparsemax():
                return IN_PYTHON[type(op)] * self.of(Multiply(op.out, op.out, op.out))
            case GroupedContract():
                return self._grouped(op, needing)
            case Gather(out, x, positions, index, sparse):
                return self.of(ScatterAdd(x, out, positions, index)) + (0.0 if sparse else self._zeros(x))
            case Unsort(out, x, slots):
                return self.of(ScatterAdd(x, out, slots, x.indices[0]))
            case ScatterAdd(out, x, positions, index):
                return self.of(Gather(x, out, positions, index))
        return self._scaled(op, int(backward_cost(op, self.program.sizes, needing).flops))

    def _kernel(self, kind: str, x: Value, index: str | None, passes: int) -> float:
        """Of a gradient with a kernel of its own, which reads and writes so many values of the shape of `x`."""
        assert not isinstance(self.profile, Datasheet)
        training, rates = self.training, self.profile.of(self.dtype)
        count = int(elements(x.indices, self.program.sizes))
        moved = passes * DTYPE_BYTES[self.dtype] * count
        if index is None:
            seconds = moved / training.streams[kind].at(moved)
        else:
            length = int(elements((index,), self.program.sizes))
            seconds = count / training.rowwise[kind].at(count // length, length)
        return max(seconds, moved / rates.bandwidth) + training.overhead[kind]

    def _zeros(self, value: Value) -> float:
        """A tensor of zeros in the shape of a value."""
        size = DTYPE_BYTES[self.dtype] * int(elements(value.indices, self.program.sizes))
        if isinstance(self.profile, Datasheet):
            return size / self.profile.bandwidth
        return size / self.profile.of(self.dtype).fresh.at(size)

    def _grouped(self, op: GroupedContract, needing: frozenset[str]) -> float:
        """Each product has two of its extent as gradients; the slices' gradients are joined into those of the whole."""
        copied = [v for v in (op.lhs, op.rhs) if v.name in needing]
        joined = math.fsum(self.of(Permute(v, v)) for v in copied)
        return self._scaled(op, int(backward_cost(op, self.program.sizes, needing).flops)) + joined

    def _scaled(self, op: Op, flops: int) -> float:
        """Seconds of so many FLOPs at the rate at which an op runs; of one without any, its own."""
        own = int(op_cost(op, self.program.sizes).flops)
        seconds = self.of(op)
        return seconds * max(flops, 1) / own if own else seconds
