"""Contraction orders as trees: operands at the left, each product a node whose area is its share of the cost."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.render.scene import Item, Line, Scene, Shape, Text
from tnmoe.render.table import si

ROW, COLUMN = 46.0, 132.0
LARGEST = 17.0


def contraction_tree(
    leaves: Sequence[str],
    steps: Sequence[tuple[int, int]],
    results: Sequence[str],
    costs: Sequence[int],
    unit: str = "FLOPs",
    title: str = "",
) -> Scene:
    """The tree of a path.

    Args:
        leaves: labels of the operands.
        steps: SSA pairs; step k makes operand len(leaves) + k.
        results: label of each step's result, e.g. its indices.
        costs: of each step; a node's area is its share of the sum.
        unit: of the costs.
        title: for screen readers.
    """
    children = {len(leaves) + k: pair for k, pair in enumerate(steps)}
    root = len(leaves) + len(steps) - 1
    order: list[int] = []
    level: dict[int, int] = {}

    def visit(node: int) -> int:
        if node not in children:
            order.append(node)
            level[node] = 0
        else:
            level[node] = 1 + max(visit(child) for child in children[node])
        return level[node]

    visit(root)
    margin = max(Text(0, 0, text).width for text in leaves) + 24
    x = {node: margin + COLUMN * depth for node, depth in level.items()}
    y = {leaf: 30 + ROW * k for k, leaf in enumerate(order)}
    for node, (a, b) in children.items():
        y[node] = (y[a] + y[b]) / 2

    total = max(1, sum(costs))
    lines: list[Item] = []
    shapes: list[Item] = []
    texts: list[Item] = [Text(x[k] - 12, y[k], leaves[k], anchor="end") for k in order]
    shapes += [Shape("circle", x[k], y[k], 4, "white") for k in order]
    right = margin
    for k, (node, pair) in enumerate(children.items()):
        for child in pair:  # a right angle keeps long branches apart
            lines.append(Line(x[child], y[child], x[node], y[child]))
            lines.append(Line(x[node], y[child], x[node], y[node]))
        radius = max(4.0, LARGEST * (costs[k] / total) ** 0.5)
        shapes.append(Shape("circle", x[node], y[node], radius, "#2E6FA7"))
        said = Text(x[node] + radius + 6, y[node] - 9, results[k], 13, "start", bold=True)
        cost = Text(x[node] + radius + 6, y[node] + 8, f"{si(costs[k], unit)} ({costs[k] / total:.0%})", 11, "start")
        texts += [said, cost]
        right = max(right, said.x + said.width, cost.x + cost.width)
    height = 30 + ROW * (len(order) - 1) + 36
    return Scene(right + 16, height, (*lines, *shapes, *texts), title)
