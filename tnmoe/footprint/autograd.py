"""What is alive in the backward pass that autograd makes: see `tnmoe.footprint.forward` for the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field

from tnmoe.costing.saved import differentiated, saved_values
from tnmoe.footprint.allocations import backward_scripts, gradient_bytes, passes_on
from tnmoe.footprint.timeline import Heap, size
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Reduce, matmul_groups
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import CapacitySlots, Gather, TopK, Unsort
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim

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
    """A backward pass on a heap that the forward pass has left.

    Attributes:
        program: bound.
        heap, item: as in `tnmoe.footprint.forward.run_forward`.
        needing: names of all values that need a gradient.
        owner: the value whose memory each value is.
        gradients: of the values whose own op has not run yet, by name.
        holders: how many hold each storage of a gradient.
    """

    program: Program
    heap: Heap
    item: int
    needing: Set[str]
    owner: Mapping[str, str]
    gradients: dict[str, Gradient] = field(default_factory=dict)
    holders: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """Take the gradient of the result, which the caller holds too, for good."""
        out = self.program.output
        self.heap.hold(SEED, self.bytes(out), "gradients")
        self.gradients[out.name] = Gradient(SEED, out.indices)
        self.holders[SEED] = 2

    @property
    def stored(self) -> frozenset[str]:
        """Names of parameters and buffers."""
        return frozenset(p.name for p in (*self.program.parameters, *self.program.buffers))

    def bytes(self, value: Value) -> int:
        """Bytes of a value, or of its gradient."""
        return size(value, self.program.sizes, self.item)

    def give_up(self, gradient: Gradient) -> None:
        """One holder less; the last one frees."""
        self.holders[gradient.storage] -= 1
        if not self.holders[gradient.storage]:
            self.heap.free(gradient.storage)

    def made(self, value: Value, count: int) -> Gradient:
        """A new storage of a gradient, held once, laid out as the value is."""
        storage = f"∂{value.name} {len(self.heap.moments)}"
        while storage in self.heap.held:
            storage += "'"
        self.heap.hold(storage, count, "temporaries")
        self.holders[storage] = 1
        return Gradient(storage, value.indices)

    def dense(self, gradient: Gradient, value: Value) -> bool:
        """Whether a gradient is laid out as its value is."""
        return gradient.order is not None and _alike(gradient.order, value.indices, self.program.sizes)

    def hand_on(self, step: str, found: Sequence[tuple[Value, Gradient]]) -> None:
        """Hand on the gradients that a node of torch's graph made.

        A second one of the same value is added out of place; the node holds it until all are handed on.
        """
        added: list[Gradient] = []
        for value, gradient in found:
            if value.name in self.gradients:
                self.heap.step("backward", step, (self.bytes(value),))
                total, before = self.made(value, self.bytes(value)), self.gradients[value.name]
                if before.order == gradient.order is not None:
                    total.order = before.order  # a sum of two that lie alike lies as they do
                self.give_up(before)
                added.append(gradient)
                gradient = total
                self.heap.done()
            self.gradients[value.name] = gradient
        for gradient in added:
            self.give_up(gradient)
        self.heap.done()

    def accumulate(self, leaf: Value) -> None:
        """A leaf takes its gradient; it copies one that somebody else holds, or that is laid out in another way.

        A view of what somebody else holds is a tensor of its own, by torch's count, and is taken as it is; so are the
        rows of a sparse gradient.
        """
        gradient, count = self.gradients.pop(leaf.name), self.bytes(leaf)
        dense = self.dense(gradient, leaf)
        if dense and gradient.view:
            self.heap.reclassify(gradient.storage, "gradients")
            return
        if self.holders[gradient.storage] > 1 or not dense:
            self.heap.step("backward", leaf.name, (count,))
        self.give_up(gradient)
        self.heap.hold(f"∂{leaf.name}", count, "gradients")
        self.heap.done()

    def run(self, ops: Sequence[Op]) -> None:
        """Run the backward of ops, which are given in the order of the forward pass."""
        heap, needing, owner = self.heap, self.needing, self.owner
        passed = set(differentiated(self.program, needing))
        order = [op for op in ops if op in passed]
        last_read = {
            owner[v.name]: op.out.name for op in reversed(order) for v in saved_values(op, self.program.sizes, needing)
        }
        leaves = {v.name for v in self.program.leaves if v.name in needing}
        first_use = {v.name: op.out.name for op in reversed(order) for v in operands(op) if v.name in leaves}
        listed = {owner[op.positions.name] for op in order if isinstance(op, Gather) and op.sparse}  # by gradients
        made = {v.name for op in self.program.ops for v in results(op)} - {owner[self.program.output.name]}

        def take(op: Op) -> None:
            for v in operands(op):
                if first_use.get(v.name) == op.out.name and v.name in self.gradients:
                    self.accumulate(v)

        for op in reversed(order):
            incoming = self.gradients.pop(op.out.name, None)
            if incoming is None:
                continue  # nothing that needs a gradient depends on it
            kept = {owner[v.name] for v in saved_values(op, self.program.sizes, needing)} & made
            read = [name for name in kept - listed if last_read[name] == op.out.name]
            found = self._gradients_of(op, incoming, read)
            heap.free(inside(op))
            heap.done()
            broadcast = [(v, g) for v, g in found if _is_broadcast(op, v)]
            self.hand_on(op.out.name, [pair for pair in found if pair not in broadcast])
            take(op)
            for v, items in broadcast:
                self.hand_on(op.out.name, [(v, self._summed(op, v, items))])
                take(op)

    def _summed(self, op: Op, value: Value, items: Gradient) -> Gradient:
        """The gradient of a broadcast matrix, by the node that expanded it; that of each item is given up."""
        self.heap.step("backward", op.out.name, (self.bytes(value),))
        total = self.made(value, self.bytes(value))
        if items.order is not None:
            total.order = tuple(i for i in items.order if i in value.indices)
        self.give_up(items)
        self.heap.done()
        return total

    def _gradients_of(self, op: Op, incoming: Gradient, read: Collection[str]) -> list[tuple[Value, Gradient]]:
        """The gradients of the operands of an op, which gives up that of its result, and what it `read` last."""
        heap, sizes = self.heap, self.program.sizes

        def replaced(count: int) -> Gradient:
            result = self.made(op.out, count)
            self.give_up(incoming)
            heap.done()
            return result

        if not self.dense(incoming, op.out) and _is_copied(op, incoming.order, sizes):
            heap.step("backward", op.out.name, (self.bytes(op.out),))
            incoming = replaced(self.bytes(op.out))

        def release() -> None:
            for name in read:
                heap.free(name)
            if isinstance(op, Gather) and op.sparse:
                heap.reclassify(self.owner[op.positions.name], "gradients")

        late = isinstance(op, TopK)  # which needs no order to undo a slice
        *before, script = backward_scripts(op, sizes, self.item, self.needing, self.stored)
        for number, stage in enumerate(before):
            heap.step("backward", op.out.name, stage)
            if number == 0 and not late:
                release()
            incoming = replaced(sum(stage))
        heap.step("backward", op.out.name, script)
        if late or not before:
            release()
        found: list[tuple[Value, Gradient]] = []
        for v in operands(op):
            if v.name not in self.needing:
                continue
            if passes_on(op, v, sizes):
                self.holders[incoming.storage] += 1
                order = None if isinstance(op, Reduce) else incoming.order
                if order is not None and not set(v.indices) <= set(order):  # other names for the same axes
                    order = v.indices if self.dense(incoming, op.out) else None
                view = _is_sparse(op) or (isinstance(op, Add) and v.indices != op.out.indices)
                found.append((v, Gradient(incoming.storage, order, incoming.view or view)))
            else:
                gradient = self.made(v, gradient_bytes(op, v, sizes, self.item))
                gradient.order = _order(op, v, sizes)
                found.append((v, gradient))
        self.give_up(incoming)
        return found


def _is_broadcast(op: Op, value: Value) -> bool:
    return isinstance(op, Contract) and value == op.lhs and bool(matmul_groups(op).outer)


def _alike(order: tuple[str, ...], other: tuple[str, ...], sizes: Mapping[str, Dim]) -> bool:
    """Whether two orders of axes are the same in memory, where axes of size 1 do not matter."""
    return [i for i in order if sizes[i] != 1] == [i for i in other if sizes[i] != 1]


def _order(op: Op, value: Value, sizes: Mapping[str, Dim]) -> tuple[str, ...]:
    """How torch lays out the gradient of an operand: transposed, where products of batches take it as it was read."""
    if isinstance(op, CapacitySlots):  # that of a transpose
        return value.indices[::-1]
    if not isinstance(op, Contract | ContractAdd):
        return value.indices
    g = matmul_groups(op)
    if (g.outer and value == op.rhs) or not (g.batch or g.outer):
        return value.indices
    straight = (*g.batch, *g.rows, *g.inner) if value == op.lhs else (*g.batch, *g.inner, *g.cols)
    return straight if set(straight) == set(value.indices) else value.indices


def _is_sparse(op: Op) -> bool:
    return isinstance(op, Gather) and op.sparse


def _is_copied(op: Op, order: tuple[str, ...] | None, sizes: Mapping[str, Dim]) -> bool:
    """Whether a gradient in that order has to be copied: axes that the op has merged must lie one after another."""
    if _is_sparse(op):
        return True
    if isinstance(op, Unsort):
        return all(sizes[i] != 1 for i in op.out.indices[:2])
    if not isinstance(op, Contract | ContractAdd):
        return False
    g = matmul_groups(op)
    merged = [[i for i in group if sizes[i] != 1] for group in (g.outer, g.rows, g.cols)]
    if order is None:
        return any(len(group) > 1 for group in merged)
    lying = [i for i in order if sizes[i] != 1]
    return any(group and lying[(at := lying.index(group[0])) : at + len(group)] != group for group in merged)
