"""Figures of a layer over many sizes at once: formulas evaluated on columns, the cheapest known order in each row."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tnmoe.analysis.frame import Frame
from tnmoe.analysis.open_sizes import open_sizes
from tnmoe.costing.objective import Objective, as_objective
from tnmoe.errors import DeclarationError, unknown
from tnmoe.ir.layer import Layer
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import DEFAULT_TOKENS, Planable
from tnmoe.reports.cost_report import COMPARED, CostReport
from tnmoe.reports.figures import FIGURES, RATIOS
from tnmoe.symbolic.columns import Column, Columns
from tnmoe.symbolic.constraints import parse_constraint
from tnmoe.symbolic.dims import LARGEST

MOST_ROWS = 10_000_000

SAMPLES = 24
"""Rows for which an order is planned; all corners come first."""

PRICES = {"flops": "flops", "macs": "macs", "training": "training_flops", "saved": "saved_bytes"}
"""The figure that each objective minimises."""


def sweep(
    what: Planable | Plan,
    *,
    figures: str | Iterable[str] = COMPARED,
    where: str | Iterable[str] = (),
    tokens: int | Iterable[int] = DEFAULT_TOKENS,
    sizes: Mapping[str, int] | None = None,
    objective: str = "flops",
    dtype: str = "float32",
    input_gradients: bool | Collection[str] = True,
    **axes: int | Iterable[int],
) -> Frame:
    """The figures of every combination of sizes, exactly; a hundred thousand of them in a second or two.

    Rows are costed in the cheapest of the orders that are best somewhere in the sweep: at its corners and at some rows
    between. A plan keeps its own order throughout.

    Args:
        what: a declaration, layer, network or plan.
        figures: names of figures or ratios (`tnmoe.reports.figures`), the columns of the result beside the sizes.
        where: constraints that rows must satisfy, e.g. "parameters <= 5*10**6", in names of sizes and figures.
        tokens: rows of the input, one number or several; a plan keeps its own unless several are given.
        sizes: values of symbols that the declaration leaves open and that are not swept.
        objective: "flops", "macs", "training" or "saved", by which the order of a row is chosen.
        dtype: for the byte counts.
        input_gradients: as in `plan`.
        axes: values of a size by the name of its symbol (`N=[64, 128]`, `R=range(8, 512)`), or of a field of the
            declaration that is a single size (`inputs=`, `experts=`, `rank=`). The last one varies fastest.

    Raises:
        DeclarationError: an axis that is no size of the layer, no or too many rows, a faulty constraint.
        CostError: an unknown figure.
    """
    if objective not in PRICES:
        raise DeclarationError(unknown("objective of a sweep", objective, PRICES))
    wanted = (figures,) if isinstance(figures, str) else tuple(figures)
    constraints = [parse_constraint(c) for c in ([where] if isinstance(where, str) else where)]
    lengths = {name: _axis(name, values) for name, values in axes.items()}
    layer = open_sizes(what, lengths)
    known = {**(what.values if isinstance(what, Plan) else layer.values), **(sizes or {})}
    if layer.batched and layer.token_symbol not in lengths:
        rows = _axis("tokens", tokens)
        if isinstance(tokens, Iterable):
            lengths = {layer.token_symbol: rows, **lengths}
        elif not isinstance(what, Plan):
            known[layer.token_symbol] = rows[0]
    count = math.prod(map(len, lengths.values()))
    if not 1 <= count <= MOST_ROWS:
        raise DeclarationError(f"a sweep takes 1 to {MOST_ROWS:,} rows, these axes make {count:,}")
    swept = _product(lengths)
    constant = {k: np.full(count, v) for k, v in known.items() if k not in lengths}
    columns = Columns({**constant, **swept})
    if isinstance(what, Plan):
        plans = [replace(what, layer=layer)]
    else:
        fixed = {k: v for k, v in known.items() if k not in lengths}
        plans = _plans(layer, fixed, lengths, as_objective(objective), input_gradients)
    reports = [CostReport.of(p, dtype) for p in plans]
    order = _cheapest(reports, columns, PRICES[objective])
    needed = {name for c in constraints for name in c.names} - set(columns.named)
    for name in (*wanted, *sorted(needed)):
        if name not in FIGURES and name not in RATIOS:
            raise DeclarationError(unknown("figure", name, [*FIGURES, *RATIOS, *columns.named]))
        if name in needed and name in RATIOS:
            raise DeclarationError(f"{name} is a ratio; constrain its parts, e.g. 'parameters <= 100*max_rank'")
    computed = {name: _figure(name, reports, columns, order) for name in dict.fromkeys((*wanted, *sorted(needed)))}
    all_columns = Columns({**columns.named, **{k: v for k, v in computed.items() if k not in RATIOS}})
    keep = np.ones(count, dtype=bool)
    for constraint in constraints:
        keep &= constraint.holds(all_columns)
    shown = {**swept, **{name: computed[name] for name in wanted}, **({} if order is None else {"order": order})}
    return Frame(
        f"Sweep of {layer.name}, {dtype}",
        {name: values[keep] for name, values in shown.items()},
        tuple(_orders(p) for p in plans),
        tuple(f"{k} = {v:,}" for k, v in sorted(known.items()) if k not in lengths),
    )


# ---- axes ----------------------------------------------------------------------------------------------------


def _axis(name: str, values: int | Iterable[int]) -> list[int]:
    given: list[Any] = list(values) if isinstance(values, Iterable) else [values]
    for v in given:
        if isinstance(v, bool) or not isinstance(v, int | np.integer) or not 1 <= v <= LARGEST:
            raise DeclarationError(f"axis {name} takes positive integers, got {v!r}")
    return [int(v) for v in given]


def _product(axes: Mapping[str, list[int]]) -> dict[str, Column]:
    grids = np.meshgrid(*(np.array(a, dtype=np.int64) for a in axes.values()), indexing="ij")
    return {name: g.ravel() for name, g in zip(axes, grids, strict=True)}


# ---- orders --------------------------------------------------------------------------------------------------


def _plans(
    layer: Layer,
    fixed: Mapping[str, int],
    axes: Mapping[str, list[int]],
    objective: Objective,
    input_gradients: bool | Collection[str],
) -> list[Plan]:
    """A plan for each order that is the best one at a corner of the sweep, or at one of some rows between."""
    corners = list(itertools.islice(itertools.product(*({min(a), max(a)} for a in axes.values())), SAMPLES))
    draw = random.Random(0)
    between = [tuple(draw.choice(a) for a in axes.values()) for _ in range(SAMPLES - len(corners))]
    distinct: dict[tuple[Any, ...], Plan] = {}
    opened = replace(layer, values={k: v for k, v in layer.values.items() if k not in axes})
    for point in dict.fromkeys([*corners, *between]):
        values = {**fixed, **dict(zip(axes, point, strict=True))}
        tokens = values.pop(layer.token_symbol) if layer.batched else DEFAULT_TOKENS
        open_sizes = {k: v for k, v in values.items() if k not in opened.values}
        planned = plan(opened, tokens=tokens, sizes=open_sizes, objective=objective, input_gradients=input_gradients)
        distinct.setdefault(tuple((name, p.steps) for name, p in planned.paths.items()), planned)
    return list(distinct.values())


def _orders(planned: Plan) -> str:
    trees = (
        planned.paths[node.out.name].tree([t.name for t in node.network.tensors]) for node in planned.layer.contractions
    )
    return "; ".join(trees)


def _cheapest(reports: list[CostReport], columns: Columns, price: str) -> Column | None:
    """Number of the cheapest order in each row; None if there is but one."""
    if len(reports) == 1:
        return None
    best = columns.evaluate(reports[0].expression(price))
    order = np.zeros(columns.length, dtype=np.int64)
    for k, report in enumerate(reports[1:], start=1):
        other = columns.evaluate(report.expression(price))
        less = (other < best).astype(bool)
        best, order = np.where(less, other, best), np.where(less, k, order)
    return order


def _figure(name: str, reports: list[CostReport], columns: Columns, order: Column | None) -> Column:
    if name in RATIOS:
        above, below = (
            sum(_figure(part, reports, columns, order).astype(float) for part in parts) for parts in RATIOS[name].parts
        )
        quotient: Column = np.divide(above, below)
        return quotient
    formulas = [report.expression(name) for report in reports]
    if order is None or all(f == formulas[0] for f in formulas):
        return columns.evaluate(formulas[0])
    by_order = [columns.evaluate(f) for f in formulas]
    return (
        np.choose(order, by_order) if len(by_order) <= 32 else np.array([by_order[k][i] for i, k in enumerate(order)])
    )
