"""Layers by two figures, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Mapping

from tnmoe.charts.chart import COLORS, Chart, new_axes, si_ticks, styled
from tnmoe.errors import CostError, unknown
from tnmoe.render.table import Cell, Table
from tnmoe.reports.cost_report import CostReport
from tnmoe.reports.figures import FIGURES, HEADINGS


@styled
def pareto_chart(
    reports: Mapping[str, CostReport],
    x: str = "parameters",
    y: str = "-max_rank",
    measured: Mapping[str, Mapping[str, float]] | None = None,
) -> Chart:
    """A point for each layer; those on the front are filled, joined and named.

    Args:
        reports: by label.
        x, y: figures of the reports or names in `measured`; with a minus in front, larger is better.
        measured: further figures, e.g. `{"seconds": {label: …}}` of every label.

    Raises:
        CostError: there is no such figure.
        TnmoeError: matplotlib is missing.
    """
    given = measured or {}
    columns: list[list[float]] = []
    for axis in (x, y):
        name = axis.removeprefix("-")
        if name not in FIGURES and name not in given:
            raise CostError(unknown("figure", name, [*FIGURES, *given]))
        columns.append([given[name][k] if name in given else getattr(reports[k], name) for k in reports])
    signs = [-1 if axis.startswith("-") else 1 for axis in (x, y)]
    points = list(zip(*columns, strict=True))
    costs = [(signs[0] * a, signs[1] * b) for a, b in points]
    front = [all(other == cost or other[0] > cost[0] or other[1] > cost[1] for other in costs) for cost in costs]
    drawn, axes = new_axes(6.0, 4.0)
    best = sorted(point for point, kept in zip(points, front, strict=True) if kept)
    axes.plot([p[0] for p in best], [p[1] for p in best], color=COLORS[0], linewidth=1, zorder=1)
    for label, point, kept in zip(reports, points, front, strict=True):
        axes.plot(*point, "o", color=COLORS[0], markerfacecolor=COLORS[0] if kept else "white", markersize=6)
        if kept:
            axes.annotate(label, point, xytext=(-6, 5), textcoords="offset points", fontsize=7, ha="right")
    for axis, values, setter in ((x, columns[0], axes.set_xscale), (y, columns[1], axes.set_yscale)):
        if min(values) > 0 and max(values) > 20 * min(values):
            setter("log")
        label = HEADINGS.get(axis.removeprefix("-"), axis.removeprefix("-"))
        (axes.set_xlabel if axis is x else axes.set_ylabel)(
            f"{label} ({'more' if axis[0] == '-' else 'less'} is better)"
        )
    axes.xaxis.set_major_formatter(si_ticks())
    axes.yaxis.set_major_formatter(si_ticks())
    axes.margins(x=0.18, y=0.1)
    rows: list[tuple[Cell, ...]] = [
        (label, *point, "front" if kept else "") for label, point, kept in zip(reports, points, front, strict=True)
    ]
    names = [axis.removeprefix("-") for axis in (x, y)]
    headings = (("layer", "layer"), *((n, HEADINGS.get(n, n)) for n in names), ("front", "front"))
    return Chart(drawn, Table(f"{names[1]} against {names[0]}", headings, tuple(rows)))
