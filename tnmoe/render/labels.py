"""Where the labels of a diagram go, so that they hide no node, no line and no other label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnmoe.render.placement import Array
from tnmoe.render.scene import Item, Shape, Text

Stroke = tuple[Array, Array]
Box = tuple[float, float, float, float]


def box(item: Item) -> Box:
    """Left, top, right and bottom."""
    if isinstance(item, Shape):
        return item.x - item.radius, item.y - item.radius, item.x + item.radius, item.y + item.radius
    if isinstance(item, Text):
        left = item.x - item.width * {"start": 0.0, "middle": 0.5, "end": 1.0}[item.anchor]
        return left, item.y - 0.6 * item.size, left + item.width, item.y + 0.6 * item.size
    return min(item.x1, item.x2), min(item.y1, item.y2), max(item.x1, item.x2), max(item.y1, item.y2)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _struck(area: Box, strokes: Sequence[Stroke]) -> float:
    """How much of all lines runs behind the area, by samples."""
    share = 0.0
    steps = np.linspace(0.0, 1.0, 41)[:, None]
    for a, b in strokes:
        x, y = (a + steps * (b - a)).T
        share += float(np.mean((x > area[0]) & (x < area[2]) & (y > area[1]) & (y < area[3]))) * 4000
    return share


def _best(choices: Sequence[Text], taken: list[Box], strokes: Sequence[Stroke] = ()) -> Text:
    """The choice that hides least; earlier ones win ties. Its box is taken from then on."""
    cost = [sum(_overlap(box(t), other) for other in taken) + _struck(box(t), strokes) for t in choices]
    text = choices[cost.index(min(cost))]
    taken.append(box(text))
    return text


def _text(point: Array, text: str, size: float, *, bold: bool = False) -> Text:
    return Text(float(point[0]), float(point[1]), text, size, bold=bold)


def on_edge(a: Array, b: Array, text: str, taken: list[Box], strokes: Sequence[Stroke]) -> Text:
    """Beside the line from a to b, near its middle."""
    across = np.array([-(b - a)[1], (b - a)[0]]) / max(1e-9, float(np.linalg.norm(b - a)))
    half = Text(0, 0, text, 12).width / 2
    reach = 10 + abs(across[0]) * half
    choices = [
        _text(a + share * (b - a) + side * reach * across, text, 12)
        for share in (0.5, 0.42, 0.58, 0.34, 0.66)
        for side in (-1, 1)
    ]
    return _best(choices, taken, strokes)


def beside_tip(inner: Array, tip: Array, text: str, taken: list[Box]) -> Text:
    """Beyond the open end of a line, in bold."""
    along = (tip - inner) / max(1e-9, float(np.linalg.norm(tip - inner)))
    half = Text(0, 0, text, 13, bold=True).width / 2
    reach = 8 + abs(along[0]) * half
    return _best([_text(tip + (reach + more) * along, text, 13, bold=True) for more in (0, 4, 8)], taken)


def around(point: Array, clear: float, text: str, size: float, taken: list[Box], strokes: Sequence[Stroke]) -> Text:
    """Beside a node of radius `clear`; below it if nothing speaks against that."""
    half = Text(0, 0, text, size).width / 2
    turns = np.pi / 2 + np.linspace(0, 2 * np.pi, 16, endpoint=False)
    choices = [
        Text(
            point[0] + np.cos(t) * (clear + 6 + more + half * abs(np.cos(t))),
            point[1] + np.sin(t) * (clear + 4 + more + 0.6 * size),
            text,
            size,
        )
        for more in (0, 6)
        for t in turns
    ]
    return _best(choices, taken, strokes)
