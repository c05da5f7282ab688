"""Timing side by side, in stages: rounds in which all candidates take turns, after which the clearly slower ones leave.

A shared machine is noisy, so no candidate is timed on its own: in each round all run once, in random order, and they
are compared by the ratios within rounds. The first candidate runs in every round, so that all ratios are over the same.
See docs/decisions/racing.md.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tnmoe.measuring.timer import Clock, Timer, passes_for, turns, wall_clock

LEAST = 1e-3
"""Seconds that one measurement takes at least: what is faster is run several times."""

MARGINS = (2.0, 1.25, 1.05)
"""After the first, second, and each later round: who was slower than the leader in all rounds of the stage, and by more
than this factor in the median, leaves."""


WALL = Timer()
"""Of a CPU, by the clock on the wall."""


@dataclass(slots=True, eq=False)
class Runner:
    """A candidate under way.

    Attributes:
        run: one pass; it ran before, so that it finds its memory allocated.
        timer: of the device that it runs on.
        repeats: passes in one measurement; 0 before the first.
        seconds: of one pass, by the number of the round.
    """

    run: Callable[[], object]
    timer: Timer = WALL
    repeats: int = 0
    seconds: dict[int, float] = field(default_factory=dict)

    def ratios(self, other: Runner, since: int = 0) -> list[float]:
        """Seconds of the other over its own, in each round that both ran, from the number `since` on."""
        return [other.seconds[r] / own for r, own in self.seconds.items() if r >= since and r in other.seconds]


@dataclass(slots=True)
class Race:
    """Rounds within a budget.

    Attributes:
        budget: seconds for all stages together; None for no limit.
        progress: told how many rounds are done, and how many there are at most; None where nobody watches.
        most: rounds of all stages together, at most.
        clock: by which the budget is spent.
    """

    budget: float | None = None
    progress: Callable[[float, float], None] | None = None
    most: int = 1
    round: int = 0
    clock: Clock = wall_clock
    begin: float = field(init=False)
    order: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.begin = self.clock()

    def over(self, share: float) -> bool:
        """Whether that share of the budget is spent."""
        return self.budget is not None and self.clock() - self.begin >= share * self.budget

    def stage(self, runners: Sequence[Runner], rounds: int, *, keep: int | None, share: float) -> list[Runner]:
        """Run some rounds, at least one. Returns those that are left, in their order, the first always among them.

        Args:
            runners: the first of all candidates, then the others.
            rounds: at most so many.
            keep: how many are left besides the first, the fastest; None keeps all, and nobody leaves on the way.
            share: of the whole budget, at which the stage ends early.
        """
        first, *others = runners
        since = self.round
        for count in range(rounds):
            if count and self.over(share):
                break
            for _, runner in turns([first, *others], 1, self.order):
                runner.seconds[self.round] = seconds(runner)
            self.round += 1
            if self.progress is not None:
                self.progress(self.round, max(self.most, self.round))
            if keep is not None:
                others = _in_reach(first, others, since, MARGINS[min(count, len(MARGINS) - 1)])
        if keep is not None:
            fastest = sorted(others, key=lambda r: -statistics.median(r.ratios(first, since)))[:keep]
            others = [r for r in others if r in fastest]
        return [first, *others]


def _in_reach(first: Runner, others: Sequence[Runner], since: int, margin: float) -> list[Runner]:
    """Those that the leader does not clearly beat."""
    leader = max([first, *others], key=lambda r: statistics.median(r.ratios(first, since)))
    lost = {id(r): r.ratios(leader, since) for r in others if r is not leader}  # below 1 where the leader was faster
    return [r for r in others if r is leader or max(lost[id(r)]) >= 1 or statistics.median(lost[id(r)]) * margin >= 1]


def seconds(runner: Runner) -> float:
    """Seconds of one pass, now; the first time also how many passes a measurement takes."""
    timer = runner.timer
    if not runner.repeats:
        once = timer.passes(runner.run)
        runner.repeats = passes_for(once, LEAST)
        if runner.repeats == 1:
            return once
    return timer.passes(runner.run, runner.repeats)
