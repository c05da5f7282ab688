"""A shortlist: the orders that a plan was chosen among by what prices of single steps do not see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from tnmoe.io.json_fields import Field

TOLERANCE = Fraction(1, 100)
"""How many more FLOPs than the fewest an order may take to be chosen by its layout."""


Criterion = Literal["time", "layout"]
"""What chooses from a shortlist: predicted time, or how much is copied."""

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


@dataclass(frozen=True, slots=True)
class CandidateFigures:
    """What a candidate was judged by.

    Attributes:
        orders: of each network, by the name of the value that it defines, as text.
        flops: of one forward pass of the layer.
        copied: elements that are copied into another order of axes.
        seconds: predicted for one forward pass; None without a device profile.
        lowering: the program that it is an order of, where the declaration leaves several to choose from.
    """

    orders: Mapping[str, str]
    flops: int
    copied: int
    seconds: float | None = None
    lowering: str = ""

    @classmethod
    def read(cls, data: Field) -> CandidateFigures:
        """What `Shortlist.to_mapping` wrote of a candidate."""
        fields = data.keys("orders", "flops", "copied", "seconds", optional=("lowering",))
        return cls(
            {name: order.text() for name, order in fields["orders"].entries().items()},
            fields["flops"].integer(0),
            fields["copied"].integer(0),
            fields["seconds"].maybe(lambda seconds: seconds.number(zero=True)),
            fields["lowering"].maybe(Field.text) or "",
        )


@dataclass(frozen=True, slots=True)
class Shortlist:
    """What was considered, the fewest FLOPs first, and what was chosen.

    Attributes:
        by: what chose.
        considered: the candidates.
        chosen: place of the chosen one.
        complete: True if every order was considered that may be chosen.
        source: of the predicted times: device, versions and dtype.
    """

    by: Criterion
    considered: tuple[CandidateFigures, ...]
    chosen: int
    complete: bool = False
    source: str = ""

    @property
    def summary(self) -> str:
        """How the choice was made, in a few words."""
        count = len(self.considered)
        if self.by == "time":
            programs = self.lowerings
            each = f" in each of {len(programs)} lowerings ({', '.join(programs)})" if len(programs) > 1 else ""
            among = f"{count} order(s), the cheapest by FLOPs and by traffic{each}"
            return f"the least predicted time of {among}; a model, no proof"

        reach, percent = "all" if self.complete else "the", f"{float(100 * TOLERANCE):g} %"
        return f"the fewest copied elements of {reach} {count} order(s) within {percent} of the fewest FLOPs"

    @property
    def lowerings(self) -> tuple[str, ...]:
        """The programs that were compared; one without a name if the declaration leaves no choice."""
        return tuple(dict.fromkeys(c.lowering for c in self.considered))

    def notes(self) -> tuple[str, ...]:
        """Lines for the criterion of each candidate, one for each lowering, and the source of predictions."""
        figures = [f"{c.copied:,}" if c.seconds is None else f"{1e6 * c.seconds:,.1f}" for c in self.considered]
        figures[self.chosen] += " (chosen)"
        what = "Predicted µs" if self.by == "time" else "Copied elements"
        shown = {
            name: ", ".join(f for f, c in zip(figures, self.considered, strict=True) if c.lowering == name)
            for name in self.lowerings
        }
        lines = tuple(
            f"{what}{f' of the {name} form' if name else ''}, the fewest FLOPs first: {text}."
            for name, text in shown.items()
        )
        return (*lines, f"Profile: {self.source}.") if self.source else lines

    def to_mapping(self) -> dict[str, Any]:
        """The shortlist as plain data."""
        considered = [
            {"orders": dict(c.orders), "flops": c.flops, "copied": c.copied, "seconds": c.seconds}
            | ({"lowering": c.lowering} if c.lowering else {})
            for c in self.considered
        ]
        chosen = {"by": self.by, "considered": considered, "chosen": self.chosen}
        return {**chosen, "complete": self.complete, "source": self.source}

    @classmethod
    def read(cls, data: Field) -> Shortlist:
        """The shortlist that `to_mapping` wrote."""
        fields = data.keys("by", "considered", "chosen", "complete", "source")
        considered = tuple(map(CandidateFigures.read, fields["considered"].items(of="candidates")))
        chosen = fields["chosen"].integer(0, len(considered) - 1)
        return cls(
            fields["by"].choice(CRITERIA), considered, chosen, fields["complete"].flag(), fields["source"].text()
        )
