"""SSA paths of other libraries as pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pairwise(ssa_path: Iterable[Sequence[int]], tensors: int) -> tuple[tuple[int, int], ...]:
    """SSA pairs of an SSA path whose steps may name one operand (a sum, which lowering does by itself) or several.

    Steps of several operands go from left to right; operands left over at the end are multiplied in order.
    """
    name = {k: k for k in range(tensors)}
    steps: list[tuple[int, int]] = []
    for k, group in enumerate(ssa_path):
        current = name.pop(group[0])
        for other in group[1:]:
            steps.append((current, name.pop(other)))
            current = tensors + len(steps) - 1
        name[tensors + k] = current
    rest = sorted(name.values())
    current = rest[0]
    for other in rest[1:]:
        steps.append((current, other))
        current = tensors + len(steps) - 1
    return tuple(steps)
