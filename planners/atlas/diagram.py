"""One-dimensional diagrams: which order is cheapest as a single size grows, exactly.

Every cost is affine in each single size, so the winner changes along the lower envelope of straight lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Line = tuple[int, int]
"""Value at 0 and slope."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one order is cheapest.

    Attributes:
        start, end: of the size, end None if unbounded; at an inner end two orders cost the same.
        place: of the order in the atlas.
        tree: the order as text.
    """

    start: Fraction
    end: Fraction | None
    place: int
    tree: str


@dataclass(frozen=True, slots=True)
class Diagram:
    """The cheapest order over one size, the others fixed."""

    index: str
    segments: tuple[Segment, ...]

    @property
    def breakpoints(self) -> tuple[Fraction, ...]:
        """The sizes at which the winner changes."""
        return tuple(s.start for s in self.segments[1:])

    def __str__(self) -> str:
        if len(self.segments) == 1:
            return f"for every {self.index} within the bounds: {self.segments[0].tree}"
        lines = []
        for k, s in enumerate(self.segments):
            low = "" if k == 0 else f"{_number(s.start)} ≤ "
            high = f" ≤ {_number(s.end)}" if k < len(self.segments) - 1 and s.end is not None else ""
            lines.append(f"{low}{self.index}{high}: {s.tree}")
        return "\n".join(lines)


def lower_envelope(lines: Sequence[Line], low: int, high: int | None) -> list[tuple[Fraction, Fraction | None, int]]:
    """(start, end, place of the lowest line) from `low` to `high`; of equal lines the first is taken."""
    pieces: list[tuple[Fraction, Fraction | None, int]] = []
    x = Fraction(low)
    current = min(range(len(lines)), key=lambda k: (lines[k][0] + lines[k][1] * low, lines[k][1], k))
    while True:
        offset, slope = lines[current]
        # Only a flatter line can come to lie below; the nearest crossing is next, and of several the flattest.
        ahead = [(Fraction(a - offset, slope - b), b, k) for k, (a, b) in enumerate(lines) if b < slope]
        crossing = min(ahead, default=None)
        if crossing is None or (high is not None and crossing[0] >= high):
            pieces.append((x, None if high is None else Fraction(high), current))
            return pieces
        pieces.append((x, crossing[0], current))
        x, _, current = crossing


def _number(x: Fraction) -> str:
    return str(x) if x.denominator == 1 else f"{float(x):.6g}"
