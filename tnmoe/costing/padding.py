"""Work on the zeros of padded axes: what a program would cost if an index split in two had no surplus entries.

Where a step has both parts of a padded index, some of their combinations stand for no entry: the surplus. Where it has
one part alone, each of that part's entries is needed. So what a step computes shrinks by size / Π parts of each index
whose parts it has in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import sympy

from tnmoe.costing.cost import Cost
from tnmoe.costing.op_cost import Estimate, estimate
from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.symbolic.dims import Dim

Splits = Mapping[tuple[str, ...], str]
"""The index that some parts make up, of those that are padded."""


def padded_splits(program: Program) -> Splits:
    """The padded indices of a program, by their parts."""
    return {op.parts: op.index for op in program.ops if isinstance(op, Split | Merge) and op.padded}


def trimmed(program: Program) -> Estimate:
    """The cost of a program without what it computes on surplus entries; formulas or integers, as `estimate` gives."""
    splits, full = padded_splits(program), estimate(program)
    per_op = tuple(_trim(op, cost, program, splits) for op, cost in zip(program.ops, full.per_op, strict=True))
    return replace(full, per_op=per_op, total=sum(per_op, start=Cost()))


def _trim(op: Op, cost: Cost, program: Program, splits: Splits) -> Cost:
    read = {i for v in operands(op) for i in v.indices}
    written = {i for v in results(op) for i in v.indices}
    everything = read | written

    def cut(amount: Dim, indices: Iterable[str]) -> Dim:
        present = set(indices)
        for parts, index in splits.items():
            if present.issuperset(parts):
                amount = _over(amount * program.sizes[index], [program.sizes[p] for p in parts])
        return amount

    # What a contraction adds is its bias, one entry of the result each; all else runs over everything it has.
    added = written if cost.matmul_flops else everything
    return Cost(
        cut(cost.macs, everything),
        cut(cost.matmul_flops, everything),
        cut(cost.elementwise_flops, added),
        cut(cost.special_flops, everything),
        cut(cost.activations, written),
    )


def _over(amount: Dim, sizes: Iterable[Dim]) -> Dim:
    """The quotient, which is an integer: `amount` has all of these sizes as factors."""
    for size in sizes:
        if isinstance(amount, int) and isinstance(size, int):
            amount //= size
        else:
            amount = cast(Dim, sympy.sympify(amount) / size)
    return amount
