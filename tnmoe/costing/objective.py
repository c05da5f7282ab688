"""What may be minimised: a price, a weighted sum of prices, several criteria in turn, or a figure of a whole program.

Users write it as text, a mapping or a sequence; `as_objective` is the one place that reads it, and everything inside
takes an `Objective`. As text: `"flops"`; `"training + 0.5*saved"`; `"saved, flops"`, where the second decides between
equals of the first; `"inference(83)"`, for 83 calls between two updates of the weights; `"peak"`.
`tnmoe.costing.prices` says what each price costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Literal, cast, get_args

from tnmoe.errors import PlanError, unknown
from tnmoe.symbolic.dims import LARGEST

ForwardPrice = Literal["flops", "macs"]
"""FLOPs or MACs of the forward pass."""

PriceName = Literal["flops", "macs", "traffic", "training", "saved", "inference"]
"""A sum over steps: FLOPs or MACs of the forward pass; elements that its steps read and write; FLOPs of forward and
backward; elements kept for the backward; FLOPs of the forward passes between two updates of the weights, in which what
depends on weights alone is made once."""

WholeFigure = Literal["time", "layout", "peak"]
"""A figure of a whole program, which is no sum over steps: predicted time, or how much is copied, among the orders with
the fewest FLOPs; or the most bytes alive at once in a forward pass without autograd, and between equals FLOPs."""

PRICES: tuple[PriceName, ...] = get_args(PriceName)
WHOLES: tuple[WholeFigure, ...] = get_args(WholeFigure)
NAMES = (*PRICES, *WHOLES)

TIES: Mapping[PriceName, PriceName] = {"saved": "training", "inference": "flops"}
"""What decides between equals where one of these is asked for by itself."""

MOST_CRITERIA = 4
MOST_WEIGHT = 10**24
"""Weights lie between its inverse and this."""

_TERM = re.compile(r"(?:(\d+(?:\.\d+)?(?:e-?\d+)?(?:/\d+)?) ?\* ?)?([a-z]+)(?: ?\( ?(\d+) ?\))?")


@dataclass(frozen=True, slots=True)
class Term:
    """A price with its weight; `calls` (of "inference" alone) is None where weights never change again."""

    name: PriceName
    weight: Fraction = Fraction(1)
    calls: int | None = None

    def __str__(self) -> str:
        name = self.name if self.calls is None else f"{self.name}({self.calls})"
        if self.weight == 1:
            return name
        decimal = repr(float(self.weight))
        exact = self.weight.denominator > 1 and Fraction(decimal) == self.weight
        return f"{decimal if exact else self.weight}*{name}"


@dataclass(frozen=True)
class Objective:
    """What is minimised. `str` gives the text that `as_objective` reads.

    Attributes:
        levels: criteria, the first one deciding; each is a weighted sum of prices.
        whole: the figure of whole programs that is minimised instead; then there are no levels.
    """

    levels: tuple[tuple[Term, ...], ...] = ()
    whole: WholeFigure | None = None

    def __str__(self) -> str:
        return self.whole or ", ".join(" + ".join(map(str, level)) for level in self.levels)

    @cached_property
    def criteria(self) -> tuple[tuple[tuple[Term, int], ...], ...]:
        """The levels with integer weights, what decides between equals included.

        Raises:
            PlanError: if a figure of whole programs is minimised: it has no price of single steps.
        """
        if self.whole is not None:
            raise PlanError(f"{self.whole!r} is no sum over steps, so that no step has a price under it")
        return tuple(_integers(level) for level in self.with_ties.levels)

    @property
    def with_ties(self) -> Objective:
        """The same, with what decides between equals as a criterion of its own."""
        match self.levels:
            case ((Term(name=name, calls=None),),) if name in TIES:
                return Objective((*self.levels, (Term(TIES[name]),)))
        return self

    @cached_property
    def names(self) -> frozenset[PriceName]:
        """Every price that takes part; none in a figure of whole programs."""
        return frozenset(term.name for level in self.with_ties.levels for term in level)

    @cached_property
    def forward(self) -> ForwardPrice | None:
        """The price if it is one of the forward pass and nothing else."""
        if self.levels == FLOPS.levels:
            return "flops"
        return "macs" if self.levels == MACS.levels else None

    @property
    def of_training(self) -> bool:
        """True if it depends on what needs a gradient."""
        return not self.names.isdisjoint(("training", "saved"))

    @property
    def shortlisted(self) -> bool:
        """True if it chooses among the orders with the fewest FLOPs."""
        return self.whole in ("time", "layout")

    @property
    def of_steps(self) -> Objective:
        """What single steps are priced by: FLOPs where whole programs are compared."""
        return self if self.whole is None else FLOPS

    def with_calls(self, calls: object) -> Objective:
        """The objective with so many forward passes between two updates of the weights.

        Raises:
            PlanError: no "inference" takes part, or `calls` is no number of calls.
        """
        if self.whole is not None:
            raise PlanError(_stands_alone(self.whole, self.whole))
        if "inference" not in self.names:
            raise PlanError(f"calls goes with the objective 'inference', not with {str(self)!r}")
        if type(calls) is not int or not 1 <= calls <= LARGEST:
            raise PlanError(f"calls must be an integer from 1 to 2**63 - 1, got {_shown(calls)}")
        return Objective(
            tuple(
                tuple(replace(term, calls=calls) if term.name == "inference" else term for term in level)
                for level in self.levels
            )
        )


def _integers(level: tuple[Term, ...]) -> tuple[tuple[Term, int], ...]:
    """The terms of a criterion with weights in the same proportions, as integers."""
    scale = math.lcm(*(term.weight.denominator for term in level))
    return tuple((term, int(term.weight * scale)) for term in level)


FLOPS = Objective(((Term("flops"),),))
MACS = Objective(((Term("macs"),),))
TRAINING = Objective(((Term("training"),),))
SAVED = Objective(((Term("saved"),),))
INFERENCE = Objective(((Term("inference"),),))
TIME = Objective(whole="time")
LAYOUT = Objective(whole="layout")
PEAK = Objective(whole="peak")

Goal = Objective | str | Mapping[str, float] | Sequence[str | Mapping[str, float]]
"""What a user may give as an objective; see `as_objective`."""


def as_objective(given: object, calls: object = None) -> Objective:
    """The objective that a user means.

    Args:
        given: text; a mapping of names to weights; a sequence of either, the first deciding; or an `Objective`.
        calls: forward passes between two updates of the weights, for "inference"; None if there are no updates.

    Raises:
        PlanError: an unknown name, a weight that is no weight, calls where there are none, or none of these types.
    """
    objective = _read(given)
    for level in objective.levels:
        _distinct([term.name for term in level], given)
    if len(objective.levels) > MOST_CRITERIA:
        raise PlanError(
            f"an objective has up to {MOST_CRITERIA} criteria, {_shown(str(objective))} has {len(objective.levels)}"
        )
    return objective if calls is None else objective.with_calls(calls)


def _read(given: object) -> Objective:
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        return _read_text(given)
    if isinstance(given, Mapping) and given:
        return Objective((tuple(_weighted(name, weight) for name, weight in given.items()),))
    if isinstance(given, Sequence) and not isinstance(given, bytes) and given:
        parts = [_read(part) for part in given if isinstance(part, str | Mapping)]
        if len(parts) != len(given):
            raise PlanError(f"a list of objectives holds names or mappings of names to weights, got {_shown(given)}")
        for part in parts:
            if part.whole is not None:
                raise PlanError(_stands_alone(part.whole, given))
        return Objective(tuple(level for part in parts for level in part.levels))
    raise PlanError(unknown("objective", given, NAMES))


def _read_text(text: str) -> Objective:
    if text in WHOLES:
        return Objective(whole=text)
    return Objective(tuple(tuple(_term(part.strip(), text) for part in level.split("+")) for level in text.split(",")))


def _term(part: str, text: str) -> Term:
    match = _TERM.fullmatch(part)
    name = part if match is None else match[2]
    if name in WHOLES:
        raise PlanError(_stands_alone(name, text))
    if match is None or name not in PRICES:
        raise PlanError(unknown("objective", name if len(name) <= 80 else name[:80] + "…", NAMES))
    calls = None if match[3] is None else int(match[3][:30])
    if calls is not None and name != "inference":
        raise PlanError(f"only 'inference' has a number of calls, got {_shown(text)}")
    if calls is not None and not 1 <= calls <= LARGEST:
        raise PlanError(f"calls must be an integer from 1 to 2**63 - 1, got {_shown(text)}")
    return Term(cast(PriceName, name), _weight(match[1] or "1", text), calls)


def _weighted(name: object, weight: object) -> Term:
    if not isinstance(name, str):
        raise PlanError(unknown("objective", name, PRICES))
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise PlanError(f"the weight of {name!r} must be a number, got {_shown(weight)}")
    return replace(_term(name, name), weight=_weight(str(weight), weight))


def _weight(text: str, where: object) -> Fraction:
    try:
        weight = Fraction(text) if len(text) <= 100 else Fraction(0)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if not Fraction(1, MOST_WEIGHT) <= weight <= MOST_WEIGHT or weight.denominator > MOST_WEIGHT:
        raise PlanError(
            f"a weight must be a number from 1e-24 to 1e24, e.g. 'training + 0.5*saved'; got {_shown(where)}"
        )
    return weight


def _distinct(names: Sequence[str], where: object) -> None:
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise PlanError(f"{twice[0]!r} stands twice in one sum of the objective {_shown(where)}")


def _stands_alone(name: str, where: object) -> str:
    return f"{name!r} is no sum over steps, stands alone and has no calls; got {_shown(where)}"


def _shown(what: object) -> str:
    text = repr(what)
    return text if len(text) <= 80 else text[:80] + "…"


def as_forward(goal: object) -> ForwardPrice:
    """The price of the forward pass that an atlas is asked for, else a `PlanError`."""
    if goal == "flops" or goal == "macs":
        return goal
    raise PlanError(unknown("objective of an atlas", goal, get_args(ForwardPrice)))
