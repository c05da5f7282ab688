"""Every order of a network as a path."""

from __future__ import annotations

import itertools

from tnmoe.ir.path import ContractionPath


def all_trees(n: int) -> list[ContractionPath]:
    """Every binary tree over n leaves once, as a path."""

    def trees(group: tuple[int, ...]) -> list[object]:
        if len(group) == 1:
            return [group[0]]
        first, *rest = group
        found: list[object] = []
        for size in range(len(rest)):
            for chosen in itertools.combinations(rest, size):
                left = (first, *chosen)
                right = tuple(k for k in rest if k not in chosen)
                found += [(a, b) for a in trees(left) for b in trees(right)]
        return found

    def path(tree: object) -> ContractionPath:
        steps: list[tuple[int, int]] = []

        def walk(node: object) -> int:
            if isinstance(node, int):
                return node
            assert isinstance(node, tuple)
            steps.append((walk(node[0]), walk(node[1])))
            return n + len(steps) - 1

        walk(tree)
        return ContractionPath(tuple(steps))

    return [path(t) for t in trees(tuple(range(n)))]
