"""Tensor networks as diagrams: tensors are nodes, indices are lines, an index of three or more ends is a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tnmoe.render.labels import around, beside_tip, box, on_edge
from tnmoe.render.placement import place
from tnmoe.render.scene import INK, Item, Line, Scene, Shape, ShapeKind, Text

UNIT = 92.0  # pixels between two joined tensors
MARGIN = 26.0
INSIDE = 4  # letters of a name that fit into a node

# Told apart in grey by shape and by lightness.
LOOKS: dict[str, tuple[ShapeKind, str, str]] = {
    "data": ("circle", "#F3C969", INK),
    "weight": ("square", "#2E6FA7", "white"),
    "frozen": ("diamond", "#C9CCD1", INK),
}
LEGEND = {"data": "data", "weight": "weight", "frozen": "frozen weight"}


@dataclass(frozen=True, slots=True)
class Node:
    """A tensor: its name, the names of its axes, and its role ("data", "weight" or "frozen")."""

    name: str
    indices: tuple[str, ...]
    role: str


def network_graph(
    nodes: Sequence[Node], output: Sequence[str], sizes: Mapping[str, object] | None = None, title: str = ""
) -> Scene:
    """The diagram of a tensor network.

    Args:
        nodes: the tensors.
        output: indices that remain; each ends in an open line with its name in bold.
        sizes: shown with the indices, where given.
        title: for screen readers.
    """
    sizes = sizes or {}
    ends: dict[str, list[int]] = {}
    for k, node in enumerate(nodes):
        for index in node.indices:
            ends.setdefault(index, []).append(k)
    points = len(nodes)  # tensors first, then dots and open ends
    edges: list[tuple[int, int, float]] = []
    labels: dict[tuple[int, int], list[str]] = {}
    dots: dict[int, str] = {}
    tips: dict[int, str] = {}

    for index, holders in ends.items():
        kept = index in output
        if len(holders) == 2 and not kept:
            pair = (holders[0], holders[1])
            if pair not in labels:
                edges.append((*pair, 1.0))
            labels.setdefault(pair, []).append(index)
            continue
        start = holders[0]
        if len(holders) > 1 or not kept:  # a hyperedge, or an index summed within one tensor
            start, points = points, points + 1
            dots[start] = index
            edges += [(holder, start, 0.62) for holder in holders]
        if kept:
            edges.append((start, points, 0.55 if start in dots else 0.75))
            tips[points] = index
            points += 1

    outside = any(len(node.name) > INSIDE for node in nodes)
    where = place(points, edges) * UNIT * (1.35 if outside else 1.0)
    at = [(float(x), float(y)) for x, y in where]
    radii = [22.0 if node.role == "frozen" else 18.0 for node in nodes]
    items: list[Item] = [Line(*at[a], *at[b], 2.5 if len(labels.get((a, b), ())) > 1 else 1.6) for a, b, _ in edges]
    for k, node in enumerate(nodes):
        kind, fill, ink = LOOKS[node.role]
        items.append(Shape(kind, *at[k], radii[k], fill))
        if len(node.name) <= INSIDE:
            items.append(Text(*at[k], node.name, 13, color=ink, halo=False))
    items += [Shape("circle", *at[d], 3.5, INK) for d in dots]

    def said(names: Sequence[str]) -> str:
        return ", ".join(f"{n} = {_short(sizes[n])}" if n in sizes else n for n in names)

    # Labels with the least choice first.
    taken = [box(item) for item in items if not isinstance(item, Line)]
    strokes = [(where[a], where[b]) for a, b, _ in edges]
    for tip, index in tips.items():
        inner = next(a for a, b, _ in edges if b == tip)
        items.append(beside_tip(where[inner], where[tip], said([index]), taken))
    for k, node in enumerate(nodes):
        if len(node.name) > INSIDE:
            items.append(around(where[k], radii[k], node.name, 13, taken, strokes))
    for pair, names in labels.items():
        items.append(on_edge(where[pair[0]], where[pair[1]], said(names), taken, strokes))
    for dot, index in dots.items():
        if index not in tips.values():
            items.append(around(where[dot], 3.5, said([index]), 12, taken, strokes))
    return _framed(items, [n.role for n in nodes], title)


def _short(size: object) -> str:
    return f"{size:,}" if isinstance(size, int) else str(size)


def _framed(items: Sequence[Item], roles: Sequence[str], title: str) -> Scene:
    """Everything moved into the frame, with a legend of the roles that occur."""
    boxes = [box(item) for item in items]
    left, top = min(b[0] for b in boxes) - MARGIN, min(b[1] for b in boxes) - MARGIN
    right, bottom = max(b[2] for b in boxes) + MARGIN, max(b[3] for b in boxes) + MARGIN
    moved = [_moved(item, -left, -top) for item in items]
    x, y = MARGIN, bottom - top + 6
    for role, word in LEGEND.items():
        if role in roles:
            kind, fill, _ = LOOKS[role]
            label = Text(x + 14, y, word, 12, "start")
            moved += [Shape(kind, x, y, 7, fill), label]
            x += 14 + label.width + 24
    return Scene(max(right - left, x), y + 20, tuple(moved), title)


def _moved(item: Item, dx: float, dy: float) -> Item:
    if isinstance(item, Line):
        return Line(item.x1 + dx, item.y1 + dy, item.x2 + dx, item.y2 + dy, item.width, item.color)
    if isinstance(item, Shape):
        return Shape(item.kind, item.x + dx, item.y + dy, item.radius, item.fill, item.stroke)
    return Text(item.x + dx, item.y + dy, item.text, item.size, item.anchor, item.color, item.bold, item.halo)
