"""Ranks from a budget: an exact search over integers, never a proportional rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import sympy

from tnmoe.errors import CostError, DeclarationError, unknown
from tnmoe.ir.dataflow import elements
from tnmoe.ir.layer import Layer
from tnmoe.ir.rank import layer_rank
from tnmoe.ir.value import DTYPE_BYTES, Role
from tnmoe.layers.kinds import Spec
from tnmoe.layers.parts import with_values
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import DEFAULT_TOKENS, as_layer
from tnmoe.render.table import Table, grouped
from tnmoe.symbolic.dims import Dim, evaluate

MAX_EVALUATIONS = {"parameters": 500_000, "bytes": 500_000, "flops": 2_000}
"""Points that a search may look at; FLOPs need a plan for each."""

MAX_TIES = 200
"""Equally close points whose ranks are compared."""

Point = tuple[int, ...]


@dataclass(frozen=True)
class FittedRanks:
    """What `fit_ranks` returns.

    Attributes:
        spec: the declaration with the ranks filled in (as it was given, if that was a `Layer`).
        values: the integer of each open symbol.
        figure: what was fitted: parameters, flops or bytes.
        target, reached: of that figure.
        evaluated: points that were looked at.
    """

    spec: Spec | Layer
    values: Mapping[str, int]
    figure: str
    target: int
    reached: int
    evaluated: int

    @property
    def error(self) -> float:
        """(reached - target) / target."""
        return (self.reached - self.target) / self.target

    def table(self) -> Table:
        """One row for each open symbol, and what was reached."""
        rows = tuple((name, value) for name, value in self.values.items())
        notes = (
            f"{self.figure}: target {grouped(self.target)}, reached {grouped(self.reached)} ({self.error:+.3%}); "
            f"{grouped(self.evaluated)} points looked at.",
        )
        return Table(
            f"Ranks for {grouped(self.target)} {self.figure}", (("rank", "rank"), ("value", "value")), rows, notes
        )

    def __str__(self) -> str:
        return str(self.table())


def fit_ranks(
    layer: Spec | Layer,
    *,
    parameters: int | None = None,
    flops: int | None = None,
    bytes: int | None = None,
    at_least: Mapping[str, int] | None = None,
    at_most: Mapping[str, int] | None = None,
    nearest: bool = False,
    tokens: int = DEFAULT_TOKENS,
    dtype: str = "float32",
) -> FittedRanks:
    """The integers for a layer's open ranks with which it comes closest to a budget.

    Open are the symbols of the declaration: `CP("R")`, `TensorRing((4, 4, "R"))`, `Tucker(("a", "r", "r"))`; a symbol
    that stands twice ties two ranks. The figure grows with every rank, so the search is exact: it walks over all
    but one symbol and bisects the last. Of points equally close, the one with the largest expert rank is taken.

    Args:
        layer: with at least one open symbol.
        parameters, flops, bytes: the budget, one of them: trained and frozen weights; FLOPs of one forward pass on
            `tokens` rows, each point in its own best order; bytes of weights and buffers in `dtype`.
        at_least: floors by symbol. By default 2 for a bond that joins experts to the rest, for with 1 all experts
            are multiples of one; else 1.
        at_most: ceilings by symbol. By default a bond of two tensors never exceeds the other axes of either.
        nearest: allow the budget to be exceeded where that comes closer; else it is a limit.
        tokens, dtype: see above.

    Raises:
        DeclarationError: no open symbol, not exactly one budget, a floor of an unknown symbol.
        CostError: the floors alone exceed the budget (unless `nearest`), or too many points would have to be tried.
    """
    budgets = {"parameters": parameters, "flops": flops, "bytes": bytes}
    given = {k: v for k, v in budgets.items() if v is not None}
    if len(given) != 1:
        raise DeclarationError(f"pass one budget, parameters=, flops= or bytes=; got {sorted(given) or 'none'}")
    ((figure, target),) = given.items()
    if not isinstance(target, int) or isinstance(target, bool) or target < 1:
        raise DeclarationError(f"{figure} must be a positive integer, got {target!r}")
    if dtype not in DTYPE_BYTES:
        raise CostError(unknown("dtype", dtype, DTYPE_BYTES))
    made = as_layer(layer)
    tokens_symbol = {made.token_symbol} if made.batched else set()
    names = sorted(made.free_symbols - tokens_symbol)
    if not names:
        raise DeclarationError(f'{made.name} has no open rank: declare one as a symbol, e.g. CP("R")')
    low, high = _bounds(made, names, at_least or {}, at_most or {})
    measure: Callable[[Point], int]
    if figure == "flops":
        measure = _planned(made, names, tokens)
    else:
        measure = _stored(made, names, DTYPE_BYTES[dtype] if figure == "bytes" else 0)
    search = _Search(figure, measure, target, nearest)
    points = search.closest(low, high)
    if not points:
        least = measure(low)
        floors = ", ".join(f"{n} = {v}" for n, v in zip(names, low, strict=True))
        raise CostError(
            f"{grouped(least)} {figure} are the least there are (with {floors}), which exceeds {grouped(target)}; "
            f"raise the budget, lower at_least, or pass nearest=True"
        )

    def merit(point: Point) -> tuple[int, float, Point]:
        values = made.bound_sizes({**dict(zip(names, point, strict=True)), **dict.fromkeys(tokens_symbol, tokens)})
        balance = min(p / max(h, 1) for p, h in zip(point, search.widest, strict=True))
        return int(evaluate(layer_rank(made, values), {})), balance, point

    best = max(points[:MAX_TIES], key=merit) if len(points) > 1 else points[0]
    values = dict(zip(names, best, strict=True))
    spec = layer if isinstance(layer, Layer) else with_values(layer, values)
    return FittedRanks(spec, values, figure, target, search.measured(best), search.count)


def _bounds(
    layer: Layer, names: list[str], at_least: Mapping[str, int], at_most: Mapping[str, int]
) -> tuple[Point, tuple[int | None, ...]]:
    """Floor and ceiling (None: none) of each symbol."""
    for given, what in ((at_least, "at_least"), (at_most, "at_most")):
        for name, value in given.items():
            if name not in names:
                raise DeclarationError(f"{what}: {unknown('symbol', name, names)}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DeclarationError(f"{what}[{name!r}] must be a positive integer, got {value!r}")
    floors, ceilings = dict.fromkeys(names, 1), dict[str, int | None].fromkeys(names)
    for name, least, most in _useful(layer):
        if name in floors:
            known = ceilings[name]
            floors[name] = max(floors[name], least)
            ceilings[name] = most if known is None or (most is not None and most < known) else known
    low, high = [], []
    for name in names:
        ceiling = at_most.get(name, ceilings[name])
        floor = at_least.get(name, floors[name] if ceiling is None else min(floors[name], ceiling))
        if ceiling is not None and floor > ceiling:
            if name in at_most:
                raise DeclarationError(f"at_least[{name!r}] = {floor} is above its ceiling {ceiling}")
            ceiling = floor
        low.append(floor)
        high.append(ceiling)
    return tuple(low), tuple(high)


def _useful(layer: Layer) -> Iterator[tuple[str, int, int | None]]:
    """For each tensor's bond that is a bare symbol: its name, a floor, and the ceiling that this tensor sets."""
    for node in layer.contractions:
        if node.expert_map is None:
            continue
        ends = {p for i in (node.expert_map.input, node.expert_map.output) for p in node.expert_map.parts(i)}
        weights = [t for t in node.network.tensors if t.role is not Role.DATA]
        for tensor in weights:
            experts = [n for n in tensor.indices if n in node.expert_map.experts]
            several = any(_number(layer, n) != 1 for n in experts)
            for bond in tensor.indices:
                size = layer.sizes[bond]
                if bond in (*node.expert_map.experts, *ends) or not isinstance(size, sympy.Symbol):
                    continue
                others = [_number(layer, i) for i in tensor.indices if i != bond]
                folded = node.network.bias is not None and node.network.bias.weight == tensor.name
                most: int | None = None
                if sum(bond in t.indices for t in weights) == 2 and all(isinstance(n, int) for n in others):
                    most = prod(int(n) for n in others)
                    most += most // int(_number(layer, node.expert_map.input)) if folded else 0
                yield str(size), 2 if several and not ends & set(tensor.indices) else 1, most


def _number(layer: Layer, index: str) -> Dim:
    size = layer.sizes[index]
    return layer.values.get(str(size), size)


def _stored(layer: Layer, names: list[str], itemsize: int) -> Callable[[Point], int]:
    """Parameters (or with an `itemsize` bytes of parameters and buffers) as a function of the symbols."""
    groups = layer.parameters + (layer.buffers if itemsize else ())
    symbols = {s for size in layer.sizes.values() for s in sympy.sympify(size).free_symbols}
    known = {s: layer.values[str(s)] for s in symbols if str(s) in layer.values}
    total = sympy.expand(sum(sympy.sympify(elements(p.indices, layer.sizes)).xreplace(known) for p in groups))
    variables = [next(s for s in symbols if str(s) == name) for name in names]
    factor = itemsize or 1
    if not total.is_polynomial(*variables):  # a padded split rounds up
        return lambda point: factor * evaluate(total, dict(zip(names, point, strict=True)))
    terms = [(int(c), powers) for powers, c in sympy.Poly(total, *variables).terms()]
    return lambda point: (
        factor * sum(c * prod(p**e for p, e in zip(point, powers, strict=True) if e) for c, powers in terms)
    )


def _planned(layer: Layer, names: list[str], tokens: int) -> Callable[[Point], int]:
    """FLOPs as a function of the symbols, each point in its own best order."""
    return lambda point: plan(layer, tokens=tokens, sizes=dict(zip(names, point, strict=True))).flops


class _Search:
    """All points of least distance to a target, for a figure that grows with every coordinate."""

    def __init__(self, figure: str, measure: Callable[[Point], int], target: int, nearest: bool) -> None:
        self.figure, self.measure, self.target, self.nearest = figure, measure, target, nearest
        self.count = 0
        self.widest: Point = ()
        self._seen: dict[Point, int] = {}

    def measured(self, point: Point) -> int:
        if point not in self._seen:
            self.count += 1
            if self.count > MAX_EVALUATIONS[self.figure]:
                raise CostError(
                    f"more than {grouped(MAX_EVALUATIONS[self.figure])} points would have to be tried; give some of "
                    f"the ranks, tie them by one symbol, or narrow them by at_least and at_most"
                )
            self._seen[point] = self.measure(point)
        return self._seen[point]

    def closest(self, low: Point, high: tuple[int | None, ...]) -> list[Point]:
        """Every point between the bounds that is closest; empty if the least one exceeds a limit."""
        self.widest = tuple(self._largest(low, k, high[k]) for k in range(len(low)))
        inner = max(range(len(low)), key=lambda k: self.widest[k] - low[k])
        best: list[Point] = []
        least: int | None = None
        for point in self._candidates(low, high, [k for k in range(len(low)) if k != inner], inner):
            distance = self.target - self.measured(point)
            if distance < 0:
                if not self.nearest:
                    continue
                distance = -distance
            if least is None or distance < least:
                best, least = [], distance
            if distance == least and len(best) < MAX_TIES and point not in best:
                best.append(point)
        return best

    def _largest(self, point: Point, k: int, ceiling: int | None) -> int:
        """The largest coordinate `k` within the target (or its floor), the others as in `point`."""

        def fits(value: int) -> bool:
            return self.measured((*point[:k], value, *point[k + 1 :])) <= self.target

        inside, step = point[k], 1
        if not fits(inside):
            return inside
        while (ceiling is None or inside + step <= ceiling) and fits(inside + step):
            inside, step = inside + step, 2 * step
        outside = inside + step if ceiling is None else min(inside + step, ceiling + 1)
        while outside - inside > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if fits(middle) else (inside, middle)
        return inside

    def _candidates(self, point: Point, high: tuple[int | None, ...], walked: list[int], inner: int) -> Iterator[Point]:
        """On each line along `inner`: the last point within the target, and the first beyond it."""
        if not walked:
            last = self._largest(point, inner, high[inner])
            for value in (last, last + 1):
                if high[inner] is None or value <= (high[inner] or 0):
                    yield (*point[:inner], value, *point[inner + 1 :])
            return
        k, *rest = walked
        value = point[k]
        while high[k] is None or value <= (high[k] or 0):
            here = (*point[:k], value, *point[k + 1 :])
            yield from self._candidates(here, high, rest, inner)
            if self.measured(here) > self.target:
                return  # every further one costs more
            value += 1
