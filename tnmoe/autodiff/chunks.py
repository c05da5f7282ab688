"""Where the values of a function lie that takes its tokens in chunks: arrays, rooms and sums.

What a chunk needs for a while lies in rooms that all chunks share, and what stays of it (the result, what is kept, the
gradients of the inputs) in arrays over all tokens; gradients of weights are summed up. Where products do not write
their result where they are told to, what is kept stays a tensor of each chunk, for an array would be a copy; and what
a chunk makes besides is released after its last use, so that the next product may take its memory, which is in the
cache. The emitter writes what is decided here, and the memory report counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.ir.aliases import is_view
from tnmoe.ir.bound import BoundProgram, as_bound
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Multiply, Reduce, matmul_groups
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import Gelu, GeluBackward
from tnmoe.ir.value import Value

ELEMENTWISE = (Multiply, Add, Gelu, GeluBackward)
"""Ops that may write their result over an operand of the same axes."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The forward or the backward pass of a streamed function.

    Attributes:
        program: whose ops they are.
        token: the index along which tokens are chunked.
        once: ops that run before the chunks.
        ops: ops of each chunk.
        after: ops on sums over all chunks.
        arrays: results of `ops` that get an array over all tokens.
        listed: results of `ops` that are kept as they are, one tensor for each chunk.
        placing: whether products write their result where they are told to; oneDNN's do not.
        rooms: the room of each other result that is written where it is told to be.
        shapes: the axes of each room.
        released: names that a chunk releases after an op, by the name of its result.
        ends: names that it releases at its end, when what is kept is noted.
    """

    program: BoundProgram
    token: str
    once: tuple[Op, ...]
    ops: tuple[Op, ...]
    after: tuple[Op, ...]
    arrays: tuple[Value, ...]
    listed: tuple[Value, ...]
    placing: bool
    rooms: Mapping[str, int]
    shapes: tuple[tuple[str, ...], ...]
    released: Mapping[str, tuple[str, ...]]
    ends: tuple[str, ...]

    @property
    def sums(self) -> tuple[Value, ...]:
        """Results of `ops` that have no tokens: each chunk adds to them."""
        return tuple(op.out for op in self.ops if self.token not in op.out.indices)

    def placed(self, op: Op) -> bool:
        """Whether the op writes its result into an array or a room."""
        return op.out not in self.listed and _placed(op, self.token, self.placing)

    def added_in_place(self, op: Op) -> bool:
        """Whether the product of a chunk is added to its sum as it is made."""
        if not self.placing or not isinstance(op, Contract):
            return False
        g = matmul_groups(op)
        return not g.batch and not g.outer


def kept_values(a: Adjoint) -> tuple[Value, ...]:
    """Results with tokens that the function keeps for its backward pass."""
    return tuple(op.out for op in a.ops if op.out.name in a.kept and op.out in a.saved and a.token in op.out.indices)


def listed_values(a: Adjoint, *, placing: bool) -> tuple[Value, ...]:
    """Those of them that are kept as one tensor for each chunk."""
    return () if placing else kept_values(a)


def forward_pass(a: Adjoint, *, placing: bool) -> Pass:
    """The forward pass; its arrays are the result and, if products can write there, what is kept."""
    program, ops, token = as_bound(a.executed), a.forward, a.token
    kept, listed = kept_values(a), listed_values(a, placing=placing)
    arrays = (program.output, *(v for v in kept if v not in listed))
    once = tuple(op for op in ops if token not in op.out.indices)
    chunk = tuple(op for op in ops if token in op.out.indices)
    rooms, shapes = _furnish(program, token, chunk, {v.name for v in (*arrays, *listed)}, placing)
    released, ends = _released(program, token, chunk, listed, placing)
    return Pass(program, token, once, chunk, (), arrays, listed, placing, rooms, shapes, released, ends)


def backward_pass(a: Adjoint, *, placing: bool) -> Pass:
    """The backward pass; its arrays are the gradients of what has tokens."""
    program, token = as_bound(a.backward_program), a.token
    made = {op.out.name for op in program.ops}
    wanted = {a.wanted[v.name].name: a.wanted[v.name] for v in a.inputs if v.name in a.wanted}
    arrays = tuple(v for v in wanted.values() if token in v.indices and v.name in made)
    chunk = tuple(op for op in program.ops if any(token in v.indices for v in (op.out, *operands(op))))
    late = {op.out.name for op in chunk if token not in op.out.indices}
    once: list[Op] = []
    after: list[Op] = []
    for op in program.ops:
        if op not in chunk:
            waits = any(v.name in late for v in operands(op))
            (after if waits else once).append(op)
            late |= {op.out.name} if waits else set()
    rooms, shapes = _furnish(program, token, chunk, {v.name for v in arrays}, placing)
    released, ends = _released(program, token, chunk, (), placing)
    return Pass(program, token, tuple(once), chunk, tuple(after), arrays, (), placing, rooms, shapes, released, ends)


def _placed(op: Op, token: str, placing: bool) -> bool:
    if op.out.indices[:1] != (token,):
        return False
    if isinstance(op, Contract | ContractAdd):
        return placing and (isinstance(op, ContractAdd) or len(matmul_groups(op).batch) < 2)
    return isinstance(op, (Reduce, *ELEMENTWISE))


def _released(
    program: BoundProgram, token: str, ops: Sequence[Op], listed: Sequence[Value], placing: bool
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The names of tensors that a chunk makes: by the op that reads each last, and those of what is kept."""
    owner = program.owner
    own = {op.out.name for op in ops if token in op.out.indices and not is_view(op) and not _placed(op, token, placing)}
    kept = {v.name for v in listed}
    names = {op.out.name for op in ops if owner[op.out.name] in own}
    last = {v.name: op for op in ops for v in (*operands(op), op.out) if v.name in names}
    released: dict[str, tuple[str, ...]] = {}
    for name, op in last.items():
        if owner[name] not in kept:
            released[op.out.name] = (*released.get(op.out.name, ()), name)
    return released, tuple(name for name in last if owner[name] in kept)


def _furnish(
    program: BoundProgram, token: str, ops: Sequence[Op], elsewhere: Iterable[str], placing: bool
) -> tuple[dict[str, int], tuple[tuple[str, ...], ...]]:
    """A room for every placed result that lies nowhere else; values that never live together share one."""
    owner = program.owner
    last = {owner[v.name]: k for k, op in enumerate(ops) for v in (op.out, *operands(op))}
    elsewhere = frozenset(elsewhere)
    rooms: dict[str, int] = {}
    shapes: list[tuple[str, ...]] = []
    free: list[int] = []
    held: dict[str, int] = {}

    def lengths(indices: Sequence[str]) -> list[object]:
        """An axis whose size only the data knows is as long as itself alone."""
        return [i if i in program.dynamic else program.sizes[i] for i in indices]

    for k, op in enumerate(ops):
        name, indices = op.out.name, op.out.indices
        if name in elsewhere or not _placed(op, token, placing):
            continue
        for dead in [n for n in held if last[n] < k]:
            free.append(held.pop(dead))
        if isinstance(op, ELEMENTWISE):
            own = {v.name for v in operands(op) if v.indices == indices}
            over = next((n for n in held if n in own and last[n] == k), None)
            if over is not None:
                free.append(held.pop(over))
        number = next((r for r in reversed(free) if lengths(shapes[r]) == lengths(indices)), None)
        if number is None:
            number = len(shapes)
            shapes.append(indices)
        else:
            free.remove(number)
        rooms[name] = held[name] = number
    return rooms, tuple(shapes)
