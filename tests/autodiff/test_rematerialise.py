"""What to keep and what to repeat, against every choice there is."""

from __future__ import annotations

import itertools
import math

import pytest
from support.modules import SPECS

import tnmoe
from tnmoe.autodiff.adjoint import adjoint
from tnmoe.autodiff.rematerialise import front
from tnmoe.costing.backward import gradient_names
from tnmoe.ir.ops import Op, operands


@pytest.mark.parametrize("name", ["cp_two_levels", "tr_block", "dense_moe"])
def test_front_is_that_of_all_subsets(name: str) -> None:
    """Brute force: for each subset of results kept, what then has to be repeated."""
    plan = tnmoe.plan(SPECS[name], tokens=7)
    a = adjoint(plan.bound, gradient_names(plan.bound, plan.input_gradients))
    sizes = plan.bound.sizes
    reads = {v.name for v in a.reads}
    points = set()
    for bits in itertools.product((False, True), repeat=len(a.ops)):
        kept = {op.out.name for op, bit in zip(a.ops, bits) if bit}
        saved = sum(math.prod(sizes[i] for i in op.out.indices) for op in a.ops if op.out.name in kept)
        points.add((saved, brute_force_flops(a.ops, sizes, reads, kept)))
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert {(c.saved, c.flops) for c in front(a.ops, sizes, reads)} == best


def brute_force_flops(ops: tuple[Op, ...], sizes: dict[str, int], reads: set[str], kept: set[str]) -> int:
    """FLOPs of what has to be repeated, by walking back from each value that is read."""
    makers = {op.out.name: op for op in ops}
    again: set[str] = set()
    todo = [n for n in reads if n in makers and n not in kept]
    while todo:
        name = todo.pop()
        if name not in again:
            again.add(name)
            todo += [v.name for v in operands(makers[name]) if v.name in makers and v.name not in kept]
    total = 0
    for name in again:
        op = makers[name]
        size = math.prod(sizes[i] for i in op.out.indices)
        kind = type(op).__name__
        joint = math.prod(sizes[i] for i in {i for v in operands(op)[:2] for i in v.indices})
        total += {"Contract": 2 * joint, "ContractAdd": 2 * joint + size, "Gelu": 5 * size, "Permute": 0}.get(
            kind, size
        )
    return total
