"""Which value is whose memory, and which strides are a view of it: the one alias analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Noise, Select, TopK
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


def is_view(op: Op, *, evaluation: bool = False) -> bool:
    """True if the op writes nothing: its result is its operand's memory.

    In evaluation noise leaves its operand as it is.
    """
    if isinstance(op, Noise):
        return evaluation
    return isinstance(op, Merge | Select) or (isinstance(op, Split) and not op.padded)


def memory_owners(program: Program, *, evaluation: bool = False) -> dict[str, str]:
    """The value whose memory each value is: its own, but for views and what is written over an operand."""
    owner = {v.name: v.name for v in program.leaves}
    for op in program.ops:
        shares = is_view(op, evaluation=evaluation) or op.out.name in program.overwrites
        owner |= {v.name: owner[operands(op)[0].name] if shares else v.name for v in results(op)}
    return owner


def larger_storages(program: Program) -> dict[str, Value]:
    """Results that are views of something larger, which is no value of the program: its shape, by their names."""
    return {
        v.name: Value(v.name, op.x.indices, v.part, v.integer)
        for op in program.ops
        if isinstance(op, TopK) and sorted_in_place(op, program.sizes)
        for v in results(op)
    }


def sorted_in_place(op: TopK, sizes: Mapping[str, Dim]) -> bool:
    """Whether both results of a `TopK` are views of its sort: of one row, or of as many slots as there are entries."""
    return elements(op.x.indices[:-1], sizes) == 1 or sizes[op.out.indices[-1]] == sizes[op.index]


# ---- strides -------------------------------------------------------------------------------------------------


def lies_alike(order: Iterable[str], other: Iterable[str], sizes: Mapping[str, Dim]) -> bool:
    """Whether two orders of axes are the same in memory, where axes of size 1 do not matter."""
    return _lying(order, sizes) == _lying(other, sizes)


def merges(order: Iterable[str] | None, groups: Sequence[Sequence[str]], sizes: Mapping[str, Dim]) -> bool:
    """Whether each group of axes can be viewed as one axis: they must lie one after another.

    Args:
        order: the axes in the order in which they lie in memory, without gaps; None where they do not.
        groups: of axes.
        sizes: of each axis; of those of size 1 the stride does not matter.
    """
    merged = [_lying(group, sizes) for group in groups]
    if order is None:
        return all(len(group) < 2 for group in merged)
    lying = _lying(order, sizes)
    return all(lying[(at := lying.index(group[0])) : at + len(group)] == group for group in merged if group)


def _lying(order: Iterable[str], sizes: Mapping[str, Dim]) -> list[str]:
    """The axes of more than one entry."""
    return [i for i in order if sizes[i] != 1]
