"""What is alive when in a module whose end is a `torch.autograd.Function` with a planned backward pass.

The rules, besides those of `tnmoe.memory`, checked against torch's `MemTracker`:

* What autograd differentiates runs first. The function's own values live until it returns, or until `del`; what it
  keeps for its backward pass is returned as well, so it is never given up before.
* Without autograd, what would be kept is gone when the function returns.
* Its backward pass holds all that was kept until it returns, and hands the gradients on in the order of its inputs.
* In chunks of tokens, all results are alive when `torch.cat` joins them. Backward visits the chunks from the last; the
  gradients of a weight are added out of place, chunk by chunk; those of a data value wait for each other, and `split`'s
  backward joins them.

Autocast's copies are not counted: the module is of one dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from functools import cached_property

from tnmoe.adjoint import Adjoint
from tnmoe.backward import saved_values
from tnmoe.cost import is_view
from tnmoe.gradient_memory import SEED, Backward, Gradient
from tnmoe.heap import Heap, Moment
from tnmoe.memory import leave, leaves, memory_owners, run_ops
from tnmoe.ops import Merge, Op, Value, operands, propagate
from tnmoe.program import Program, gate_ops


@dataclass(frozen=True)
class FunctionMemory:
    """Timelines of a module with a function.

    Attributes:
        adjoint: the function's forward and backward pass; bound.
        chunk: tokens that it takes at once; None for all.
        item: bytes of an element.
        needing: the leaves that need a gradient.
    """

    adjoint: Adjoint
    chunk: int | None
    item: int
    needing: Set[str]

    @property
    def program(self) -> Program:
        """The whole forward program."""
        return self.adjoint.program

    @cached_property
    def live(self) -> frozenset[str]:
        """Names of all values that need a gradient."""
        return propagate(self.program.ops, self.needing)

    @cached_property
    def owner(self) -> dict[str, str]:
        """The value whose memory each value is."""
        return memory_owners(self.program)

    @property
    def before(self) -> tuple[Op, ...]:
        """What autograd differentiates, in order of execution."""
        gates = gate_ops(self.program)
        return gates + tuple(op for op in self.adjoint.before if op not in gates)

    @property
    def differentiated(self) -> bool:
        """Whether anything that the function reads needs a gradient; else it keeps nothing."""
        return any(v.name in self.live for v in self.adjoint.inputs)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tokens of each call of the function; empty if it is called once, for all."""
        if self.chunk is None:
            return ()
        tokens = self.program.sizes[self.adjoint.token]
        assert isinstance(tokens, int)
        whole, rest = divmod(tokens, self.chunk)
        found = (self.chunk,) * whole + ((rest,) if rest else ())
        return found if len(found) > 1 else ()

    def inference(self) -> list[Moment]:
        """The timeline of a forward pass without autograd, in evaluation mode."""
        heap = leaves(self.program, self.item)
        self._forward(heap, "inference", train=False)
        return heap.moments

    def training(self) -> list[Moment]:
        """The timeline of a forward pass and of the backward pass after it."""
        heap = leaves(self.program, self.item)
        self._forward(heap, "forward", train=True)
        if self.differentiated:
            walk = Backward(self.program, heap, self.item, self.live, self.owner)
            walk.begin()
            self._backward(walk)
            walk.run(self.before)
        return heap.moments

    # ---- forward ---------------------------------------------------------------------------------------------

    def _forward(self, heap: Heap, phase: str, *, train: bool) -> None:
        program, live = self.program, self.live if train else frozenset[str]()
        differentiated = train and self.differentiated
        kept = {self.owner[v.name] for op in self.before for v in saved_values(op, live)}
        if differentiated:
            kept |= {self.owner[v.name] for v in self.adjoint.saved if v in self.adjoint.inputs}
        gates = gate_ops(program)
        run_ops(program, gates, heap, self.item, phase, kept, live)
        leave(heap, gates, kept.union(self.owner[name] for name in program.coefficients))
        run_ops(replace(program, drops={}), self.before[len(gates) :], heap, self.item, phase, kept, live)
        out = self.owner[program.output.name]
        for k, tokens in enumerate(self.chunks or (None,)):
            part = self._part(program, tokens)
            own = {name for name in self._kept if differentiated}
            run_ops(part, self.adjoint.ops, heap, self.item, phase, own)
            leave(heap, self.adjoint.ops, own | {out})
            for name in own if self.chunks else ():
                heap.rename(name, _numbered(name, k))
            if self.chunks:
                heap.rename(out, _numbered(out, k))
        if self.chunks:
            count = self._bytes(program.output)
            heap.step(phase, program.output.name, (count,))
            heap.hold(out, count, "temporaries")
            for k in range(len(self.chunks)):
                heap.free(_numbered(out, k))
            heap.done()
        leave(heap, self.before, kept)

    @cached_property
    def _kept(self) -> tuple[str, ...]:
        """Storages of the function's own that its backward pass reads."""
        made = {op.out.name for op in self.adjoint.ops}
        return tuple(dict.fromkeys(self.owner[v.name] for v in self.adjoint.saved if v.name in made))

    def _part(self, program: Program, tokens: int | None) -> Program:
        """A program on so many tokens, which gives up what is the function's own alone."""
        own = {op.out.name for op in self.adjoint.ops} - self.adjoint.kept
        drops = {at: tuple(name for name in names if name in own) for at, names in program.drops.items()}
        sizes = program.sizes if tokens is None else {**program.sizes, self.adjoint.token: tokens}
        return replace(program, drops=drops, sizes=sizes)

    def _bytes(self, value: Value) -> int:
        return Backward(self.program, Heap(), self.item, frozenset(), {}).bytes(value)

    # ---- backward --------------------------------------------------------------------------------------------

    def _backward(self, walk: Backward) -> None:
        """Run the function's backward, of each chunk; its inputs get their gradients."""
        heap, adjoint = walk.heap, self.adjoint
        seed = walk.gradients.pop(self.program.output.name)
        parts: dict[str, list[Gradient]] = {}  # of what is split into chunks
        chunks = tuple(enumerate(self.chunks or (None,)))
        for k, tokens in reversed(chunks):
            found = list(self._one(walk, tokens))
            for name in self._kept:
                heap.free(_numbered(name, k) if self.chunks else name)
            if not k:
                self._release(walk)
                walk.give_up(seed)
            heap.done()
            split = [v.name for v, _ in found if self.chunks and adjoint.token in v.indices]
            for v, gradient in found:
                if v.name in split:
                    parts.setdefault(v.name, []).append(gradient)
            walk.hand_on(adjoint.ops[-1].out.name, [(v, g) for v, g in found if v.name not in split])
        later = {v.name for op in self.before for v in operands(op)}
        for v in adjoint.inputs:
            if v.name in walk.gradients and v in self.program.leaves and v.name not in later:
                walk.accumulate(v)
        for v in reversed(adjoint.inputs):
            if v.name in parts:
                heap.step("backward", v.name, (walk.bytes(v),))
                joined = walk.made(v.name, walk.bytes(v))
                for gradient in parts[v.name]:
                    walk.give_up(gradient)
                heap.done()
                walk.hand_on(v.name, [(v, joined)])
                if v in self.program.leaves and v.name not in later:
                    walk.accumulate(v)

    def _release(self, walk: Backward) -> None:
        """Values made before the function that nothing but the function had saved."""
        made = {op.out.name for op in self.before}
        others = {self.owner[v.name] for op in self.before for v in saved_values(op, self.live)}
        for name in {self.owner[v.name] for v in self.adjoint.saved} & made - others:
            walk.heap.free(name)

    def _one(self, walk: Backward, tokens: int | None) -> Iterator[tuple[Value, Gradient]]:
        """Run the backward pass of one call; the gradients of the inputs that need one, in order."""
        heap, adjoint = walk.heap, self.adjoint
        program = self._backward_program
        if tokens is not None:
            program = replace(program, sizes={**program.sizes, adjoint.token: tokens})
        owner = memory_owners(program)
        skipped = {op for op, name in adjoint.only_for.items() if name not in self.live}
        wanted = [v for v in adjoint.inputs if v.name in adjoint.wanted and v.name in self.live]
        storages = {v.name: owner[adjoint.wanted[v.name].name] for v in wanted}
        run_ops(program, program.ops, heap, self.item, "backward", skipped=skipped)
        leave(heap, program.ops, set(storages.values()))
        names: dict[str, str] = {}
        for v in wanted:
            storage = storages[v.name]
            if storage == adjoint.seed.name:
                names[storage] = SEED
                walk.holders[SEED] += 1
            elif storage in names:
                walk.holders[names[storage]] += 1
            else:
                names[storage] = f"∂{v.name} {len(heap.moments)}"
                heap.rename(storage, names[storage])
                walk.holders[names[storage]] = 1
            yield v, Gradient(names[storage], _is_whole(program, adjoint.wanted[v.name].name))

    @cached_property
    def _backward_program(self) -> Program:
        return self.adjoint.as_program()


def _numbered(name: str, chunk: int) -> str:
    return f"{name} of chunk {chunk + 1}"


def _is_whole(program: Program, name: str) -> bool:
    """False if a value is a view that leaves out entries of the rows whose memory it is."""
    made = {op.out.name: op for op in program.ops}
    while name in made and is_view(op := made[name]):
        if isinstance(op, Merge) and op.padded and op.out.indices[0] != op.index:
            return False
        name = operands(op)[0].name
    return True
