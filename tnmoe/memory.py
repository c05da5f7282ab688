"""What is alive when: the lifetimes that the emitted code really has, without and with autograd.

The rules, checked against torch's `MemTracker` (torch.distributed._tools.mem_tracker):

* A value lives until the function that computes it returns (the gates have one of their own), or until `del`.
* With autograd, what the backward of an op reads lives on until that backward has run.
* Backward visits the ops in reverse order. A gradient lives from the op that makes it until the op that takes it; the
  second gradient of a value that is used twice is added out of place, so that three are alive for a moment.
* Weights, inputs, the result and its gradient are the caller's, and stay.

Equal to the tracker for layers in every order that a planner chose. Strides are not followed, so the backward pass of
an odd order, or of a bare einsum (single tensors, scalar results, folded biases), may be off by a copy, either way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass

from tnmoe.allocations import (
    Script,
    backward_scripts,
    forward_script,
    passes_on,
    room,
    saved_inside_bytes,
    size,
)
from tnmoe.backward import saved_values
from tnmoe.cost import is_view
from tnmoe.dims import Dim
from tnmoe.ops import Contract, ContractAdd, Op, Permute, Reduce, Value, matmul_groups, operands, propagate, results
from tnmoe.program import Program, gate_ops

CLASSES = ("weights", "inputs", "saved", "temporaries", "gradients")
"""Parameters and buffers; the input; kept for the backward pass; other results and scratch; gradients of weights and
inputs, with that of the result (those of intermediates are temporaries)."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a timeline.

    Attributes:
        phase: "inference", "forward" (with autograd) or "backward".
        step: name of the op's result.
        peak: most bytes alive while it runs.
        live: the same by class.
        after: bytes alive when it is done.
    """

    phase: str
    step: str
    peak: int
    live: Mapping[str, int]
    after: int


class Heap:
    """Storages by name, and the moments at which they change."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, int]] = {}
        self.live = dict.fromkeys(CLASSES, 0)
        self.moments: list[Moment] = []

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.live.values())

    def hold(self, name: str, count: int, kind: str) -> None:
        """Take `count` bytes of a class."""
        self.held[name] = kind, count
        self.live[kind] += count

    def free(self, name: str) -> None:
        """Give back what `hold` took."""
        kind, count = self.held.pop(name)
        self.live[kind] -= count

    def step(self, phase: str, name: str, script: Script) -> None:
        """Note what is alive while a script runs; what stays of it is to be held by the caller."""
        live = self.live | {"temporaries": self.live["temporaries"] + room(script)}
        self.moments.append(Moment(phase, name, sum(live.values()), live, 0))

    def done(self) -> None:
        """Note what is alive after the last step."""
        last = self.moments[-1]
        self.moments[-1] = Moment(last.phase, last.step, last.peak, last.live, self.total)


def execution_order(program: Program) -> tuple[Op, ...]:
    """The ops as the emitted code runs them: those of the gates first."""
    first = gate_ops(program)
    return first + tuple(op for op in program.ops if op not in first)


def memory_owners(program: Program) -> dict[str, str]:
    """The value whose memory each value is: its own, but for views."""
    found = {v.name: v.name for v in program.leaves}
    for op in program.ops:
        found |= {v.name: found[operands(op)[0].name] if is_view(op) else v.name for v in results(op)}
    return found


def inference(program: Program, item: int) -> list[Moment]:
    """The timeline of a forward pass without autograd, in evaluation mode; `item` is the bytes of an element."""
    heap = _leaves(program, item)
    run_forward(program, heap, item, "inference")
    return heap.moments


def training(program: Program, item: int, needing: Set[str]) -> list[Moment]:
    """The timeline of a forward pass and of the backward pass after it.

    Args:
        program: bound.
        item: bytes of an element.
        needing: the leaves that need a gradient.
    """
    heap = _leaves(program, item)
    live = propagate(program.ops, needing)
    run_forward(program, heap, item, "forward", live)
    if program.output.name in live:
        _backward(program, heap, item, live)
    return heap.moments


def _leaves(program: Program, item: int) -> Heap:
    heap = Heap()
    inputs = {v.name for v in program.inputs}
    for v in program.leaves:
        heap.hold(v.name, size(v, program.sizes, item), "inputs" if v.name in inputs else "weights")
    return heap


def run_forward(program: Program, heap: Heap, item: int, phase: str, needing: Set[str] = frozenset()) -> None:
    """Run the forward pass on a heap that holds the leaves; without `needing`, nothing is kept for a backward pass."""
    sizes = program.sizes
    owner = memory_owners(program)
    kept = {owner[v.name] for op in program.ops for v in saved_values(op, needing)}
    gates = gate_ops(program)
    for op in execution_order(program):
        for name in program.drops.get(op.out.name, ()):
            if name in heap.held and name not in kept:  # a view holds nothing of its own
                heap.free(name)
        keeps = any(v.name in needing for v in operands(op))
        heap.step(phase, op.out.name, forward_script(op, sizes, item, kept=keeps, evaluation=phase == "inference"))
        if owner[op.out.name] == op.out.name:
            heap.hold(op.out.name, size(op.out, sizes, item), "saved" if op.out.name in kept else "temporaries")
        if keeps:
            heap.hold(_inside(op), saved_inside_bytes(op, sizes, item), "saved")
        if gates and op is gates[-1]:
            _return(heap, gates, kept.union(owner[name] for name in program.coefficients))
        heap.done()
    _return(heap, program.ops, kept | {owner[program.output.name]})
    if heap.moments:
        heap.done()


def _return(heap: Heap, ops: tuple[Op, ...], but: Set[str]) -> None:
    """A function returns: its values go, unless somebody else holds them."""
    for op in ops:
        if op.out.name in heap.held and op.out.name not in but:
            heap.free(op.out.name)


def _inside(op: Op) -> str:
    return f"inside {op.out.name}"


@dataclass(slots=True)
class _Gradient:
    """The gradient of a value: its storage, and whether that is laid out as the value is."""

    storage: str
    dense: bool = True


def _backward(program: Program, heap: Heap, item: int, needing: Set[str]) -> None:
    sizes = program.sizes
    order = [op for op in execution_order(program) if any(v.name in needing for v in operands(op))]
    leaves = {v.name: v for v in program.leaves if v.name in needing}
    owner = memory_owners(program)
    last_read = {owner[v.name]: op.out.name for op in reversed(order) for v in saved_values(op, needing)}
    first_use = {v.name: op.out.name for op in reversed(order) for v in operands(op) if v.name in leaves}
    made = {op.out.name for op in program.ops}
    out = program.output
    heap.hold("∂", size(out, sizes, item), "gradients")
    gradients = {out.name: _Gradient("∂")}
    holders = Counter({"∂": 2})  # autograd, and the caller for good

    def give_up(gradient: _Gradient) -> None:
        holders[gradient.storage] -= 1
        if not holders[gradient.storage]:
            heap.free(gradient.storage)

    def copied(name: str, count: int, kind: str = "temporaries") -> _Gradient:
        storage = f"∂{name} {len(heap.moments)}"
        heap.hold(storage, count, kind)
        holders[storage] = 1
        return _Gradient(storage)

    for op in reversed(order):
        incoming = gradients.pop(op.out.name, None)
        if incoming is None:
            continue  # nothing that needs a gradient depends on it
        if not incoming.dense and _is_viewed(op, sizes):
            heap.step("backward", op.out.name, (size(op.out, sizes, item),))
            copy = copied(op.out.name, size(op.out, sizes, item))
            give_up(incoming)
            incoming = copy
            heap.done()
        *before, script = backward_scripts(op, sizes, item, needing)
        for stage in before:
            heap.step("backward", op.out.name, stage)
            result = copied(op.out.name, sum(stage))
            give_up(incoming)
            incoming = result
            heap.done()
        heap.step("backward", op.out.name, script)
        found: list[tuple[Value, _Gradient]] = []
        for v in operands(op):
            if v.name not in needing:
                continue
            if passes_on(op, v, sizes):
                holders[incoming.storage] += 1
                moved = isinstance(op, Permute) and not _alike(v.indices, op.out.indices, sizes)
                dense = incoming.dense and not moved and not isinstance(op, Reduce)
                found.append((v, _Gradient(incoming.storage, dense)))
            else:
                gradient = copied(v.name, size(v, sizes, item))
                gradient.dense = _is_dense(op, v, sizes)
                found.append((v, gradient))
        give_up(incoming)
        heap.free(_inside(op))
        for name in {owner[v.name] for v in saved_values(op, needing)} & made - {owner[out.name]}:
            if last_read[name] == op.out.name:
                heap.free(name)
        heap.done()
        for v, gradient in found:
            if v.name in gradients:
                heap.step("backward", op.out.name, (size(v, sizes, item),))
                total = copied(v.name, size(v, sizes, item))
                give_up(gradients[v.name])
                give_up(gradient)
                gradient = total
                heap.done()
            gradients[v.name] = gradient
        for v in operands(op):
            if first_use.get(v.name) == op.out.name and v.name in gradients:
                _accumulate(heap, v, size(v, sizes, item), gradients.pop(v.name), holders)


def _accumulate(heap: Heap, leaf: Value, count: int, gradient: _Gradient, holders: Counter[str]) -> None:
    """A leaf takes its gradient; it copies one that somebody else holds, or that is laid out in another way."""
    storage = gradient.storage
    if holders[storage] > 1 or not gradient.dense:
        heap.step("backward", leaf.name, (count,))
        holders[storage] -= 1
        if not holders[storage]:
            heap.free(storage)
    else:
        heap.free(storage)
    heap.hold(f"∂{leaf.name}", count, "gradients")
    heap.done()


def _alike(order: tuple[str, ...], other: tuple[str, ...], sizes: Mapping[str, Dim]) -> bool:
    """Whether two orders of axes are the same in memory, where axes of size 1 do not matter."""
    return [i for i in order if sizes[i] != 1] == [i for i in other if sizes[i] != 1]


def _is_dense(op: Op, value: Value, sizes: Mapping[str, Dim]) -> bool:
    """False if torch makes the gradient of an operand transposed: a batched product takes it as it was read."""
    if not isinstance(op, Contract | ContractAdd):
        return True
    g = matmul_groups(op)
    if not g.batch:
        return True
    straight = (*g.batch, *g.rows, *g.inner) if value == op.lhs else (*g.batch, *g.inner, *g.cols)
    return _alike(value.indices, straight, sizes)


def _is_viewed(op: Op, sizes: Mapping[str, Dim]) -> bool:
    """Whether the emitted product's axes are split, which needs a gradient that can be viewed merged."""
    if not isinstance(op, Contract | ContractAdd):
        return False
    g = matmul_groups(op)
    return any(sum(sizes[i] != 1 for i in group) > 1 for group in (g.rows, g.cols))
