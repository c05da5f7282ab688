"""What was measured of the candidates of a layer, and which of them was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tnmoe.io.json_fields import Field
from tnmoe.measuring.variants import Variant
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table

DECISIVE = 0.75
"""Share of the last stage's rounds that a candidate must win against an earlier one to replace it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate.

    Attributes:
        plan: it can be built, and emits what was measured.
        order: number of its order of contraction, the cheapest being 0.
        variant: how that is emitted.
        rounds: numbers of the rounds that it took part in.
        seconds: of one pass, in each of them.
    """

    plan: Plan
    order: int
    variant: Variant
    rounds: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of one pass."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the measurements."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def paired(self, other: Measured, since: int = 0) -> list[tuple[float, float]]:
        """The other's seconds and its own, in each round from the number `since` on that both took part in."""
        theirs = dict(zip(other.rounds, other.seconds, strict=True))
        own = zip(self.rounds, self.seconds, strict=True)
        return [(theirs[r], s) for r, s in own if r >= since and r in theirs]

    def to_mapping(self) -> dict[str, Any]:
        """The measurement as plain data; the plan follows from the order and the variant."""
        v = self.variant
        return {
            "order": self.order,
            "layout": v.layout if isinstance(v.layout, str) else list(v.layout),
            "flavour": v.flavour,
            "chunk": v.chunk,
            "memory": v.memory,
            "rounds": list(self.rounds),
            "seconds": list(self.seconds),
        }

    @classmethod
    def read(cls, data: Field, plans: Sequence[Plan]) -> Measured:
        """What `to_mapping` wrote, of one of the plans.

        Raises:
            PlanError: if it is no such thing, or the variant cannot be made of that plan.
        """
        fields = data.keys("order", "layout", "flavour", "chunk", "memory", "rounds", "seconds")
        layout, order = fields["layout"], fields["order"].integer(0, len(plans) - 1)
        variant = Variant(
            layout.text() if isinstance(layout.value, str) else layout.texts(),
            fields["flavour"].text(),
            fields["chunk"].maybe(lambda tokens: tokens.integer(1)),
            fields["memory"].maybe(lambda kept: kept.text() if isinstance(kept.value, str) else kept.integer(0)),
        )
        rounds = tuple(number.integer() for number in fields["rounds"].items(of="rounds"))
        if not rounds or len(set(rounds)) < len(rounds):
            raise fields["rounds"].fault("a list of different rounds")
        seconds = tuple(time.number() for time in fields["seconds"].items(len(rounds), "seconds"))
        return cls(variant.of(plans[order]), order, variant, rounds, seconds)


def winner(measured: Sequence[Measured], decided: int) -> int:
    """Place of the chosen one: the first, or a later one that beat what was best so far in most of the last rounds.

    Args:
        measured: the first is in every round.
        decided: number of the first round of the last stage.
    """
    best = 0
    for k in range(1, len(measured)):
        both = measured[k].paired(measured[best], decided)
        if both and sum(own < other for other, own in both) >= DECISIVE * len(both):
            best = k
    return best


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` returns.

    Attributes:
        measured: the candidates, in the order in which they were tried: the cheapest order first.
        chosen: place of the winner.
        setting: what was measured, and where.
        cached: True if the figures come from an earlier run.
        notes: how long it went on, and what was left out.
    """

    measured: tuple[Measured, ...]
    chosen: int
    setting: str
    cached: bool = False
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """The winner."""
        return self.measured[self.chosen].plan

    def table(self) -> Table:
        """One row for each candidate: order, layout, flavour, chunk, memory, times in microseconds, ratio, choice."""
        first = self.measured[0]
        numbers = sorted({m.order + 1 for m in self.measured})
        rows: list[tuple[Cell, ...]] = []
        for k, result in enumerate(self.measured):
            v, function = result.variant, result.plan.function
            speed = statistics.median(theirs / own for theirs, own in result.paired(first))
            rows.append(
                (
                    result.order + 1,
                    v.layout if isinstance(v.layout, str) else " ".join(v.layout) or "rows",
                    v.flavour,
                    "all" if v.chunk is None else v.chunk,
                    "autograd" if function is None else "save" if v.memory is None else v.memory,
                    result.plan.flops,
                    len(result.rounds),
                    *(round(1e6 * s, 1) for s in (result.median, *result.quartiles)),
                    round(speed, 3),
                    "chosen" if k == self.chosen else "",
                )
            )
        columns = (
            ("order", "order"),
            ("layout", "layout"),
            ("flavour", "flavour"),
            ("chunk", "chunk"),
            ("memory", "memory"),
            ("flops", "FLOPs"),
            ("rounds", "rounds"),
            ("median", "median µs"),
            ("first_quartile", "25 %"),
            ("third_quartile", "75 %"),
            ("speed", "speed"),
            ("chosen", ""),
        )
        orders = {m.order + 1: m.plan.orders for m in self.measured}
        notes = (
            f"{self.setting}{'; kept from an earlier run' if self.cached else ''}.",
            "In each round all run once, in random order. Speed: median over the rounds of the first row's time / its "
            f"time. One replaces an earlier one if it wins {100 * DECISIVE:g} % of the last stage's rounds.",
            *(f"Order {n}: " + "; ".join(f"{name} = {text}" for name, text in orders[n].items()) for n in numbers),
            *self.notes,
        )
        return Table(f"Candidates of {self.plan.layer.name}, measured", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return str(self.table())
