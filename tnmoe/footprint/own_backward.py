"""What is alive when in a module whose end is a `torch.autograd.Function` with a planned backward pass.

The rules, besides those of `tnmoe.footprint.forward`, checked against torch's `MemTracker`:

* What autograd differentiates runs first. The function's own values live until it returns, or until `del`; what it
  keeps for its backward pass is returned as well, so it is never released before.
* Without autograd the plain statements run, with GELU in place; in chunks the function does, and what it would keep
  goes with each chunk.
* Its backward pass holds all that was kept until it returns, and hands the gradients on in the order of its inputs.
* In chunks of tokens, `tnmoe.autodiff.chunks` says what has an array, a buffer or a sum, all there before the first
  chunk, and what of each chunk is kept as it is. What a chunk makes besides lives until the op that releases it; if
  that is left out, until the next chunk, or what follows, makes it anew.

Autocast's copies are not counted: the module is of one dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, cached_property

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.chunks import Pass, backward_pass, forward_pass, listed_values
from tnmoe.costing.saved import saved_values
from tnmoe.footprint.autograd import SEED, Backward, Gradient, inside
from tnmoe.footprint.forward import inference, leave, leaves, run_ops
from tnmoe.footprint.liveness import released_backward, released_inference
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import MemoryTimeline, Step
from tnmoe.ir.aliases import is_view
from tnmoe.ir.bound import BoundProgram, as_bound
from tnmoe.ir.contractions import Merge
from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.value import Value

PART = " of a chunk"
"""What is appended to the name of a value that each chunk makes anew."""


@dataclass(frozen=True)
class FunctionMemory:
    """Timelines of a module with a function.

    Attributes:
        adjoint: the function's forward and backward pass; bound.
        chunk: tokens that it takes at once; None for all.
        itemsize: bytes of an element.
        requires_grad: the leaves that need a gradient.
        placing: whether products write their result where a streamed function tells them to.
    """

    adjoint: Adjoint
    chunk: int | None
    itemsize: int
    requires_grad: Set[str]
    placing: bool = True

    @cached_property
    def program(self) -> BoundProgram:
        """The whole forward program."""
        return as_bound(self.adjoint.program)

    @cached_property
    def tensors(self) -> TensorBytes:
        """Bytes of its values, and all that need a gradient."""
        return TensorBytes(self.program, self.itemsize, propagate(self.program.ops, self.requires_grad))

    @property
    def owner(self) -> Mapping[str, str]:
        """The value whose memory each value is."""
        return self.program.owner

    @cached_property
    def before(self) -> tuple[Op, ...]:
        """What autograd differentiates, in order of execution."""
        gates = self.program.gates
        return gates + tuple(op for op in self.adjoint.before if op not in gates)

    @property
    def differentiated(self) -> bool:
        """Whether anything that the function reads needs a gradient; else it keeps nothing."""
        return any(self.tensors.needs(v) for v in self.adjoint.inputs)

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return self.program.sizes[self.adjoint.token]

    def inference(self) -> list[Step]:
        """The timeline of a forward pass without autograd, in evaluation mode."""
        if self.chunk is None:
            return inference(released_inference(self.adjoint), self.itemsize)
        timeline = leaves(self.tensors)
        self._forward(timeline, "inference", train=False)
        return timeline.steps

    def training(self) -> list[Step]:
        """The timeline of a forward pass and of the backward pass after it."""
        timeline = leaves(self.tensors)
        self._forward(timeline, "forward", train=True)
        if self.differentiated:
            walk = Backward(self.tensors, timeline)
            walk.begin()
            self._backward(walk)
            walk.run(self.before)
        return timeline.steps

    # ---- forward ---------------------------------------------------------------------------------------------

    def _forward(self, timeline: MemoryTimeline, phase: str, *, train: bool) -> None:
        program, tensors = self.program, self.tensors if train else self.tensors.without_autograd()
        differentiated = train and self.differentiated
        saved = (v for op in self.before for v in saved_values(op, program.sizes, tensors.requires_grad))
        kept = {self.owner[v.name] for v in saved} | {inside(op) for op in self.before}
        if differentiated:
            kept |= {self.owner[v.name] for v in self.adjoint.saved if v in self.adjoint.inputs}
        gates = program.gates
        run_ops(tensors, gates, timeline, phase, kept)
        returned = {v.name for op in gates for v in results(op)} & set(program.coefficients)
        leave(timeline, gates, kept.union(self.owner[name] for name in returned))
        run_ops(self._releasing({}, tensors), self.before[len(gates) :], timeline, phase, kept)
        out = self.owner[program.output.name]
        own = set(self._kept) if differentiated else set[str]()
        if self.chunk is None:
            plain = self._releasing(self._released_inside, tensors.without_autograd())
            run_ops(plain, self.adjoint.ops, timeline, phase, own)
            leave(timeline, self.adjoint.ops, own | {out})
        else:
            place = self._passes[0]
            rows = {v.name: self.tokens if v == program.output or own else self.most for v in place.arrays}
            self._stream(timeline, place, phase, rows, own)
            for v in place.arrays:
                if v.name not in own | {out}:
                    timeline.free(v.name)
        leave(timeline, self.before, kept)

    def _releasing(self, released: Mapping[str, tuple[str, ...]], tensors: TensorBytes) -> TensorBytes:
        """The same of the program that releases these values instead."""
        return replace(tensors, program=replace(self.program, released=released))

    @property
    def _released_inside(self) -> dict[str, tuple[str, ...]]:
        """What the program releases of what is the function's own alone."""
        own = {op.out.name for op in self.adjoint.ops} - self.adjoint.kept
        released = self.program.released.items()
        return {at: tuple(name for name in names if self.owner[name] in own) for at, names in released}

    @cached_property
    def _passes(self) -> tuple[Pass, Pass]:
        """Forward and backward, chunk by chunk."""
        adjoint, placing = self.adjoint, self.placing
        return forward_pass(adjoint, placing=placing), backward_pass(adjoint, placing=placing)

    @property
    def most(self) -> int:
        """Rows of the largest chunk."""
        assert self.chunk is not None
        return min(self.tokens, self.chunk)

    def _stream(
        self,
        timeline: MemoryTimeline,
        place: Pass,
        phase: str,
        rows: Mapping[str, int],
        kept: Set[str],
        skipped: Set[Op] = frozenset(),
    ) -> None:
        """Run a pass in chunks; its arrays (of so many `rows`), sums and what is kept stay held, all else is gone."""
        program, made = place.program, set[str]()
        owner, names = program.owner, dict[str, set[str]]()  # of what a chunk makes

        @cache
        def of_rows(count: int) -> BoundProgram:
            return program.resized(**{place.token: count})

        def take(name: str, value: Value, count: int, kind: str = "temporaries") -> None:
            taken = of_rows(count).bytes(value, self.itemsize)
            timeline.step(phase, value.name, (taken,))
            if name in made:  # the name is bound anew: what it was is gone
                timeline.free(name)
            timeline.hold(name, taken, kind)
            timeline.done()
            made.add(name)

        def release(dead: Sequence[str]) -> None:
            for name in dead:
                storage = owner[name] + PART
                if storage in names:
                    names[storage].discard(name)
                    if not names[storage]:
                        del names[storage]
                        made.discard(storage)
                        timeline.free(storage)
            timeline.done()

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
                    timeline.step(phase, op.out.name, (program.bytes(op.out, self.itemsize),))
                    timeline.done()
                release(place.released.get(op.out.name, ()))
            release(place.ends)
        for op in place.after:
            if not is_view(op) and op not in skipped:
                take(op.out.name, op.out, self.most)
                made.discard(op.out.name)
        for name in made:
            timeline.free(name)
        timeline.done()

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

    # ---- backward --------------------------------------------------------------------------------------------

    def _backward(self, walk: Backward) -> None:
        """Run the function's backward; its inputs get their gradients."""
        timeline, adjoint = walk.timeline, self.adjoint
        seed = walk.gradients.pop(self.program.output.name)
        gradients = list(self._gradients(walk))
        for name in self._kept_storages:
            timeline.free(name)
        self._release(walk)
        walk.release(seed)
        timeline.done()
        walk.hand_on(adjoint.ops[-1].out.name, gradients)
        later = {v.name for op in self.before for v in operands(op)}
        for v in adjoint.inputs:
            if v.name in walk.gradients and v in self.program.leaves and v.name not in later:
                walk.accumulate(v)

    def _release(self, walk: Backward) -> None:
        """Values made before the function that nothing but the function had saved."""
        made = {op.out.name for op in self.before}
        others = {
            self.owner[v.name]
            for op in self.before
            for v in saved_values(op, self.program.sizes, self.tensors.requires_grad)
        }
        for name in {self.owner[v.name] for v in self.adjoint.saved} & made - others:
            walk.timeline.free(name)

    def _gradients(self, walk: Backward) -> Iterator[tuple[Value, Gradient]]:
        """Run the backward pass; the gradients of the inputs that need one, in order."""
        timeline, adjoint = walk.timeline, self.adjoint
        skipped = {op for op, name in adjoint.only_for.items() if name not in self.tensors.requires_grad}
        wanted = [v for v in adjoint.inputs if v.name in adjoint.wanted and self.tensors.needs(v)]
        program = released_backward(adjoint) if self.chunk is None else as_bound(adjoint.backward_program)
        owner = program.owner
        storages = {v.name: owner[adjoint.wanted[v.name].name] for v in wanted}
        if self.chunk is None:
            run_ops(TensorBytes(program, self.itemsize), program.ops, timeline, "backward", skipped=skipped)
        else:
            place = self._passes[1]
            rows = {v.name: self.tokens for v in place.arrays}
            storages |= {name: adjoint.wanted[name].name for name in storages if adjoint.wanted[name].name in rows}
            self._stream(timeline, place, "backward", rows, frozenset(), skipped)
        leave(timeline, program.ops, set(storages.values()))
        names: dict[str, str] = {}
        for v in wanted:
            storage = storages[v.name]
            if storage == adjoint.seed.name:
                names[storage] = SEED
                walk.holders[SEED] += 1
            elif storage in names:
                walk.holders[names[storage]] += 1
            else:
                names[storage] = f"∂{v.name} {len(timeline.steps)}"
                timeline.rename(storage, names[storage])
                walk.holders[names[storage]] = 1
            yield v, Gradient(names[storage], v.indices if _is_whole(program, adjoint.wanted[v.name].name) else None)


def _of_chunk(name: str, number: int) -> str:
    """The name of a value's part that one chunk keeps."""
    return f"{name} of chunk {number + 1}"


def _is_whole(program: BoundProgram, name: str) -> bool:
    """False if a value is a view that leaves out entries of the rows whose memory it is."""
    made = {op.out.name: op for op in program.ops}
    while name in made and is_view(op := made[name]):
        if isinstance(op, Merge) and op.padded and op.out.indices[0] != op.index:
            return False
        name = operands(op)[0].name
    return True
