"""What to keep for the backward pass and what to compute again: the exact front of elements against FLOPs.

Dynamic programming over the values of a straight-line program, from the last to the first. A value that the backward
pass needs is either kept, or computed again from its operands, which it then needs in their turn; one that it does not
need costs nothing. Up to a value, only the set of values needed before it matters, so for each such set the points
that no other one beats suffice (cf. `tnmoe.planners.pareto`, which decides the same jointly with the order).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from tnmoe.costing.op_cost import op_cost
from tnmoe.errors import PlanError
from tnmoe.ir.aliases import is_view
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op, operands

SHARES = {"save": 1 / 200, "recompute": 3 / 20}
"""What may be repeated, as a share of the FLOPs of training: Hadamards and GELU; or a whole product of a block too. See
docs/decisions/recomputation.md."""

Memory = str | int | None
"""`"save"`, `"recompute"`, a budget in bytes, or None: autograd decides."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Elements kept, FLOPs repeated, and names of the results that are kept."""

    saved: int
    flops: int
    kept: frozenset[str]


def front(ops: Sequence[Op], sizes: Mapping[str, int], reads: Set[str]) -> tuple[Choice, ...]:
    """Every choice that no other one beats, from the least kept to the least repeated.

    Args:
        ops: of the forward pass; what they do not define is there anyway.
        sizes: an integer for every index.
        reads: names of the values that the gradients are made from.
    """
    made = frozenset(op.out.name for op in ops)
    states: dict[frozenset[str], list[Choice]] = {frozenset(reads) & made: [Choice(0, 0, frozenset())]}
    for op in reversed(ops):
        name, size, flops = op.out.name, int(elements(op.out.indices, sizes)), int(op_cost(op, sizes).flops)
        needed_by_it = frozenset(v.name for v in operands(op)) & made
        following: dict[frozenset[str], list[Choice]] = {}
        for needed, choices in states.items():
            if name not in needed:
                following.setdefault(needed, []).extend(choices)
                continue
            rest = needed - {name}
            if not is_view(op):  # which has no memory of its own
                following.setdefault(rest, []).extend(Choice(c.saved + size, c.flops, c.kept | {name}) for c in choices)
            following.setdefault(rest | needed_by_it, []).extend(
                Choice(c.saved, c.flops + flops, c.kept) for c in choices
            )
        states = {needed: _minimal(choices) for needed, choices in following.items()}
    (every,) = states.values()  # nothing is needed before the first op
    return tuple(every)


def _minimal(choices: Sequence[Choice]) -> list[Choice]:
    minimal: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.saved, c.flops, sorted(c.kept))):
        if not minimal or c.flops < minimal[-1].flops:
            minimal.append(c)
    return minimal


def check_memory(memory: object) -> Memory:
    """`memory` if it is one of the policies, else a `PlanError`."""
    if memory is None or (isinstance(memory, str) and memory in SHARES):
        return memory
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    raise PlanError(f'memory must be "save", "recompute" or a budget in bytes, got {memory!r}')


def choose(
    choices: Sequence[Choice], memory: str | int, training_flops: int, saved_bytes: Callable[[Choice], int]
) -> Choice:
    """The point of a front that a policy asks for.

    Args:
        choices: as `front` returns them.
        memory: `"save"` and `"recompute"`: the least kept within their share of repeated FLOPs; or the bytes that
            must not be exceeded, with the fewest FLOPs.
        training_flops: of forward and backward, without any repetition.
        saved_bytes: all that is kept for the backward pass under a choice.

    Raises:
        PlanError: if the budget is below the least there is.
    """
    if isinstance(memory, str):
        return next(c for c in choices if c.flops <= SHARES[memory] * training_flops)
    fitting = [c for c in choices if saved_bytes(c) <= memory]
    if not fitting:
        raise PlanError(
            f"memory={memory:,} bytes cannot be met: the least that the backward pass has to keep at these sizes is "
            f"{saved_bytes(choices[0]):,} bytes; plan for fewer tokens or raise the budget"
        )
    return fitting[-1]
