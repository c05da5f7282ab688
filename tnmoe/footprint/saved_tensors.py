"""What is kept for the backward pass, tensor by tensor, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.costing.saved import differentiated, saved_values, storages
from tnmoe.footprint.allocations import saved_inside_bytes
from tnmoe.footprint.timeline import size
from tnmoe.ir.contractions import Contract, ContractAdd, Multiply
from tnmoe.ir.dataflow import memory_owners
from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, LayerNorm
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import CapacitySlots, GroupedContract, Noise, Normalise, ProductTopK, ScatterAdd, TopK
from tnmoe.ir.value import Value

_INSIDE: Mapping[type, str] = {
    Entmax15: "root of the result",
    LayerNorm: "mean and 1/σ of rows",
    BatchNorm: "mean and 1/σ of columns",
    TopK: "order of the sort",
    ProductTopK: "positions of the best of either side, and of their pairs",
    Noise: "what was drawn",
    Normalise: "what is divided by, and whether it was 0; of null experts also what counts, and the products with that",
    CapacitySlots: "the choice in each slot, and whether there is one",
}
"""What an op keeps that is no value of the program."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Something kept for the backward pass.

    Attributes:
        name: of the value, or of what an op keeps besides.
        indices: of the value; empty for what is no value.
        bytes: its size.
        reasons: the steps that read it backwards, and the gradients it is for.
    """

    name: str
    indices: tuple[str, ...]
    bytes: int
    reasons: tuple[str, ...]


def saved_by_autograd(program: Program, ops: Sequence[Op], item: int, needing: Set[str]) -> tuple[Saved, ...]:
    """What autograd keeps of some ops of a program, in their order, besides weights and inputs.

    Args:
        program: bound.
        ops: in order of execution.
        item: bytes of an element.
        needing: the leaves that need a gradient.
    """
    live, owner = propagate(program.ops, needing, integers=False), memory_owners(program)
    differentiable = set(differentiated(program, live))
    passed = [op for op in ops if op in differentiable]
    reasons = [(owner[v.name], _reason(op, v, live)) for op in passed for v in saved_values(op, program.sizes, live)]
    inside = [
        Saved(f"of {op.out.name}", (), kept, (f"{_INSIDE[type(op)]}, for {_gradients(op, live)}",))
        for op in passed
        if (kept := saved_inside_bytes(op, program.sizes, item, live))
    ]
    return (*_collected(program, ops, item, reasons), *inside)


def saved_by_function(adjoint: Adjoint, item: int) -> tuple[Saved, ...]:
    """What a function with a backward pass of its own keeps besides weights and inputs: all that this pass reads."""
    program = adjoint.program
    owner, kept = memory_owners(program), {v.name for v in adjoint.saved}
    names = {gradient.name: name for name, gradient in adjoint.wanted.items()}
    repeated = {op.out.name for op in adjoint.repeated}
    reasons: list[tuple[str, str]] = []
    for op in adjoint.backward:
        made = op.out.name
        purpose = f"{made} again" if made in repeated else f"∂{names.get(made, made.removesuffix('_grad'))}"
        reasons += [(owner[v.name], f"to compute {purpose}") for v in operands(op) if v.name in kept]
    return _collected(program, program.ops, item, reasons)


def merged(first: Iterable[Saved], second: Iterable[Saved]) -> tuple[Saved, ...]:
    """Both, what is kept twice once, with the reasons of either."""
    found: dict[str, Saved] = {}
    for s in (*first, *second):
        known = found.get(s.name)
        found[s.name] = s if known is None else Saved(s.name, s.indices, s.bytes, known.reasons + s.reasons)
    return tuple(found.values())


def _collected(program: Program, ops: Sequence[Op], item: int, reasons: Iterable[tuple[str, str]]) -> tuple[Saved, ...]:
    leaves = {v.name for v in program.leaves}
    found: dict[str, dict[str, None]] = {}
    for name, reason in reasons:
        if name not in leaves:
            found.setdefault(name, {})[reason] = None
    values: Mapping[str, Value] = {v.name: v for op in program.ops for v in results(op)} | storages(program)
    order = [v.name for op in ops for v in results(op) if v.name in found]
    return tuple(
        Saved(name, values[name].indices, size(values[name], program.sizes, item), tuple(found[name])) for name in order
    )


def _gradients(op: Op, live: frozenset[str]) -> str:
    return ", ".join(f"∂{v.name}" for v in operands(op) if v.name in live)


def _reason(op: Op, value: Value, live: frozenset[str]) -> str:
    """Why the backward of `op` reads a value."""
    if isinstance(op, GroupedContract):
        other = op.rhs if value == op.lhs else op.lhs
        return f"factor of {op.out.name}, for ∂{other.name}"
    if isinstance(op, Contract | ContractAdd | Multiply):
        (other,) = [v for v in (op.lhs, op.rhs) if v != value] or [value]
        return f"factor of {op.out.name}, for ∂{other.name}"
    if value.integer:
        return f"positions of {op.out.name}, for {_gradients(op, live)}"
    if isinstance(op, ScatterAdd):
        return f"addend of {op.out.name}, of which torch keeps more than its shape"
    role = "result" if value == op.out else "input"
    return f"{role} of {_KINDS.get(type(op).__name__, type(op).__name__)}, for {_gradients(op, live)}"


_KINDS = {"Gelu": "GELU", "Softmax": "softmax", "Sigmoid": "sigmoid", "Sparsemax": "sparsemax"}
