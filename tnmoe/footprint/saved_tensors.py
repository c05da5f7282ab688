"""What is kept for the backward pass, tensor by tensor, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.costing.saved import differentiated, kept_values, saved_inside, saved_values
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.ir.contractions import Contract, ContractAdd, Multiply
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.routing_ops import GroupedContract, ScatterAdd
from tnmoe.ir.value import Value


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


def saved_by_autograd(tensors: TensorBytes, ops: Sequence[Op]) -> tuple[Saved, ...]:
    """What autograd keeps of some ops of a program, in order of execution, besides weights and inputs."""
    program, live = tensors.program, tensors.requires_grad
    differentiable = set(differentiated(program, live))
    passed = [op for op in ops if op in differentiable]
    reasons = {v.name: dict[str, None]() for v in kept_values(program, passed, live)}
    for op in passed:
        for v in saved_values(op, program.sizes, live):
            if (memory := program.owner[v.name]) in reasons:
                reasons[memory][_reason(op, v, tensors)] = None
    inside = [
        Saved(
            f"of {op.out.name}",
            (),
            kept,
            (f"{saved_inside(op, program.sizes, live).what}, for {_gradients(op, tensors)}",),
        )
        for op in passed
        if (kept := tensors.kept_inside(op))
    ]
    return (*_collected(tensors, ops, reasons), *inside)


def saved_by_function(adjoint: Adjoint, tensors: TensorBytes) -> tuple[Saved, ...]:
    """What a function with a backward pass of its own keeps besides weights and inputs: all that this pass reads."""
    owner, kept = tensors.program.owner, {v.name for v in adjoint.saved}
    names = {gradient.name: name for name, gradient in adjoint.wanted.items()}
    repeated = {op.out.name for op in adjoint.repeated}
    reasons: dict[str, dict[str, None]] = {}
    for op in adjoint.backward:
        made = op.out.name
        purpose = f"{made} again" if made in repeated else f"∂{names.get(made, made.removesuffix('_grad'))}"
        for v in operands(op):
            if v.name in kept:
                reasons.setdefault(owner[v.name], {})[f"to compute {purpose}"] = None
    return _collected(tensors, tensors.program.ops, reasons)


def merged(first: Iterable[Saved], second: Iterable[Saved]) -> tuple[Saved, ...]:
    """Both, what is kept twice once, with the reasons of either."""
    kept: dict[str, Saved] = {}
    for s in (*first, *second):
        known = kept.get(s.name)
        kept[s.name] = s if known is None else Saved(s.name, s.indices, s.bytes, known.reasons + s.reasons)
    return tuple(kept.values())


def _collected(tensors: TensorBytes, ops: Sequence[Op], reasons: Mapping[str, Iterable[str]]) -> tuple[Saved, ...]:
    """The results among what is kept, in the order in which they are made; leaves are there anyway."""
    made = (tensors.program.storages.get(v.name, v) for op in ops for v in results(op) if v.name in reasons)
    return tuple(Saved(v.name, v.indices, tensors.of(v), tuple(reasons[v.name])) for v in made)


def _gradients(op: Op, tensors: TensorBytes) -> str:
    return ", ".join(f"∂{v.name}" for v in tensors.wanted(op))


def _reason(op: Op, value: Value, tensors: TensorBytes) -> str:
    """Why the backward of `op` reads a value."""
    if isinstance(op, GroupedContract):
        other = op.rhs if value == op.lhs else op.lhs
        return f"factor of {op.out.name}, for ∂{other.name}"
    if isinstance(op, Contract | ContractAdd | Multiply):
        (other,) = [v for v in (op.lhs, op.rhs) if v != value] or [value]
        return f"factor of {op.out.name}, for ∂{other.name}"
    if value.integer:
        return f"positions of {op.out.name}, for {_gradients(op, tensors)}"
    if isinstance(op, ScatterAdd):
        return f"addend of {op.out.name}, of which torch keeps more than its shape"
    role = "result" if value == op.out else "input"
    return f"{role} of {_KINDS.get(type(op).__name__, type(op).__name__)}, for {_gradients(op, tensors)}"


_KINDS = {"Gelu": "GELU", "Softmax": "softmax", "Sigmoid": "sigmoid", "Sparsemax": "sparsemax"}
