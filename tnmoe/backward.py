"""What reverse-mode differentiation of one op costs, and what it keeps: the backward half of the cost model.

Everything is counted for each operand that needs a gradient, never as a multiple of the forward pass: with frozen
weights, or an input that needs no gradient, half of the work may vanish, and with it what has to be saved.
Conventions are those of `tnmoe.cost`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from typing import cast

from tnmoe import routing_cost, routing_saved
from tnmoe.cost import GELU_BACKWARD, Cost, elements, is_view, joint_indices, op_cost
from tnmoe.dims import Dim
from tnmoe.errors import CostError, no_rule
from tnmoe.network import Role
from tnmoe.ops import (
    Add,
    BatchNorm,
    Contract,
    ContractAdd,
    Entmax15,
    FusedOp,
    Gelu,
    GeluBackward,
    LayerNorm,
    Merge,
    Multiply,
    Op,
    Permute,
    Reduce,
    RoutingOp,
    Sigmoid,
    Softmax,
    Sparsemax,
    Split,
    Value,
    matmul_groups,
    operands,
    propagate,
    results,
)
from tnmoe.program import Program


def gradient_names(program: Program, inputs: Iterable[str]) -> frozenset[str]:
    """Names of all values that need a gradient: trained parameters, those of `inputs`, and what depends on them."""
    leaves = {p.name for p in program.parameters if p.role is Role.WEIGHT}
    return propagate(program.ops, leaves.union(inputs), integers=False)


def backward_cost(op: Op, sizes: Mapping[str, Dim], needing: Set[str]) -> Cost:
    """Work of the gradients of the operands of `op` that are in `needing`.

    Raises:
        CostError: if the op has no formula.
    """
    wanted = [v for v in operands(op) if v.name in needing]
    if not wanted:
        return Cost()
    written = elements(op.out.indices, sizes)
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
            # The gradient of either factor is a matrix product of the same extent; that of a bias sums over rows.
            products = sum(v in (lhs, rhs) for v in wanted)
            macs = products * elements(joint_indices(lhs, rhs), sizes)
            sums = written * sum(len(v.indices) < len(op.out.indices) for v in wanted if v not in (lhs, rhs))
            if lhs in wanted:
                sums += broadcast_elements(op, sizes)
            return Cost(macs=macs, matmul_flops=2 * macs, elementwise_flops=sums)
        case Multiply():  # one product an element, then a sum over what was broadcast
            sums = sum(len(v.indices) < len(op.out.indices) for v in wanted)
            return Cost(macs=len(wanted) * written, elementwise_flops=(len(wanted) + sums) * written)
        case Add():
            return Cost(elementwise_flops=sum(len(v.indices) < len(op.out.indices) for v in wanted) * written)
        case Reduce() | Permute() | Split() | Merge():  # a broadcast, a copy, a view
            return Cost()
        case _ if isinstance(op, RoutingOp):
            macs, elementwise, special = routing_cost.backward(op, sizes, needing)
            return Cost(macs, 2 * macs, elementwise, special)
        case _:
            return Cost(special_flops=_special_per_element(op, needing) * written)


def broadcast_elements(op: Op, sizes: Mapping[str, Dim]) -> Dim:
    """Elements of the gradient of a matrix that is broadcast, before it is summed over the items; else 0."""
    if not isinstance(op, Contract) or op.out.indices[:1] != op.rhs.indices[:1]:  # planners ask often
        return 0
    outer = matmul_groups(op).outer
    return elements(outer + op.lhs.indices, sizes) if outer else 0


def _special_per_element(op: Op, needing: Set[str]) -> int:
    """FLOPs for each element of the result, counted off what torch's (or the emitted) backward does."""
    match op:
        case Softmax():  # product with y, sum, difference, product
            return 4
        case Sigmoid():  # 1 - y, two products
            return 3
        case Entmax15():  # the square's two products; mask, two sums, product, difference, half
            return 8
        case Sparsemax():  # mask, sum, product, difference
            return 4
        case Gelu():
            return GELU_BACKWARD
        case LayerNorm(_, x, _, weight, bias):
            normal = 10 if x.name in needing else 0  # x̂ in two, product, two sums with a product, four to combine
            affine = 2 * (weight is not None and weight.name in needing) + (bias is not None and bias.name in needing)
            return normal + affine
        case BatchNorm():
            return 10
    raise CostError(f"op {type(op).__name__} has no backward formula; add one to tnmoe/backward.py")


def training_cost(ops: Iterable[Op], sizes: Mapping[str, Dim], needing: Set[str]) -> Cost:
    """Work of forward and backward together; `needing` names the leaves that need a gradient."""
    total, live = Cost(), set(needing)
    for op in ops:
        total += op_cost(op, sizes) + backward_cost(op, sizes, live)
        if any(v.name in live for v in operands(op)):
            live |= {v.name for v in results(op) if not v.integer}
    return total


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
    raise CostError(f"op {type(op).__name__} has no rule for what it saves; add one to tnmoe/backward.py")


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
