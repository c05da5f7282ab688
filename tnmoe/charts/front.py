"""The exact front between work and memory."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.charts.chart import COLORS, Chart, new_axes, styled
from tnmoe.planners.pareto import Tradeoff
from tnmoe.render.table import Table, si

ELEMENT_BYTES = 4


@styled
def pareto_front(front: Sequence[Tradeoff], width: int = ELEMENT_BYTES) -> Chart:
    """Saved bytes against training FLOPs, relative to the least, for what `tnmoe.pareto` returns.

    Args:
        front: the points.
        width: bytes of an element.

    Raises:
        TnmoeError: matplotlib is missing.
    """
    points = sorted(front, key=lambda p: (p.values["training"], p.values["saved"]))
    least = points[0].values["training"]
    extra = [100 * (p.values["training"] / least - 1) for p in points]
    saved = [p.values["saved"] * width / 2**20 for p in points]
    recomputed = [", ".join("·".join(names) for names in p.recomputed) for p in points]
    drawn, axes = new_axes()
    axes.step(extra, saved, where="post", color=COLORS[0], linewidth=1.2)
    axes.plot(extra, saved, "o", color=COLORS[0], markersize=5)
    highest = max(saved) or 1.0
    for x, y in zip(extra, saved, strict=True):
        axes.annotate(f"{y:.1f} MiB, +{x:.2g} %", (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel=f"extra FLOPs of a training step (%; least {si(least, 'FLOP')})",
        ylabel="saved for the backward pass (MiB)",
    )
    axes.set_xlim(-0.03 * (max(extra) or 1), 1.3 * (max(extra) or 1))
    axes.set_ylim(-0.04 * highest, 1.2 * highest)
    rows = tuple(
        (p.values["training"], p.values["saved"] * width, text) for p, text in zip(points, recomputed, strict=True)
    )
    columns = (("training_flops", "training FLOPs"), ("saved_bytes", "saved bytes"), ("recomputed", "recomputed"))
    return Chart(drawn, Table("Training FLOPs against saved bytes", columns, rows))
