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

from tnmoe.costing.saved import differentiated, saved_values, storages
from tnmoe.footprint.allocations import forward_script, saved_inside_bytes
from tnmoe.footprint.autograd import Backward, inside
from tnmoe.footprint.timeline import Heap, Moment, size
from tnmoe.ir.dataflow import execution_order, gate_ops, memory_owners
from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.program import Program


def inference(program: Program, item: int) -> list[Moment]:
    """The timeline of a forward pass without autograd, in evaluation mode; `item` is the bytes of an element."""
    heap = leaves(program, item)
    run_forward(program, heap, item, "inference")
    return heap.moments


def training(program: Program, item: int, needing: Set[str]) -> list[Moment]:
    """The timeline of a forward pass and of the backward pass after it.

    Args:
        program: bound.
        item: bytes of an element.
        needing: the leaves that need a gradient.
    """
    heap = leaves(program, item)
    live = propagate(program.ops, needing, integers=False)
    run_forward(program, heap, item, "forward", live)
    if program.output.name in live:
        walk = Backward(program, heap, item, live, memory_owners(program))
        walk.begin()
        walk.run(execution_order(program))
    return heap.moments


def leaves(program: Program, item: int) -> Heap:
    """A heap that holds weights and inputs."""
    heap = Heap()
    inputs = {v.name for v in program.inputs}
    for v in program.leaves:
        heap.hold(v.name, size(v, program.sizes, item), "inputs" if v.name in inputs else "weights")
    return heap


def run_forward(program: Program, heap: Heap, item: int, phase: str, needing: Set[str] = frozenset()) -> None:
    """Run the forward pass on a heap that holds the leaves; without `needing`, nothing is kept for a backward pass."""
    owner = memory_owners(program, evaluation=phase == "inference")
    passed = differentiated(program, needing)
    kept = {owner[v.name] for op in passed for v in saved_values(op, program.sizes, needing)}
    kept |= {inside(op) for op in passed}
    gates = gate_ops(program)
    run_ops(program, gates, heap, item, phase, kept, needing)
    leave(heap, gates, kept.union(owner[v.name] for op in gates for v in results(op) if v.name in program.coefficients))
    run_ops(program, execution_order(program)[len(gates) :], heap, item, phase, kept, needing)
    leave(heap, program.ops, kept | {owner[program.output.name]})


def run_ops(
    program: Program,
    ops: Sequence[Op],
    heap: Heap,
    item: int,
    phase: str,
    kept: Set[str] = frozenset(),
    needing: Set[str] = frozenset(),
    skipped: Set[Op] = frozenset(),
) -> None:
    """Run some ops of a program, in order, and hold what they make.

    Args:
        program: says what is dropped when, and what is a view of what.
        ops, heap, item, phase: as in `run_forward`.
        kept: names of the values that somebody else holds as well, for the backward pass.
        needing: names of the values that need a gradient.
        skipped: ops that do not run; what is dropped before them is.
    """
    owner, held = memory_owners(program, evaluation=phase == "inference"), storages(program)
    read_back = {owner[v.name] for op in ops for v in saved_values(op, program.sizes, needing)}  # while they are alive
    for op in ops:
        for name in program.drops.get(op.out.name, ()):
            storage = owner[name]
            if storage in heap.held and storage not in kept | read_back:  # all names of a memory are dropped at once
                heap.free(storage)
        if op in skipped:
            continue
        over = op.out.name in program.overwrites
        script = () if over else forward_script(op, program.sizes, item, needing, evaluation=phase == "inference")
        heap.step(phase, op.out.name, script)
        for v in results(op):
            if owner[v.name] == v.name:
                room = size(held.get(v.name, v), program.sizes, item)
                heap.hold(v.name, room, "saved" if v.name in kept else "temporaries")
        if any(v.name in needing for v in operands(op)):
            room = saved_inside_bytes(op, program.sizes, item, needing)
            heap.hold(inside(op), room, "saved" if inside(op) in kept else "temporaries")
        heap.done()


def leave(heap: Heap, ops: Sequence[Op], but: Set[str]) -> None:
    """A function returns: its values go, unless somebody else holds them."""
    for op in ops:
        for name in (*(v.name for v in results(op)), inside(op)):
            if name in heap.held and name not in but:
                heap.free(name)
    if heap.moments:
        heap.done()
