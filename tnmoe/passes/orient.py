"""Store large weights with their longer side last in memory, where a matrix product may read them either way.

A product of few rows is bound by how fast it reads the weight. MKL does so best along the longer side: measured at one
row, 3072 × 556 is read 1.4 times faster as 556 × 3072, and 556 × 3072 1.8 times faster as it is. From 32 rows on both
orders take the same time within 6 %, and small weights do not care.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from tnmoe.ops import Contract, ContractAdd, Value, matmul_groups, operands, rename
from tnmoe.program import Program

LEAST = 1 << 18
"""Elements below which a weight is left as it is: it fits into the cache of a core."""


def orient(program: Program, sizes: Mapping[str, int]) -> Program:
    """The program, laid out, with weights (columns, inner) where the inner side is longer than the columns.

    Args:
        program: as `assign_layouts` returns it: right operands are (inner, columns) or (columns, inner).
        sizes: an integer for every index of a weight.
    """
    uses = Counter(v.name for op in program.ops for v in operands(op))
    uses[program.output.name] += 1
    stored = {p.name for p in program.parameters if uses[p.name] == 1}
    turned: dict[str, Value] = {}
    for op in program.ops:
        if not isinstance(op, Contract | ContractAdd) or op.rhs.name not in stored:
            continue
        groups = matmul_groups(op)
        inner, cols = (math.prod([sizes[i] for i in side]) for side in (groups.inner, groups.cols))
        if not groups.batch and inner > cols and inner * cols >= LEAST:
            turned[op.rhs.name] = replace(op.rhs, indices=(*groups.cols, *groups.inner))
    parameters = tuple(
        replace(p, indices=turned[p.name].indices) if p.name in turned else p for p in program.parameters
    )
    return replace(program, parameters=parameters, ops=tuple(rename(op, turned) for op in program.ops))
