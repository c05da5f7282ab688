"""Predicted time of training: a forward pass with autograd, and the backward pass after it.

Gradients that are ops of the closed set (`tnmoe.reverse_mode`) take the time of these ops, which are the kernels that
autograd runs, too. Those of entmax and sparsemax are passes over all entries, one a statement of
`backends/activations.py`; those of other gates, norms and routing run at the rate of their forward pass, by FLOPs. A
node of autograd's graph costs the least overhead of an op twice: once recorded, once visited; a function in Python
costs a module's call twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tnmoe.adjoint import Adjoint
from tnmoe.backward import backward_cost, gradient_names
from tnmoe.cost import op_cost
from tnmoe.datasheet import Datasheet
from tnmoe.hardware import Device, op_seconds, predict, working_set
from tnmoe.ops import Add, Entmax15, Gelu, GeluBackward, Multiply, Op, Sparsemax, Value, operands
from tnmoe.program import Program
from tnmoe.report import Cell, Table
from tnmoe.reverse_mode import DIFFERENTIABLE, fresh, gradients

PASSES = {Entmax15: 11, Sparsemax: 7}
"""Statements over all entries in the backward pass of a function in Python, autograd's own for the square included."""


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
) -> TrainingPrediction | None:
    """Predicted time of a forward and backward pass; None if nothing needs a gradient.

    Args:
        program: bound.
        profile: of the device, measured or a data sheet.
        dtype: of all values.
        inputs: names of the inputs that need a gradient.
        adjoint: of what is emitted with a backward pass of its own; None if autograd makes it all.

    Raises:
        CostError: as `op_seconds`.
    """
    needing = gradient_names(program, inputs)
    if program.output.name not in needing:
        return None
    clock = _Seconds(program, profile, dtype)
    own = () if adjoint is None else tuple(op for op in adjoint.as_program().ops)
    found = [(op.out.name, clock.of(op)) for op in own]
    nodes, functions, uses = 0, int(adjoint is not None), Counter[Value]()
    for op in reversed(program.ops if adjoint is None else adjoint.before):
        wanted = [v for v in operands(op) if v.name in needing]
        if wanted:
            nodes += 1
            functions += type(op) in PASSES
            uses.update(wanted)
            found.append((op.out.name, clock.backward(op, needing)))
    sums = [(f"sum {v.name}", (count - 1) * clock.of(Add(v, v, v))) for v, count in uses.items() if count > 1]
    forward = predict(program, profile, dtype)
    return TrainingPrediction(
        forward.profile, dtype, forward.seconds, 2 * (nodes * clock.least + functions * clock.call), (*found, *sums)
    )


@dataclass(frozen=True)
class _Seconds:
    """Seconds of ops of the backward pass."""

    program: Program
    profile: Device
    dtype: str

    @property
    def least(self) -> float:
        """The least overhead of an op."""
        if isinstance(self.profile, Datasheet):
            return self.profile.overhead
        return self.profile.of(self.dtype).overhead["Add"]

    @property
    def call(self) -> float:
        """The overhead of a function in Python."""
        return 0.0 if isinstance(self.profile, Datasheet) else self.profile.of(self.dtype).overhead["call"]

    def of(self, op: Op) -> float:
        """Of one op; GELU's gradient at GELU's rate."""
        if isinstance(op, GeluBackward) and not isinstance(self.profile, Datasheet):
            return self._scaled(Gelu(op.out, op.x), int(op_cost(op, self.program.sizes).flops))
        touched = working_set(self.program, self.dtype)
        return op_seconds(op, self.program.sizes, self.profile, self.dtype, working_set=touched)

    def backward(self, op: Op, needing: frozenset[str]) -> float:
        """Of the gradients of an op's operands, as autograd makes them."""
        if isinstance(op, DIFFERENTIABLE):
            seed = replace(op.out, name=fresh(self.program, f"{op.out.name}_grad"))
            made, _ = gradients(replace(self.program, output=op.out), (op,), seed, needing)
            return math.fsum(map(self.of, made))
        if type(op) in PASSES:
            return PASSES[type(op)] * self.of(Multiply(op.out, op.out, op.out))
        return self._scaled(op, int(backward_cost(op, self.program.sizes, needing).flops))

    def _scaled(self, op: Op, flops: int) -> float:
        """Seconds of so many FLOPs at the rate at which an op runs; of one without any, its own."""
        own = int(op_cost(op, self.program.sizes).flops)
        seconds = self.of(op)
        return seconds * max(flops, 1) / own if own else seconds
