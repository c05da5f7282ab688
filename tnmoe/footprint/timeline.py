"""Bytes alive, storage by storage, and the steps at which that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

CLASSES = ("weights", "inputs", "saved", "temporaries", "gradients")
"""Parameters and buffers; the input; kept for the backward pass; other results and scratch; gradients of weights and
inputs, with that of the result (those of intermediates are temporaries)."""

AllocationTrace = tuple[int, ...]
"""Numbers of bytes in order of time: + what is allocated, - what is freed. Their sum is what stays."""


def most_at_once(trace: AllocationTrace) -> int:
    """The most bytes that a trace holds at once: its largest running sum."""
    return max(accumulate(trace, initial=0))


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a timeline.

    Attributes:
        phase: "inference", "forward" (with autograd) or "backward".
        step: name of the op's result.
        peak: most bytes alive while it runs.
        live: the same by class.
        after: bytes alive when it is done.
    """

    phase: str
    step: str
    peak: int
    live: Mapping[str, int]
    after: int


class MemoryTimeline:
    """Storages by name, and the steps at which they change."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, int]] = {}
        self.live = dict.fromkeys(CLASSES, 0)
        self.steps: list[Step] = []

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.live.values())

    def hold(self, name: str, count: int, kind: str) -> None:
        """Take `count` bytes of a class."""
        self.held[name] = kind, count
        self.live[kind] += count

    def free(self, name: str) -> None:
        """Give back what `hold` took."""
        kind, count = self.held.pop(name)
        self.live[kind] -= count

    def reclassify(self, name: str, kind: str) -> None:
        """Move what `hold` took to another class."""
        was, count = self.held[name]
        self.live[was] -= count
        self.live[kind] += count
        self.held[name] = kind, count

    def rename(self, name: str, new: str) -> None:
        """Call what `hold` took by another name."""
        self.held[new] = self.held.pop(name)

    def step(self, phase: str, name: str, trace: AllocationTrace) -> None:
        """Note what is alive while a trace runs; what stays of it is to be held by the caller."""
        live = self.live | {"temporaries": self.live["temporaries"] + most_at_once(trace)}
        self.steps.append(Step(phase, name, sum(live.values()), live, 0))

    def done(self) -> None:
        """Note what is alive after the last step."""
        last = self.steps[-1]
        self.steps[-1] = Step(last.phase, last.step, last.peak, last.live, self.total)
