"""Choose how weights lie in memory where a matrix product may read them either way: (inner, columns) or turned.

A product of few rows is bound by how fast it reads the weight, which is best along the longer side. So
`longer_side_last` is the rule where nobody has said or measured better; see docs/decisions/weights-orientation.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tnmoe.errors import PlanError, unknown
from tnmoe.ir.contractions import Contract, ContractAdd, matmul_groups
from tnmoe.ir.ops import operands, rename
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value

LEAST = 1 << 18
"""Elements below which a weight is left as it is: it fits into the cache of a core."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight that one product reads as its right operand: the indices that are summed, and those of the columns."""

    value: Value
    inner: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def turned(self) -> Value:
        """The weight stored (columns, inner)."""
        return replace(self.value, indices=(*self.columns, *self.inner))


def turnable(program: Program) -> dict[str, Stored]:
    """The weights that a program, laid out, could as well read in the other order, by name.

    Each is the right operand of one product that is neither batched nor broadcast, and used nowhere else.
    """
    uses = Counter(v.name for op in program.ops for v in operands(op))
    uses[program.output.name] += 1
    stored = {p.name for p in program.parameters if uses[p.name] == 1}
    weights: dict[str, Stored] = {}
    for op in program.ops:
        if isinstance(op, Contract | ContractAdd) and op.rhs.name in stored:
            groups = matmul_groups(op)
            if not groups.batch and not groups.outer:
                weights[op.rhs.name] = Stored(op.rhs, groups.inner, groups.cols)
    return weights


def longer_side_last(weight: Stored, sizes: Mapping[str, int]) -> bool:
    """Whether a weight is large, and its inner side is longer than the columns, so that it is best turned."""
    inner, columns = (math.prod([sizes[i] for i in side]) for side in (weight.inner, weight.columns))
    return inner > columns and inner * columns >= LEAST


def orient(program: Program, sizes: Mapping[str, int], turned: Collection[str] | None = None) -> Program:
    """The program, laid out, with some weights (columns, inner) and the others (inner, columns).

    Args:
        program: as `assign_layouts` returns it: right operands are (inner, columns) or (columns, inner).
        sizes: an integer for every index of a weight.
        turned: names of the weights that are (columns, inner), of `turnable`; None leaves the choice to
            `longer_side_last`, which leaves the others as they are.
    """
    change: dict[str, Value] = {}
    for name, weight in turnable(program).items():
        if longer_side_last(weight, sizes) if turned is None else name in turned:
            change[name] = weight.turned
        elif turned is not None:
            change[name] = replace(weight.value, indices=(*weight.inner, *weight.columns))
    parameters = tuple(
        replace(p, indices=change[p.name].indices) if p.name in change else p for p in program.parameters
    )
    return replace(program, parameters=parameters, ops=tuple(rename(op, change) for op in program.ops))


LAYOUTS = ("auto", "rows", "columns")
"""By the weights' sizes; all (inner, columns); all (columns, inner)."""

Layout = str | Collection[str]
"""One of `LAYOUTS`, or the names of the weights that are stored (columns, inner)."""


def resolve(layout: Layout, turnable: Sequence[str]) -> tuple[str, ...] | None:
    """Names of the weights stored (columns, inner), in the order of `turnable`; None for "auto".

    Raises:
        PlanError: another text, or a name that is none of `turnable`.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise PlanError(f"{unknown('layout', layout, LAYOUTS)}; or names of weights, as a list")
        return {"auto": None, "rows": (), "columns": tuple(turnable)}[layout]
    if not isinstance(layout, Collection) or not all(isinstance(name, str) for name in layout):
        raise PlanError(f"layout must be one of {', '.join(LAYOUTS)}, or names of weights; got {layout!r}")
    for name in layout:
        if name not in turnable:
            raise PlanError(
                f"{unknown('weight', name, turnable)}; the others are no right operand of just one matrix product, "
                "so how they are stored follows from the order of contraction"
            )
    return tuple(name for name in turnable if name in layout)
