"""Which contraction order wins, over two sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tnmoe.charts.chart import COLORS, HATCHES, Chart, new_axes, styled
from tnmoe.errors import PlanError
from tnmoe.planners.atlas.atlas import Atlas
from tnmoe.render.table import Table

STEPS = 96


@styled
def winner_regions(atlas: Atlas, x: str, y: str, at: Mapping[str, int], steps: int = STEPS) -> Chart:
    """The order that is cheapest at each pair of sizes, on logarithmic axes over the atlas's bounds.

    Args:
        atlas: of the network; its bounds of `x` and `y` are the ranges of the axes.
        x, y: the two indices.
        at: the sizes of all other indices.
        steps: sizes tried along each axis; both ends are among them.

    Raises:
        PlanError: an index is not in the atlas, or has no upper bound.
        TnmoeError: matplotlib is missing.
    """
    axis = {}
    for index in (x, y):
        if index not in atlas.bounds:
            raise PlanError(f"the atlas has no index {index!r}; it has {', '.join(atlas.bounds)}")
        low, high = atlas.bounds[index]
        if high is None:
            raise PlanError(f"index {index!r} has no upper bound in the atlas, so its axis would have no end")
        axis[index] = sorted({round(v) for v in np.geomspace(low, high, steps)})
    winners = [[atlas.best({**at, x: a, y: b}).tree for a in axis[x]] for b in axis[y]]
    trees = sorted({tree for row in winners for tree in row}, key=lambda t: -sum(row.count(t) for row in winners))
    drawn, axes = new_axes(5.6, 3.6 + 0.2 * len(trees))
    area = np.array([[trees.index(tree) for tree in row] for row in winners])
    for k, tree in enumerate(trees):
        levels = np.where(area == k, 1.0, 0.0)
        share = float(levels.mean())
        axes.contourf(
            axis[x],
            axis[y],
            levels,
            levels=[0.5, 1.5],
            colors=[COLORS[k % len(COLORS)]],
            hatches=[HATCHES[k % len(HATCHES)]],
            alpha=0.55,
        )
        axes.fill_between(
            [],
            [],
            color=COLORS[k % len(COLORS)],
            alpha=0.55,
            hatch=HATCHES[k % len(HATCHES)],
            label=f"{tree}  ({share:.0%})" if share >= 0.01 else f"{tree}  (< 1%)",
        )
    axes.set(xscale="log", yscale="log", xlabel=f"size of {x}", ylabel=f"size of {y}")
    axes.grid(visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)
    rows = tuple(
        (a, b, tree) for b, row in zip(axis[y], winners, strict=True) for a, tree in zip(axis[x], row, strict=True)
    )
    fixed = ", ".join(f"{k} = {v:,}" for k, v in at.items())
    return Chart(drawn, Table(f"Cheapest order at {fixed}", ((x, x), (y, y), ("order", "order")), rows))
