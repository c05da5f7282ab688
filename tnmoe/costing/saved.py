"""What autograd keeps for the backward pass, op by op: one place for every figure of saved values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from typing import cast

from tnmoe.costing import routing_saved
from tnmoe.errors import CostError, no_rule
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Merge, Multiply, Permute, Reduce, Split
from tnmoe.ir.dataflow import elements, is_view
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


def differentiated(program: Program, needing: Set[str]) -> tuple[Op, ...]:
    """The ops that a gradient passes: what they read needs one, and the output depends on them through numbers.

    What autograd has kept for other ops, e.g. those that only choose positions, is gone when their function returns.
    """
    reached, found = {program.output.name}, list[Op]()
    for op in reversed(program.ops):
        wanted = [v for v in operands(op) if v.name in needing and not v.integer]
        if wanted and any(v.name in reached for v in results(op)):
            reached |= {v.name for v in wanted}
            found.append(op)
    return tuple(reversed(found))


def saved_values(op: Op, sizes: Mapping[str, Dim], needing: Set[str]) -> tuple[Value, ...]:
    """Operands and results of `op` that its backward reads, and that are therefore kept until then."""
    if not any(v.name in needing for v in operands(op)):
        return ()
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs) | Multiply(_, lhs, rhs):
            return tuple(v for v, other in ((lhs, rhs), (rhs, lhs)) if other.name in needing)
        case Add() | Reduce() | Permute() | Split() | Merge():
            return ()
        case Softmax(out) | Sigmoid(out) | Sparsemax(out):
            return (out,)
        case Gelu(_, x) | LayerNorm(_, x) | BatchNorm(_, x):
            return (x,)
        case _ if isinstance(op, RoutingOp):
            return routing_saved.saved(op, sizes, needing)
        case Entmax15():
            return ()  # its root, which is no value of the program: see `saved_inside`
    raise CostError(f"op {type(op).__name__} has no rule for what it saves; add one to tnmoe/costing/backward.py")


def saved_inside(op: Op, sizes: Mapping[str, Dim], needing: Set[str]) -> Dim:
    """Elements that the backward of `op` keeps and that are no value of the program."""
    if not any(v.name in needing for v in operands(op)):
        return 0
    if isinstance(op, RoutingOp):
        return routing_saved.inside(op, sizes, needing).elements
    if isinstance(op, FusedOp):  # kept by the functions of the kernels, as values of the program
        return 0
    match op:
        case Entmax15(_, x):  # the root of the result
            return elements(x.indices, sizes)
        case LayerNorm(_, x, index):  # mean and 1/σ of each row
            return 2 * elements(tuple(i for i in x.indices if i != index), sizes)
        case BatchNorm(_, x, index):  # mean and 1/σ of each column, in training; one row has no statistics of its own
            alone = elements(tuple(i for i in x.indices if i != index), sizes) == 1
            return 0 if alone else 2 * sizes[index]
        case Contract() | ContractAdd() | Multiply() | Add() | Reduce() | Permute() | Split() | Merge():
            return 0
        case Softmax() | Sparsemax() | Sigmoid() | Gelu() | GeluBackward():  # a value of the program is enough
            return 0
        case _:
            no_rule(op, "what its backward pass keeps")


def saved_elements(program: Program, needing: Set[str], among: Collection[Op] | None = None) -> Dim:
    """Elements kept for the backward pass, parameters, buffers and inputs aside (they exist anyway).

    Args:
        program: laid out.
        needing: as `gradient_names` returns them.
        among: the ops that autograd differentiates; by default all.
    """
    live = [op for op in differentiated(program, needing) if among is None or op in among]
    inside = [saved_inside(op, program.sizes, needing) for op in live]
    kept = [elements(v.indices, program.sizes) for v in _kept(program, live, needing) if not v.integer]
    return sum(kept + inside, start=cast(Dim, 0))


def saved_integers(program: Program, needing: Set[str]) -> Dim:
    """Positions and counts (64 bits each) kept for the backward pass; arguments as in `saved_elements`."""
    live = differentiated(program, needing)
    kept = [elements(v.indices, program.sizes) for v in _kept(program, live, needing) if v.integer]
    return sum(kept + [i.integers for i in _inside_routing(program, live, needing)], start=cast(Dim, 0))


def saved_flags(program: Program, needing: Set[str]) -> Dim:
    """Truth values (a byte each) kept for the backward pass; arguments as in `saved_elements`."""
    live = differentiated(program, needing)
    return sum([i.flags for i in _inside_routing(program, live, needing)], start=cast(Dim, 0))


def _inside_routing(program: Program, live: Iterable[Op], needing: Set[str]) -> list[routing_saved.Inside]:
    return [routing_saved.inside(op, program.sizes, needing) for op in live if isinstance(op, RoutingOp)]


def _kept(program: Program, live: Iterable[Op], needing: Set[str]) -> tuple[Value, ...]:
    """Values that the backward of some ops reads and that are no leaves; a view is kept as what it is a view of."""
    source: dict[str, Value] = {}
    for op in program.ops:
        if is_view(op):
            (x,) = operands(op)
            source[op.out.name] = source.get(x.name, x)
    values = (source.get(v.name, v) for op in live for v in saved_values(op, program.sizes, needing))
    held = storages(program)
    leaves = {v.name for v in program.leaves}
    return tuple({v.name: held.get(v.name, v) for v in values if v.name not in leaves}.values())


def storages(program: Program) -> dict[str, Value]:
    """Results that are views of something larger, which is no value of the program: its shape, by their names."""
    found: dict[str, Value] = {}
    for op in program.ops:
        if isinstance(op, RoutingOp):
            found |= routing_saved.storages(op, program.sizes)
    return found
