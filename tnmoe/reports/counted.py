"""What figures are read off: a program, with numbers or formulas for sizes, counted in every way that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.backward_plan import Function
from tnmoe.costing.backward import gradient_names, gradient_sizes, training_cost
from tnmoe.costing.cost import Cost
from tnmoe.costing.op_cost import Estimate, estimate
from tnmoe.costing.padding import trimmed
from tnmoe.costing.saved import differentiated, saved_elements
from tnmoe.costing.traffic import (
    Traffic,
    forward_traffic,
    gradient_traffic,
    total,
)
from tnmoe.ir.dataflow import elements
from tnmoe.ir.layer import Layer
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.program import Program
from tnmoe.ir.value import INTEGER_BYTES, Role
from tnmoe.symbolic.dims import Dim


@dataclass(frozen=True)
class Counted:
    """What a figure is read off: a program, bound or with symbols, and what else it depends on.

    `frozen` are the parameters that got their role since the function was planned.
    """

    layer: Layer
    program: Program
    width: int
    input_gradients: tuple[str, ...]
    function: Function | None = None
    without_padding: bool = False
    frozen: frozenset[str] = frozenset()

    @cached_property
    def executed(self) -> Program:
        """The program as its forward pass runs: what the emitted function fuses is one op there."""
        return self.program if self.adjoint is None else self.adjoint.executed

    @cached_property
    def estimate(self) -> Estimate:
        """The cost of each op of the forward pass."""
        return trimmed(self.executed) if self.without_padding else estimate(self.executed)

    @cached_property
    def work(self) -> Cost:
        """Of one forward pass."""
        return self.estimate.total

    @cached_property
    def requires_grad(self) -> frozenset[str]:
        """Names of the values that need a gradient."""
        return gradient_names(self.program, self.input_gradients)

    @cached_property
    def training(self) -> Cost:
        """Of forward and backward."""
        if self.adjoint is not None:
            return self.adjoint.training_cost()
        return training_cost(self.program.ops, self.program.sizes, self.requires_grad)

    @property
    def backward_traffic(self) -> Traffic:
        """Elements that one backward pass reads and writes: each op of the function, each gradient of autograd."""
        sizes, own = self.program.sizes, tuple[Op, ...]()
        by_autograd = differentiated(self.program, self.requires_grad)
        if self.adjoint is not None:
            own = self.adjoint.run if self.adjoint.differentiated else ()
            by_autograd = tuple(op for op in by_autograd if op in self.adjoint.before)
        moved = [forward_traffic(op, sizes) for op in own]
        for op in by_autograd:
            wanted = (v for v in operands(op) if v.name in self.requires_grad and not v.integer)
            moved += [gradient_traffic(op, v, sizes) for v in wanted]
        return sum(moved, start=Traffic())

    @cached_property
    def adjoint(self) -> Adjoint | None:
        """The backward pass of the emitted function; None if autograd does it.

        It is the planned one, written for every gradient that was wanted then: what is frozen later is skipped there
        where an op serves it alone, and all that was planned to be kept still is.
        """
        if self.function is None:
            return None
        parameters = (replace(p, role=Role.WEIGHT) if p.name in self.frozen else p for p in self.program.parameters)
        planned = replace(self.program, parameters=tuple(parameters))
        adjoint = self.function.adjoint(planned, gradient_names(planned, self.input_gradients))
        return replace(adjoint, program=self.program, requires_grad=self.requires_grad)

    @property
    def saved(self) -> Dim:
        """Elements kept for the backward pass."""
        if self.adjoint is not None:
            return self.adjoint.saved_elements()
        return saved_elements(self.program, self.requires_grad)

    @property
    def trained(self) -> Dim:
        """Weights that are trained."""
        sizes = self.program.sizes
        return total(elements(p.indices, sizes) for p in self.program.parameters if p.role is Role.WEIGHT)

    @property
    def gradients(self) -> Dim:
        """Bytes of the gradients of the weights that are trained."""
        weights = {p.name for p in self.program.parameters if p.role is Role.WEIGHT}
        numbers, positions = gradient_sizes(self.program, weights)
        return self.width * numbers + INTEGER_BYTES * positions

    @property
    def read(self) -> Dim:
        """Elements that the ops of one forward pass read."""
        return total(forward_traffic(op, self.program.sizes).read for op in self.executed.ops)
