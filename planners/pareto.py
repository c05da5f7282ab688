"""The exact Pareto front of contraction orders, jointly with what to keep for the backward pass and what to recompute.

Dynamic programming over subsets, as in `subset_dp`, that keeps every order no other one beats in all objectives. An
intermediate that the backward pass reads is either saved, or recomputed from its operands, which then have to be
there in their turn; both choices add up over the tree, so the same program serves. All objectives are additive
except the peak, which is monotone: a part that is worse in every objective is never better in a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, get_args

from tnmoe.costing.objective import FLOPS, TRAINING, Goal, Objective, as_objective
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.prices import Prices, forward_price, price
from tnmoe.costing.saved import saved_values
from tnmoe.errors import PlanError, unknown
from tnmoe.ir.dataflow import elements
from tnmoe.ir.network import Network
from tnmoe.ir.ops import Op, propagate
from tnmoe.ir.path import ContractionPath, Tree
from tnmoe.ir.value import Value
from tnmoe.lowering.lower import Operand, leaf_operands, lower_step

MAX_TENSORS = 9

Axis = Literal["flops", "training", "saved", "peak"]
"""FLOPs forward; FLOPs of forward, recomputation and backward; elements saved for the backward; elements of all
intermediates that are alive at once in a forward pass that saves nothing."""

AXES: tuple[Axis, ...] = get_args(Axis)

Values = tuple[int, ...]
"""By place in `AXES`, then those of further prices."""

_PRICED: Mapping[Objective, Axis] = {FLOPS: "flops", TRAINING: "training"}
"""Prices of steps that are axes in any case."""


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """A point of the front.

    Attributes:
        values: by objective as text, all of `AXES` and any further ones; the front is minimal in those asked for.
        path: the order.
        recomputed: the tensors (by name) whose product is recomputed in the backward pass, not saved.
    """

    values: Mapping[str, int]
    path: ContractionPath
    recomputed: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Point:
    """A way to contract a subset: its values, the points of its parts, and which parts are recomputed."""

    values: Values
    parts: tuple[_Point, _Point] | None
    subset: int
    recomputed: tuple[bool, bool] = (False, False)


@dataclass(frozen=True, slots=True)
class _Side:
    """One operand of a step: its subset, the elements to save if it is read, and if all of it is needed."""

    subset: int
    read: bool
    saved: int
    whole: int
    leaf: bool


def plan(
    network: Network,
    sizes: Mapping[str, int],
    objectives: Sequence[Axis | Objective] = ("training", "saved"),
    requires_grad: Set[str] = frozenset(),
    *,
    recompute: bool = True,
    saved_limit: int | None = None,
    peak_limit: int | None = None,
) -> tuple[Tradeoff, ...]:
    """All orders (and choices of what to recompute) that no other one beats, by the first objective.

    Args:
        network: up to 9 tensors. Its leaves are there during the backward pass at no charge.
        sizes: an integer for every index.
        objectives: some of `AXES`; without recomputation also prices of steps.
        requires_grad: names of the tensors that need a gradient.
        recompute: allow recomputation; else everything that is read is saved.
        saved_limit, peak_limit: leave out what saves, or holds at once, more elements.

    Raises:
        PlanError: more than 9 tensors, no objective, a price of steps with recomputation, or limits that no order meets
            (with the least there is).
    """
    minimised = tuple(dict.fromkeys(_PRICED.get(o, o) if isinstance(o, Objective) else o for o in objectives))
    further = [o for o in minimised if isinstance(o, Objective)]
    if further and recompute:
        raise PlanError(unknown("objective of a front", str(further[0]), AXES))
    names = (*AXES, *further)
    n = len(network.tensors)
    if n > MAX_TENSORS or not minimised:
        raise PlanError(f"a front takes at least one objective and up to {MAX_TENSORS} tensors, got {n}")
    limits: dict[Axis, int] = {}
    if saved_limit is not None:
        limits["saved"] = saved_limit
    if peak_limit is not None:
        limits["peak"] = peak_limit
    axes = [names.index(o) for o in dict.fromkeys((*minimised, *limits))]
    prices = [Prices(network, sizes, o, requires_grad) for o in further]
    front = _front(network, sizes, axes, requires_grad, recompute, prices)
    for objective, limit in limits.items():
        axis = AXES.index(objective)
        least = min(p.values[axis] for p in front)
        front = [p for p in front if p.values[axis] <= limit]
        if not front:
            raise PlanError(f"no order has {objective} ≤ {limit:,} elements; the least is {least:,}")
    wanted = [names.index(o) for o in minimised]
    points = _minimal(front, wanted)
    points.sort(key=lambda p: tuple(p.values[a] for a in wanted))
    return tuple(_tradeoff(p, network, tuple(map(str, names))) for p in points)


def as_axis(goal: Goal, recompute: bool) -> Axis | Objective:
    """What a user means by an objective of a front; prices of steps only where nothing is recomputed.

    Raises:
        PlanError: if it is none.
    """
    for axis in AXES:
        if goal == axis:
            return axis
    if recompute:
        raise PlanError(unknown("objective of a front", goal, AXES))
    return as_objective(goal)


def _front(
    network: Network,
    sizes: Mapping[str, int],
    axes: Sequence[int],
    requires_grad: Set[str],
    recompute: bool,
    further: Sequence[Prices] = (),
) -> list[_Point]:
    n = len(network.tensors)
    leaves, live = network.leaf_names, set(requires_grad)
    operand: dict[int, Operand] = {1 << k: leaf for k, leaf in enumerate(leaf_operands(network))}
    # Points that only deliver the product, and points whose product can be had again in the backward pass.
    plain: dict[int, list[_Point]] = {
        1 << k: [_Point((0,) * (len(AXES) + len(further)), None, 1 << k)] for k in range(n)
    }
    again: dict[int, list[_Point]] = dict(plain)
    for subset in range(1, 1 << n):
        if subset in plain:
            continue
        keep = network.kept([k for k in range(n) if subset >> k & 1])
        steps: list[_Step] = []
        rest = subset & (subset - 1)
        part = rest
        while part:
            other = subset ^ part
            ops, operand[subset] = lower_step(operand[other], operand[part], keep, f"_{subset}")
            gradients = propagate(ops, live)
            kept = {v.name: v for op in ops for v in saved_values(op, sizes, gradients) if v.name not in leaves}
            sides = tuple(_side(s, operand[s], kept, sizes, leaves) for s in (other, part))
            inner = _total((v for v in kept.values() if v.name not in _names(operand[other], operand[part])), sizes)
            steps.append(_Step(ops, sizes, live, leaves, sides, inner, tuple(prices.of(ops) for prices in further)))
            part = (part - 1) & rest
        live |= propagate(ops, live)
        for prices in further:
            prices.follow(ops)
        plain[subset] = _points(subset, steps, axes, plain, again, recompute, everything=False)
        again[subset] = _points(subset, steps, axes, plain, again, recompute, everything=True) if recompute else []
    return plain[(1 << n) - 1]


def _points(
    subset: int,
    steps: Sequence[_Step],
    axes: Sequence[int],
    plain: Mapping[int, list[_Point]],
    again: Mapping[int, list[_Point]],
    recompute: bool,
    *,
    everything: bool,
) -> list[_Point]:
    """The minimal points of a subset; a step that is beaten even with the best of either part is left out."""
    options = [[_choices(side, plain, again, recompute, everything) for side in step.sides] for step in steps]
    bounds = [
        step.point(subset, *(_ideal(choices) for choices in sides), recomputed=everything).values
        for step, sides in zip(steps, options, strict=True)
    ]
    front: list[_Point] = []
    for k in sorted(range(len(steps)), key=lambda k: [bounds[k][a] for a in axes]):
        if any(all(p.values[a] <= bounds[k][a] for a in axes) for p in front):
            continue
        left, right = options[k]
        front += [steps[k].point(subset, a, b, recomputed=everything) for a in left for b in right]
        front = _minimal(front, axes)
    return front


Choice = tuple[_Point, int, bool]
"""A part's point, the elements saved of it, and whether it is recomputed."""


def _choices(
    side: _Side,
    plain: Mapping[int, list[_Point]],
    again: Mapping[int, list[_Point]],
    recompute: bool,
    everything: bool,
) -> list[Choice]:
    """What may be done with one part; with `everything`, all of it must be there in the backward pass."""
    if side.leaf or not (side.read or everything):
        return [(p, 0, False) for p in plain[side.subset]]
    saved = side.whole if everything else side.saved
    choices = [(p, saved, False) for p in plain[side.subset]]
    return choices + [(p, 0, True) for p in again[side.subset]] if recompute else choices


def _ideal(choices: Sequence[Choice]) -> Choice:
    """A choice that would be as good as any of these in each value."""
    added = [(*p.values[:2], p.values[2] + saved, *p.values[3:]) for p, saved, _ in choices]
    return _Point(tuple(min(column) for column in zip(*added, strict=True)), None, 0), 0, False


class _Step:
    """The figures of one contraction step, and the points it makes."""

    def __init__(
        self,
        ops: tuple[Op, ...],
        sizes: Mapping[str, int],
        live: Set[str],
        leaves: Set[str],
        sides: tuple[_Side, ...],
        inner: int,
        further: tuple[int, ...],
    ) -> None:
        self.flops = forward_price(ops, sizes, "flops")
        self.training = price(ops, sizes, TRAINING, live, leaves)
        self.written = sum(int(op_cost(op, sizes).activations) for op in ops)
        self.sides = sides
        self.inner = inner
        self.further = further

    def point(self, subset: int, left: Choice, right: Choice, *, recomputed: bool) -> _Point:
        (a, saved_a, again_a), (b, saved_b, again_b) = left, right
        size_a, size_b = (0 if s.leaf else s.whole for s in self.sides)
        # Either part may come first; its result waits while the other is made.
        waiting = min(max(a.values[3], size_a + b.values[3]), max(b.values[3], size_b + a.values[3]))
        values = (
            a.values[0] + b.values[0] + self.flops,
            a.values[1] + b.values[1] + self.training + (self.flops if recomputed else 0),
            a.values[2] + b.values[2] + saved_a + saved_b + self.inner,
            max(waiting, size_a + size_b + self.written),
            *(x + y + z for x, y, z in zip(a.values[4:], b.values[4:], self.further, strict=True)),
        )
        return _Point(values, (a, b), subset, (again_a, again_b))


def _names(*operands: Operand) -> set[str]:
    return {v.name for o in operands for v in (o.main, o.extra) if v is not None}


def _total(values: Iterable[Value], sizes: Mapping[str, int]) -> int:
    return sum(int(elements(v.indices, sizes)) for v in values)


def _side(
    subset: int, operand: Operand, kept: Mapping[str, Value], sizes: Mapping[str, int], leaves: Set[str]
) -> _Side:
    own = {v.name: v for v in (operand.main, operand.extra) if v is not None and v.name not in leaves}
    read = [v for name, v in own.items() if name in kept]
    return _Side(subset, bool(read), _total(read, sizes), _total(own.values(), sizes), subset & (subset - 1) == 0)


def _minimal(points: list[_Point], axes: Sequence[int]) -> list[_Point]:
    """Points that no other one beats or equals on all axes; of equal ones the first."""
    ordered = sorted(points, key=lambda p: tuple(p.values[a] for a in axes))
    front: list[tuple[tuple[int, ...], _Point]] = []
    for p in ordered:
        values = tuple(p.values[a] for a in axes)
        if not any(all(x <= y for x, y in zip(other, values, strict=True)) for other, _ in front):
            front.append((values, p))
    return [p for _, p in front]


def _tradeoff(point: _Point, network: Network, names: Sequence[str]) -> Tradeoff:
    recomputed: list[tuple[str, ...]] = []

    def nested(p: _Point) -> Tree:
        if p.parts is None:
            return p.subset.bit_length() - 1
        left, right = (nested(part) for part in p.parts)
        for part, again in zip(p.parts, p.recomputed, strict=True):
            if again:
                recomputed.append(tuple(t.name for k, t in enumerate(network.tensors) if part.subset >> k & 1))
        return left, right

    path = ContractionPath.from_tree(nested(point), len(network.tensors), "pareto")
    return Tradeoff(dict(zip(names, point.values, strict=True)), path, tuple(recomputed))
