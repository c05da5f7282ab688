"""The reference semantics: what every op computes, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import sympy

from tnmoe.backends.numpy.arrays import Array
from tnmoe.backends.numpy.contractions import run_contraction
from tnmoe.backends.numpy.pointwise import run_pointwise
from tnmoe.backends.numpy.routing import run_routing
from tnmoe.errors import ProgramError, no_rule
from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.fused_ops import FusedOp, unfused
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.symbolic.dims import Dim


def execute(program: Program, env: Mapping[str, Array], *, training: bool = False) -> dict[str, Array]:
    """Run a program.

    Args:
        program: any verified program; sizes are taken from the arrays (numbers of slots from the program).
        env: an array for every input, parameter and buffer, with axes in the order of its indices.
        training: batch norms use the batch's statistics (running statistics are never updated here).

    Returns:
        Every value by name, the output among them.

    Raises:
        ProgramError: if an array is missing, or two axes of one index differ in size.
    """
    sizes: dict[str, tuple[int, str]] = {}
    values: dict[str, Array] = {}
    for leaf in program.leaves:
        if leaf.name not in env:
            raise ProgramError(f"no array for {leaf.name!r} with axes {leaf.indices}")
        array = np.asarray(env[leaf.name])
        if array.ndim != len(leaf.indices):
            raise ProgramError(f"{leaf.name!r} has {array.ndim} axes, expected {leaf.indices}")
        for index, size in zip(leaf.indices, array.shape, strict=True):
            known, holder = sizes.setdefault(index, (size, leaf.name))
            if size != known:
                raise ProgramError(f"axis {index!r} has size {known} in {holder} but {size} in {leaf.name}")
        values[leaf.name] = array
    declared = _declared(program, {index: size for index, (size, _) in sizes.items()})
    for op in program.ops + program.diagnostics:
        run_op(op, values, declared, training)
    return values


def _declared(program: Program, known: Mapping[str, int]) -> dict[str, Dim]:
    """The size of each index, at the sizes of the arrays."""
    data = {
        s: sympy.Integer(known[i])
        for i, d in program.lengths.items()
        if i in known and isinstance(s := d, sympy.Symbol)
    }
    lengths = {i: sympy.sympify(d).xreplace(data) for i, d in program.lengths.items()}
    whole = {i: int(d) for i, d in lengths.items() if d.is_Integer}
    return {**program.sizes, **whole, **known}


def run_op(op: Op, env: dict[str, Array], declared: Mapping[str, Dim], training: bool) -> None:
    """Add what `op` computes to `env`; `declared` gives the sizes that no operand tells: slots, parts of an axis."""
    if isinstance(op, ContractionOp):
        env[op.out.name] = run_contraction(op, env, declared)
    elif isinstance(op, PointwiseOp):
        env[op.out.name] = run_pointwise(op, env, training=training)
    elif isinstance(op, RoutingOp):
        run_routing(op, env, declared, training)
    elif isinstance(op, FusedOp):
        inside = {v.name: env[v.name] for v in operands(op)}
        for part in unfused(op):
            run_op(part, inside, declared, training)
        env[op.out.name] = inside[op.out.name]
    else:
        no_rule(op, "what it computes")
