"""What is alive when: the lifetimes that the emitted code really has, without and with autograd.

The rules, checked against torch's `MemTracker` (torch.distributed._tools.mem_tracker):

* A value lives until the function that computes it returns (the gates have one of their own), or until `del`.
* With autograd, what the backward of an op reads lives on until that backward has run; if the output does not depend
  on the op through numbers (it only chooses positions), until the function returns.
* Backward visits the ops in reverse order. A gradient lives from the op that makes it until the op that takes it; the
  second gradient of a value that is used twice is added out of place, so that three are alive for a moment.
* Weights, inputs, the result and its gradient are the caller's, and stay.

Equal to the tracker for layers in every order that a planner chose. Of gradients the order of their axes in memory is
followed, so that one which can be viewed is not copied; other strides are not, so the backward pass of an odd order, or
of a bare einsum (single tensors, scalar results, folded biases), may be off by a copy, either way.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from tnmoe.costing.saved import differentiated, saved_values
from tnmoe.footprint.allocations import forward_trace
from tnmoe.footprint.autograd import Backward, inside
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import MemoryTimeline, Step
from tnmoe.ir.bound import BoundProgram
from tnmoe.ir.ops import Op, operands, propagate, results


def inference(program: BoundProgram, itemsize: int) -> list[Step]:
    """The timeline of a forward pass without autograd, in evaluation mode; `itemsize` is the bytes of an element."""
    tensors = TensorBytes(program, itemsize)
    timeline = leaves(tensors)
    run_forward(tensors, timeline, "inference")
    return timeline.steps


def training(program: BoundProgram, itemsize: int, requires_grad: Set[str]) -> list[Step]:
    """The timeline of a forward pass and of the backward pass after it.

    Args:
        program: what is run.
        itemsize: bytes of an element.
        requires_grad: the leaves that need a gradient.
    """
    tensors = TensorBytes(program, itemsize, propagate(program.ops, requires_grad, integers=False))
    timeline = leaves(tensors)
    run_forward(tensors, timeline, "forward")
    if tensors.needs(program.output):
        walk = Backward(tensors, timeline)
        walk.begin()
        walk.run(program.order)
    return timeline.steps


def leaves(tensors: TensorBytes) -> MemoryTimeline:
    """A timeline that holds weights and inputs."""
    timeline = MemoryTimeline()
    inputs = {v.name for v in tensors.program.inputs}
    for v in tensors.program.leaves:
        timeline.hold(v.name, tensors.of(v), "inputs" if v.name in inputs else "weights")
    return timeline


def run_forward(tensors: TensorBytes, timeline: MemoryTimeline, phase: str) -> None:
    """Run the forward pass on a timeline that holds the leaves; what needs a gradient is kept for a backward pass."""
    program = tensors.program
    owner = program.evaluation_owner if phase == "inference" else program.owner
    passed = differentiated(program, tensors.requires_grad)
    kept = {owner[v.name] for op in passed for v in saved_values(op, program.sizes, tensors.requires_grad)}
    kept |= {inside(op) for op in passed}
    gates = program.gates
    run_ops(tensors, gates, timeline, phase, kept)
    coefficients = (owner[v.name] for op in gates for v in results(op) if v.name in program.coefficients)
    leave(timeline, gates, kept.union(coefficients))
    run_ops(tensors, program.order[len(gates) :], timeline, phase, kept)
    leave(timeline, program.ops, kept | {owner[program.output.name]})


def run_ops(
    tensors: TensorBytes,
    ops: Sequence[Op],
    timeline: MemoryTimeline,
    phase: str,
    kept: Set[str] = frozenset(),
    skipped: Set[Op] = frozenset(),
) -> None:
    """Run some ops of a program, in order, and hold what they make.

    Args:
        tensors: of a program, which says what is released when, and what is a view of what.
        ops, timeline, phase: as in `run_forward`.
        kept: names of the values that somebody else holds as well, for the backward pass.
        skipped: ops that do not run; what is released before them is.
    """
    program, evaluation = tensors.program, phase == "inference"
    owner = program.evaluation_owner if evaluation else program.owner
    saved = (v for op in ops for v in saved_values(op, program.sizes, tensors.requires_grad))
    held = kept | {owner[v.name] for v in saved}  # while they are alive
    for op in ops:
        for name in program.released.get(op.out.name, ()):
            storage = owner[name]
            if storage in timeline.held and storage not in held:  # all names of a memory are released at once
                timeline.free(storage)
        if op in skipped:
            continue
        over = op.out.name in program.overwrites
        timeline.step(phase, op.out.name, () if over else forward_trace(op, tensors, evaluation=evaluation))
        for v in results(op):
            if owner[v.name] == v.name:
                count = tensors.of(program.storages.get(v.name, v))
                timeline.hold(v.name, count, "saved" if v.name in kept else "temporaries")
        if any(tensors.needs(v) for v in operands(op)):
            timeline.hold(inside(op), tensors.kept_inside(op), "saved" if inside(op) in kept else "temporaries")
        timeline.done()


def leave(timeline: MemoryTimeline, ops: Sequence[Op], but: Set[str]) -> None:
    """A function returns: its values go, unless somebody else holds them."""
    for op in ops:
        for name in (*(v.name for v in results(op)), inside(op)):
            if name in timeline.held and name not in but:
                timeline.free(name)
    if timeline.steps:
        timeline.done()
