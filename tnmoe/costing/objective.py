"""What may be minimised, as text: a price, a weighted sum of prices, or several criteria in turn.

`"flops"`; `"training + 0.5*saved"`; `"saved, flops"`, where the second decides between equals of the first;
`"inference(83)"`, for 83 calls between two updates of the weights. `tnmoe.costing.prices` says what each costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Real

from tnmoe.errors import PlanError, unknown
from tnmoe.symbolic.dims import LARGEST

OBJECTIVES = ("flops", "macs", "traffic", "training", "saved", "inference")
"""FLOPs or MACs of the forward pass; elements that its steps read and write; FLOPs of forward and backward; elements
kept for the backward; FLOPs of the forward passes between two updates of the weights, in which what depends on weights
alone is made once."""

SHORTLISTED = ("time", "layout")
"""What is chosen among the orders with the fewest FLOPs: by predicted time, or by how much is copied."""

PEAK = "peak"
"""The most bytes that are alive at once in a forward pass without autograd; between equals, FLOPs."""

ALONE = (*SHORTLISTED, PEAK)
"""Objectives that are no sum over steps; each stands alone."""

TIES = {"saved": "training", "inference": "flops"}
"""What decides between equals where one of these is asked for by itself."""

MOST_WEIGHT = 10**24
"""Weights lie between its inverse and this."""

_TERM = re.compile(r"(?:(\d+(?:\.\d+)?(?:e-?\d+)?(?:/\d+)?) ?\* ?)?([a-z]+)(?: ?\( ?(\d+) ?\))?")


@dataclass(frozen=True, slots=True)
class Term:
    """One of `OBJECTIVES` with its weight; `calls` (of "inference" alone) is None where weights never change again."""

    name: str
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
    """Criteria, the first one deciding; each is a weighted sum."""

    levels: tuple[tuple[Term, ...], ...]

    def __str__(self) -> str:
        return ", ".join(" + ".join(map(str, level)) for level in self.levels)

    @cached_property
    def criteria(self) -> tuple[tuple[tuple[Term, int], ...], ...]:
        """The levels with integer weights, what decides between equals included."""
        levels = self.levels
        if len(levels) == len(levels[0]) == 1 and levels[0][0].calls is None and levels[0][0].name in TIES:
            levels = (*levels, (Term(TIES[levels[0][0].name]),))
        found = []
        for level in levels:
            scale = math.lcm(*(term.weight.denominator for term in level))
            found.append(tuple((term, int(term.weight * scale)) for term in level))
        return tuple(found)

    @cached_property
    def names(self) -> frozenset[str]:
        """Every price that takes part."""
        return frozenset(term.name for level in self.criteria for term, _ in level)

    @property
    def of_training(self) -> bool:
        """True if it depends on what needs a gradient."""
        return not self.names.isdisjoint(("training", "saved"))


@lru_cache(maxsize=256)
def parse(text: str) -> Objective:
    """The objective that a text means.

    Raises:
        PlanError: an unknown name, a weight that is no weight, or calls where there are none.
    """
    levels = [[_term(part.strip(), text) for part in level.split("+")] for level in text.split(",")]
    for level in levels:
        _distinct([term.name for term in level], text)
    if len(levels) > 4:
        raise PlanError(f"an objective has up to 4 criteria, {_shown(text)} has {len(levels)}")
    return Objective(tuple(map(tuple, levels)))


def _term(part: str, text: str) -> Term:
    match = _TERM.fullmatch(part)
    name = part if match is None else match[2]
    if name in ALONE:
        raise PlanError(f"{name!r} is no sum over steps, stands alone and has no calls; got {_shown(text)}")
    if match is None or name not in OBJECTIVES:
        raise PlanError(unknown("objective", name if len(name) <= 80 else name[:80] + "…", (*OBJECTIVES, *ALONE)))
    calls = None if match[3] is None else int(match[3][:30])
    if calls is not None and name != "inference":
        raise PlanError(f"only 'inference' has a number of calls, got {_shown(text)}")
    if calls is not None and not 1 <= calls <= LARGEST:
        raise PlanError(f"calls must be an integer from 1 to 2**63 - 1, got {_shown(text)}")
    return Term(name, _weight(match[1] or "1", text), calls)


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


def _shown(what: object) -> str:
    text = repr(what)
    return text if len(text) <= 80 else text[:80] + "…"


def as_objective(given: object, calls: object = None) -> str:
    """The text of an objective.

    Args:
        given: text; a mapping of names to weights; or a sequence of either, the first deciding.
        calls: forward passes between two updates of the weights, for "inference"; None if there are no updates.

    Raises:
        PlanError: if it is none of these.
    """
    if isinstance(given, str) and given in ALONE and calls is None:
        return given
    if isinstance(given, str):
        objective = parse(given)
    elif isinstance(given, Mapping) and given:
        objective = Objective((tuple(_weighted(name, weight) for name, weight in given.items()),))
    elif isinstance(given, Sequence) and not isinstance(given, bytes) and given:
        parts = [parse(as_objective(part)) for part in given if isinstance(part, str | Mapping)]
        if len(parts) != len(given):
            raise PlanError(f"a list of objectives holds names or mappings of names to weights, got {_shown(given)}")
        objective = Objective(tuple(level for part in parts for level in part.levels))
    else:
        raise PlanError(unknown("objective", given, (*OBJECTIVES, *ALONE)))
    if calls is not None:
        objective = _with_calls(objective, calls)
    return str(parse(str(objective)))


def _weighted(name: object, weight: object) -> Term:
    if not isinstance(name, str):
        raise PlanError(unknown("objective", name, OBJECTIVES))
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise PlanError(f"the weight of {name!r} must be a number, got {_shown(weight)}")
    return replace(_term(name, name), weight=_weight(str(weight), weight))


def _with_calls(objective: Objective, calls: object) -> Objective:
    if "inference" not in objective.names:
        raise PlanError(f"calls goes with the objective 'inference', not with {str(objective)!r}")
    if type(calls) is not int or not 1 <= calls <= LARGEST:
        raise PlanError(f"calls must be an integer from 1 to 2**63 - 1, got {_shown(calls)}")
    levels = (
        tuple(replace(term, calls=calls) if term.name == "inference" else term for term in level)
        for level in objective.levels
    )
    return Objective(tuple(levels))


Goal = str | Mapping[str, float] | Sequence[str | Mapping[str, float]]
"""What a user may give as an objective; see `as_objective`."""


def priced(objective: str) -> str:
    """The text of what single steps are priced by: FLOPs where the objective is no sum over steps."""
    return "flops" if objective in ALONE else objective


def check_forward(objective: object) -> str:
    """`objective` if it is "flops" or "macs", else a `PlanError`."""
    if objective not in ("flops", "macs"):
        raise PlanError(unknown("objective of an atlas", objective, ("flops", "macs")))
    return str(objective)
