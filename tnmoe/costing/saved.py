"""What autograd keeps for the backward pass, op by op: one place for every figure of saved values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from typing import cast

from tnmoe.costing import contraction_cost, pointwise_cost, routing_cost
from tnmoe.costing.cost import Inside, Sizes
from tnmoe.errors import CostError, no_rule
from tnmoe.ir.aliases import larger_storages, memory_owners
from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.dataflow import elements
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


def differentiated(program: Program, requires_grad: Set[str]) -> tuple[Op, ...]:
    """The ops that a gradient passes: what they read needs one, and the output depends on them through numbers.

    What autograd has kept for other ops, e.g. those that only choose positions, is gone when their function returns.
    """
    reached, passed = {program.output.name}, list[Op]()
    for op in reversed(program.ops):
        wanted = [v for v in operands(op) if v.name in requires_grad and not v.integer]
        if wanted and any(v.name in reached for v in results(op)):
            reached |= {v.name for v in wanted}
            passed.append(op)
    return tuple(reversed(passed))


def saved_values(op: Op, sizes: Sizes, requires_grad: Set[str]) -> tuple[Value, ...]:
    """Operands and results of `op` that its backward reads, and that are therefore kept until then.

    Raises:
        CostError: if nobody has said what the op keeps.
    """
    if not any(v.name in requires_grad for v in operands(op)):
        return ()
    if isinstance(op, ContractionOp):
        return contraction_cost.saved(op, requires_grad)
    if isinstance(op, PointwiseOp):
        return pointwise_cost.saved(op)
    if isinstance(op, RoutingOp):
        return routing_cost.saved(op, sizes, requires_grad)
    if isinstance(op, FusedOp):
        raise CostError(f"{op.out.name!r} is fused: what its function keeps, `Adjoint.saved` says")
    no_rule(op, "what its backward pass reads")


def saved_inside(op: Op, sizes: Sizes, requires_grad: Set[str]) -> Inside:
    """What the backward of `op` keeps and that is no value of the program."""
    if not any(v.name in requires_grad for v in operands(op)):
        return Inside()
    if isinstance(op, ContractionOp):
        return contraction_cost.inside(op)
    if isinstance(op, PointwiseOp):
        return pointwise_cost.inside(op, sizes)
    if isinstance(op, RoutingOp):
        return routing_cost.inside(op, sizes, requires_grad)
    if isinstance(op, FusedOp):  # kept by the functions of the kernels, as values of the program
        return Inside()
    no_rule(op, "what its backward pass keeps")


def saved_elements(program: Program, requires_grad: Set[str], among: Collection[Op] | None = None) -> Dim:
    """Elements kept for the backward pass, parameters, buffers and inputs aside (they exist anyway).

    Args:
        program: laid out.
        requires_grad: as `gradient_names` returns them.
        among: the ops that autograd differentiates; by default all.
    """
    live = [op for op in differentiated(program, requires_grad) if among is None or op in among]
    inside = [saved_inside(op, program.sizes, requires_grad).elements for op in live]
    kept = [elements(v.indices, program.sizes) for v in kept_values(program, live, requires_grad) if not v.integer]
    return sum(kept + inside, start=cast(Dim, 0))


def saved_integers(program: Program, requires_grad: Set[str]) -> Dim:
    """Positions and counts (64 bits each) kept for the backward pass; arguments as in `saved_elements`."""
    live = differentiated(program, requires_grad)
    kept = [elements(v.indices, program.sizes) for v in kept_values(program, live, requires_grad) if v.integer]
    return sum(kept + [saved_inside(op, program.sizes, requires_grad).integers for op in live], start=cast(Dim, 0))


def saved_flags(program: Program, requires_grad: Set[str]) -> Dim:
    """Truth values (a byte each) kept for the backward pass; arguments as in `saved_elements`."""
    live = differentiated(program, requires_grad)
    return sum([saved_inside(op, program.sizes, requires_grad).flags for op in live], start=cast(Dim, 0))


def kept_values(program: Program, ops: Iterable[Op], requires_grad: Set[str]) -> tuple[Value, ...]:
    """What the backward of some ops keeps alive: values that are no leaves; a view as what it is a view of.

    Args:
        program: laid out.
        ops: those that autograd differentiates.
        requires_grad: as `gradient_names` returns them.
    """
    leaves = {v.name for v in program.leaves}
    owner = memory_owners(program)
    memories = {v.name: v for op in program.ops for v in results(op)} | larger_storages(program)
    names = (owner[v.name] for op in ops for v in saved_values(op, program.sizes, requires_grad))
    return tuple(memories[name] for name in dict.fromkeys(names) if name not in leaves)
