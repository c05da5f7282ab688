"""What is alive in the backward pass that autograd makes: see `tnmoe.footprint.forward` for the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tnmoe.costing.saved import differentiated, saved_values
from tnmoe.footprint.allocations import (
    backward_traces,
    copies_gradient,
    gradient_bytes,
    gradient_order,
    is_sparse,
    passes_on,
    reads_to_the_end,
)
from tnmoe.footprint.contraction_allocations import is_broadcast
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import MemoryTimeline
from tnmoe.ir.aliases import lies_alike
from tnmoe.ir.contractions import Add, ContractionOp, Reduce
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.routing_ops import Gather
from tnmoe.ir.value import Value

SEED = "∂"
"""The gradient of the result, as a storage."""


def inside(op: Op) -> str:
    """What the backward pass of an op keeps and that is no value of the program, as a storage."""
    return f"inside {op.out.name}"


@dataclass(slots=True)
class Gradient:
    """The gradient of a value: its storage, and how it lies there.

    Attributes:
        storage: its name.
        order: the axes in the order in which they lie in memory, without gaps; None where they do not, as in what
            is expanded, or in the rows of a sparse gradient.
        view: whether it is a tensor of its own over a storage that others hold.
    """

    storage: str
    order: tuple[str, ...] | None
    view: bool = False


@dataclass
class Backward:
    """A backward pass on a timeline that the forward pass has left.

    Attributes:
        tensors: of the program, with all values that need a gradient.
        timeline: what is alive.
        gradients: of the values whose own op has not run yet, by name.
        holders: how many hold each storage of a gradient.
    """

    tensors: TensorBytes
    timeline: MemoryTimeline
    gradients: dict[str, Gradient] = field(default_factory=dict)
    holders: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """Take the gradient of the result, which the caller holds too, for good."""
        out = self.tensors.program.output
        self.timeline.hold(SEED, self.bytes(out), "gradients")
        self.gradients[out.name] = Gradient(SEED, out.indices)
        self.holders[SEED] = 2

    def bytes(self, value: Value) -> int:
        """Bytes of a value, or of its gradient."""
        return self.tensors.of(value)

    def release(self, gradient: Gradient) -> None:
        """One holder less; the last one frees."""
        self.holders[gradient.storage] -= 1
        if not self.holders[gradient.storage]:
            self.timeline.free(gradient.storage)

    def made(self, value: Value, count: int) -> Gradient:
        """A new storage of a gradient, held once, laid out as the value is."""
        storage = f"∂{value.name} {len(self.timeline.steps)}"
        while storage in self.timeline.held:
            storage += "'"
        self.timeline.hold(storage, count, "temporaries")
        self.holders[storage] = 1
        return Gradient(storage, value.indices)

    def dense(self, gradient: Gradient, value: Value) -> bool:
        """Whether a gradient is laid out as its value is."""
        return gradient.order is not None and lies_alike(gradient.order, value.indices, self.tensors.program.sizes)

    def hand_on(self, step: str, made: Sequence[tuple[Value, Gradient]]) -> None:
        """Hand on the gradients that a node of torch's graph made.

        A second one of the same value is added out of place; the node holds it until all are handed on.
        """
        added: list[Gradient] = []
        for value, gradient in made:
            if value.name in self.gradients:
                self.timeline.step("backward", step, (self.bytes(value),))
                total, before = self.made(value, self.bytes(value)), self.gradients[value.name]
                if before.order == gradient.order is not None:
                    total.order = before.order  # a sum of two that lie alike lies as they do
                self.release(before)
                added.append(gradient)
                gradient = total
                self.timeline.done()
            self.gradients[value.name] = gradient
        for gradient in added:
            self.release(gradient)
        self.timeline.done()

    def accumulate(self, leaf: Value) -> None:
        """A leaf takes its gradient; it copies one that somebody else holds, or that is laid out in another way.

        A view of what somebody else holds is a tensor of its own, by torch's count, and is taken as it is; so are the
        rows of a sparse gradient.
        """
        gradient, count = self.gradients.pop(leaf.name), self.bytes(leaf)
        dense = self.dense(gradient, leaf)
        if dense and gradient.view:
            self.timeline.reclassify(gradient.storage, "gradients")
            return
        if self.holders[gradient.storage] > 1 or not dense:
            self.timeline.step("backward", leaf.name, (count,))
        self.release(gradient)
        self.timeline.hold(f"∂{leaf.name}", count, "gradients")
        self.timeline.done()

    def run(self, ops: Sequence[Op]) -> None:
        """Run the backward of ops, which are given in the order of the forward pass."""
        timeline, program = self.timeline, self.tensors.program
        owner, requires_grad = program.owner, self.tensors.requires_grad
        passed = set(differentiated(program, requires_grad))
        order = [op for op in ops if op in passed]
        last_read = {
            owner[v.name]: op.out.name for op in reversed(order) for v in saved_values(op, program.sizes, requires_grad)
        }
        leaves = {v.name for v in program.leaves if v.name in requires_grad}
        first_use = {v.name: op.out.name for op in reversed(order) for v in operands(op) if v.name in leaves}
        listed = {owner[op.positions.name] for op in order if isinstance(op, Gather) and op.sparse}  # by gradients
        made = {v.name for op in program.ops for v in results(op)} - {owner[program.output.name]}

        def take(op: Op) -> None:
            for v in operands(op):
                if first_use.get(v.name) == op.out.name and v.name in self.gradients:
                    self.accumulate(v)

        for op in reversed(order):
            incoming = self.gradients.pop(op.out.name, None)
            if incoming is None:
                continue  # nothing that needs a gradient depends on it
            kept = {owner[v.name] for v in saved_values(op, program.sizes, requires_grad)} & made
            read = [name for name in kept - listed if last_read[name] == op.out.name]
            handed = self._gradients_of(op, incoming, read)
            timeline.free(inside(op))
            timeline.done()
            broadcast = [(v, g) for v, g in handed if isinstance(op, ContractionOp) and is_broadcast(op, v)]
            self.hand_on(op.out.name, [pair for pair in handed if pair not in broadcast])
            take(op)
            for v, items in broadcast:
                self.hand_on(op.out.name, [(v, self._summed(op, v, items))])
                take(op)

    def _summed(self, op: Op, value: Value, items: Gradient) -> Gradient:
        """The gradient of a broadcast matrix, by the node that expanded it; that of each item is released."""
        self.timeline.step("backward", op.out.name, (self.bytes(value),))
        total = self.made(value, self.bytes(value))
        if items.order is not None:
            total.order = tuple(i for i in items.order if i in value.indices)
        self.release(items)
        self.timeline.done()
        return total

    def _gradients_of(self, op: Op, incoming: Gradient, read: Collection[str]) -> list[tuple[Value, Gradient]]:
        """The gradients of the operands of an op, which releases that of its result, and what it `read` last."""
        timeline, tensors = self.timeline, self.tensors

        def replaced(count: int) -> Gradient:
            result = self.made(op.out, count)
            self.release(incoming)
            timeline.done()
            return result

        if not self.dense(incoming, op.out) and copies_gradient(op, incoming.order, tensors):
            timeline.step("backward", op.out.name, (self.bytes(op.out),))
            incoming = replaced(self.bytes(op.out))

        def free_what_was_read() -> None:
            for name in read:
                timeline.free(name)
            if isinstance(op, Gather) and op.sparse:
                timeline.reclassify(tensors.program.owner[op.positions.name], "gradients")

        late = reads_to_the_end(op)
        *before, last = backward_traces(op, tensors)
        for number, stage in enumerate(before):
            timeline.step("backward", op.out.name, stage)
            if number == 0 and not late:
                free_what_was_read()
            incoming = replaced(sum(stage))
        timeline.step("backward", op.out.name, last)
        if late or not before:
            free_what_was_read()
        gradients: list[tuple[Value, Gradient]] = []
        for v in operands(op):
            if not tensors.needs(v):
                continue
            if passes_on(op, v, tensors):
                self.holders[incoming.storage] += 1
                order = None if isinstance(op, Reduce) else incoming.order
                if order is not None and not set(v.indices) <= set(order):  # other names for the same axes
                    order = v.indices if self.dense(incoming, op.out) else None
                view = is_sparse(op) or (isinstance(op, Add) and v.indices != op.out.indices)
                gradients.append((v, Gradient(incoming.storage, order, incoming.view or view)))
            else:
                gradient = self.made(v, gradient_bytes(op, v, tensors))
                gradient.order = gradient_order(op, v)
                gradients.append((v, gradient))
        self.release(incoming)
        return gradients
