"""What is alive when in a module whose end is a `torch.autograd.Function` with a planned backward pass.

The rules, besides those of `tnmoe.footprint.forward`, checked against torch's `MemTracker`:

* What autograd differentiates runs first. The function's own values live until it returns, or until `del`; what it
  keeps for its backward pass is returned as well, so it is never given up before.
* Without autograd the plain statements run, with GELU in place; in chunks the function does, and what it would keep
  goes with each chunk.
* Its backward pass holds all that was kept until it returns, and hands the gradients on in the order of its inputs.
* In chunks of tokens, `tnmoe.autodiff.chunks` says what has an array, a room or a sum, all there before the first
chunk, and
  what of each chunk is kept as it is. What a chunk makes besides lives until the op that gives it up; if that is left
  out, until the next chunk, or what follows, makes it anew.

Autocast's copies are not counted: the module is of one dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.chunks import Pass, backward_pass, forward_pass, listed_values
from tnmoe.costing.saved import saved_values
from tnmoe.footprint.autograd import SEED, Backward, Gradient, inside
from tnmoe.footprint.forward import inference, leave, leaves, run_ops
from tnmoe.footprint.liveness import released_backward, released_inference
from tnmoe.footprint.timeline import Heap, Moment, size
from tnmoe.ir.contractions import Merge
from tnmoe.ir.dataflow import gate_ops, is_view, memory_owners
from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value

PART = " of a chunk"
"""What is appended to the name of a value that each chunk makes anew."""


@dataclass(frozen=True)
class FunctionMemory:
    """Timelines of a module with a function.

    Attributes:
        adjoint: the function's forward and backward pass; bound.
        chunk: tokens that it takes at once; None for all.
        item: bytes of an element.
        needing: the leaves that need a gradient.
        placing: whether products write their result where a streamed function tells them to.
    """

    adjoint: Adjoint
    chunk: int | None
    item: int
    needing: Set[str]
    placing: bool = True

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
    def tokens(self) -> int:
        """Rows of the batch."""
        found = self.program.sizes[self.adjoint.token]
        assert isinstance(found, int)
        return found

    def inference(self) -> list[Moment]:
        """The timeline of a forward pass without autograd, in evaluation mode."""
        if self.chunk is None:
            return inference(released_inference(self.adjoint), self.item)
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
        kept = {self.owner[v.name] for op in self.before for v in saved_values(op, program.sizes, live)}
        kept |= {inside(op) for op in self.before}
        if differentiated:
            kept |= {self.owner[v.name] for v in self.adjoint.saved if v in self.adjoint.inputs}
        gates = gate_ops(program)
        run_ops(program, gates, heap, self.item, phase, kept, live)
        returned = {v.name for op in gates for v in results(op)} & set(program.coefficients)
        leave(heap, gates, kept.union(self.owner[name] for name in returned))
        run_ops(replace(program, drops={}), self.before[len(gates) :], heap, self.item, phase, kept, live)
        out = self.owner[program.output.name]
        own = set(self._kept) if differentiated else set[str]()
        if self.chunk is None:
            run_ops(self._whole(program), self.adjoint.ops, heap, self.item, phase, own)
            leave(heap, self.adjoint.ops, own | {out})
        else:
            place = forward_pass(self.adjoint, placing=self.placing)
            rows = {v.name: self.tokens if v == program.output or own else self.most for v in place.arrays}
            self._stream(heap, place, phase, rows, own)
            for v in place.arrays:
                if v.name not in own | {out}:
                    heap.free(v.name)
        leave(heap, self.before, kept)

    @property
    def most(self) -> int:
        """Rows of the largest chunk."""
        assert self.chunk is not None
        return min(self.tokens, self.chunk)

    def _stream(
        self,
        heap: Heap,
        place: Pass,
        phase: str,
        rows: Mapping[str, int],
        kept: Set[str],
        skipped: Set[Op] = frozenset(),
    ) -> None:
        """Run a pass in chunks; its arrays (of so many `rows`), sums and what is kept stay held, all else is gone."""
        program, made = place.program, set[str]()
        owner, names = memory_owners(program), dict[str, set[str]]()  # of what a chunk makes

        def take(name: str, value: Value, count: int, kind: str = "temporaries") -> None:
            sizes = {**program.sizes, place.token: count}
            heap.step(phase, value.name, (size(value, sizes, self.item),))
            if name in made:  # the name is bound anew: what it was is gone
                heap.free(name)
            heap.hold(name, size(value, sizes, self.item), kind)
            heap.done()
            made.add(name)

        def give_up(dropped: Sequence[str]) -> None:
            for name in dropped:
                storage = owner[name] + PART
                if storage in names:
                    names[storage].discard(name)
                    if not names[storage]:
                        del names[storage]
                        made.discard(storage)
                        heap.free(storage)
            heap.done()

        asked = {op.out.name for op in place.ops if op not in skipped}
        for v in (*place.arrays, *place.sums):
            if v.name in asked:
                take(v.name, v, rows.get(v.name, self.most), "saved" if v.name in kept else "temporaries")
        made.clear()
        for op in place.once:
            if not is_view(op) and op not in skipped:
                take(op.out.name, op.out, self.most)
        for number, shape in enumerate(place.shapes):
            take(f"room {number}", Value(f"room_{number + 1}", shape), self.most)
        summed = {v.name for v in place.sums}
        listed = {v.name for v in place.listed} & kept
        counts = self._chunks if listed else self._chunks[:2]  # all later ones are as the second
        for number, count in enumerate(counts):
            for op in place.ops:
                if op in skipped:
                    continue
                if op.out.name in listed:
                    take(_of_chunk(op.out.name, number), op.out, count, "saved")
                    made.discard(_of_chunk(op.out.name, number))
                elif is_view(op):
                    names.get(owner[op.out.name] + PART, set()).add(op.out.name)
                elif op.out.name not in summed and not place.placed(op):
                    take(op.out.name + PART, op.out, count)
                    names[op.out.name + PART] = {op.out.name}
                elif op.out.name in summed and not place.added_in_place(op):
                    heap.step(phase, op.out.name, (size(op.out, program.sizes, self.item),))
                    heap.done()
                give_up(place.drops.get(op.out.name, ()))
            give_up(place.ends)
        for op in place.after:
            if not is_view(op) and op not in skipped:
                take(op.out.name, op.out, self.most)
                made.discard(op.out.name)
        for name in made:
            heap.free(name)
        heap.done()

    @cached_property
    def _chunks(self) -> tuple[int, ...]:
        """Rows of each chunk."""
        whole, rest = divmod(self.tokens, self.most)
        return (self.most,) * whole + ((rest,) if rest else ())

    @cached_property
    def _kept(self) -> tuple[str, ...]:
        """Values of the function's own that its backward pass reads."""
        made = {op.out.name for op in self.adjoint.ops}
        return tuple(dict.fromkeys(self.owner[v.name] for v in self.adjoint.saved if v.name in made))

    @property
    def _kept_storages(self) -> tuple[str, ...]:
        """What holds them: one tensor for all tokens, or one for each chunk."""
        if self.chunk is None:
            return self._kept
        listed = {v.name for v in listed_values(self.adjoint, placing=self.placing)}
        chunks = range(len(self._chunks))
        return tuple(s for n in self._kept for s in ([_of_chunk(n, k) for k in chunks] if n in listed else [n]))

    def _whole(self, program: Program) -> Program:
        """The program, which gives up what is the function's own alone."""
        own = {op.out.name for op in self.adjoint.ops} - self.adjoint.kept
        drops = {at: tuple(name for name in names if self.owner[name] in own) for at, names in program.drops.items()}
        return replace(program, drops=drops)

    # ---- backward --------------------------------------------------------------------------------------------

    def _backward(self, walk: Backward) -> None:
        """Run the function's backward; its inputs get their gradients."""
        heap, adjoint = walk.heap, self.adjoint
        seed = walk.gradients.pop(self.program.output.name)
        found = list(self._gradients(walk))
        for name in self._kept_storages:
            heap.free(name)
        self._release(walk)
        walk.give_up(seed)
        heap.done()
        walk.hand_on(adjoint.ops[-1].out.name, found)
        later = {v.name for op in self.before for v in operands(op)}
        for v in adjoint.inputs:
            if v.name in walk.gradients and v in self.program.leaves and v.name not in later:
                walk.accumulate(v)

    def _release(self, walk: Backward) -> None:
        """Values made before the function that nothing but the function had saved."""
        made = {op.out.name for op in self.before}
        others = {self.owner[v.name] for op in self.before for v in saved_values(op, self.program.sizes, self.live)}
        for name in {self.owner[v.name] for v in self.adjoint.saved} & made - others:
            walk.heap.free(name)

    def _gradients(self, walk: Backward) -> Iterator[tuple[Value, Gradient]]:
        """Run the backward pass; the gradients of the inputs that need one, in order."""
        heap, adjoint = walk.heap, self.adjoint
        skipped = {op for op, name in adjoint.only_for.items() if name not in self.live}
        wanted = [v for v in adjoint.inputs if v.name in adjoint.wanted and v.name in self.live]
        program = released_backward(adjoint) if self.chunk is None else adjoint.as_program()
        owner = memory_owners(program)
        storages = {v.name: owner[adjoint.wanted[v.name].name] for v in wanted}
        if self.chunk is None:
            run_ops(program, program.ops, heap, self.item, "backward", skipped=skipped)
        else:
            place = backward_pass(adjoint, placing=self.placing)
            rows = {v.name: self.tokens for v in place.arrays}
            storages |= {name: adjoint.wanted[name].name for name in storages if adjoint.wanted[name].name in rows}
            self._stream(heap, place, "backward", rows, frozenset(), skipped)
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
            yield v, Gradient(names[storage], v.indices if _is_whole(program, adjoint.wanted[v.name].name) else None)


def _of_chunk(name: str, number: int) -> str:
    """The name of a value's part that one chunk keeps."""
    return f"{name} of chunk {number + 1}"


def _is_whole(program: Program, name: str) -> bool:
    """False if a value is a view that leaves out entries of the rows whose memory it is."""
    made = {op.out.name: op for op in program.ops}
    while name in made and is_view(op := made[name]):
        if isinstance(op, Merge) and op.padded and op.out.indices[0] != op.index:
            return False
        name = operands(op)[0].name
    return True
