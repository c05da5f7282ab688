"""Each op of a program under the roofline of a device."""

from __future__ import annotations

import numpy as np

from tnmoe.charts.chart import COLORS, MARKERS, Chart, new_axes, si_ticks, styled
from tnmoe.costing.op_cost import estimate
from tnmoe.costing.traffic import forward_traffic
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table
from tnmoe.timing.datasheet import Datasheet, datasheet, roofline

NAMED = 6  # places with a number: those that take longest


@styled
def roofline_chart(plan: Plan, device: str | Datasheet = "h100", dtype: str = "bfloat16") -> Chart:
    """FLOP/s against FLOPs per byte: where each op lies, and whether memory or arithmetic bounds it.

    A point's height is the op's FLOPs over its modelled time, overhead included; so small ops lie below the roof. Its
    area is its share of the time.

    Args:
        plan: of a layer or a network.
        device: a data sheet or its name, e.g. "h100".
        dtype: of all values.

    Raises:
        CostError: an unknown device, or a dtype that it lacks.
        TnmoeError: matplotlib is missing.
    """
    sheet = datasheet(device) if isinstance(device, str) else device
    peak = sheet.of(dtype).dense
    sizes = plan.bound.sizes
    points: list[tuple[str, float, float, float, bool]] = []
    for op, cost in zip(plan.bound.ops, estimate(plan.bound).per_op, strict=True):
        moved = forward_traffic(op, sizes)
        count = DTYPE_BYTES[dtype] * int(moved.read + moved.written)
        if count and int(cost.flops):
            seconds = roofline(op, sizes, sheet, dtype)
            product = bool(int(cost.matmul_flops))
            points.append((op.out.name, int(cost.flops) / count, int(cost.flops) / seconds, seconds, product))
    total = sum(p[3] for p in points)
    drawn, axes = new_axes(5.8, 3.8)
    ridge = peak / sheet.bandwidth
    low, high = min(0.1, *(p[1] / 2 for p in points)), max(8 * ridge, *(p[1] * 2 for p in points))
    grid = np.geomspace(low, high, 200)
    axes.plot(grid, np.minimum(grid * sheet.bandwidth, peak), color="black", linewidth=1.4)
    said = f"{dtype} {peak / 1e12:,.0f} TFLOP/s, {sheet.bandwidth / 1e12:.3g} TB/s"
    axes.text(high * 0.9, peak * 1.25, said, ha="right", fontsize=8)
    for kind, label in ((True, "matrix product"), (False, "other op")):
        chosen = [p for p in points if p[4] is kind]
        axes.scatter(
            [p[1] for p in chosen],
            [p[2] for p in chosen],
            s=[20 + 300 * p[3] / total for p in chosen],
            color=COLORS[0 if kind else 1],
            marker=MARKERS[0 if kind else 2],
            alpha=0.75,
            edgecolor="black",
            linewidth=0.5,
            label=label,
            zorder=3,
        )
    places: dict[tuple[float, float], list[tuple[str, float]]] = {}
    for name, x, y, seconds, _ in points:  # equal ops share a place
        places.setdefault((round(np.log10(x), 2), round(np.log10(y), 2)), []).append((name, seconds))
    longest = sorted(places.items(), key=lambda place: -sum(t for _, t in place[1]))[:NAMED]
    ranking = []
    for number, ((x, y), ops) in enumerate(longest, start=1):
        axes.annotate(
            str(number),
            (10**x, 10**y),
            xytext=(7, -11),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            weight="bold",
        )
        ranking.append(f"{number}  {', '.join(n for n, _ in ops)}: {sum(t for _, t in ops) / total:.0%} of the time")
    axes.text(0.02, 0.98, "\n".join(ranking), transform=axes.transAxes, fontsize=7.5, va="top", linespacing=1.4)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs per byte", ylabel="FLOP/s")
    axes.set_ylim(min(low * sheet.bandwidth, *(p[2] for p in points)) / 4, peak * 40)
    axes.yaxis.set_major_formatter(si_ticks())
    legend = axes.legend(loc="lower right")
    for handle in legend.legend_handles:
        handle.set_sizes([30])  # type: ignore[union-attr]
    rows: list[tuple[Cell, ...]] = [(name, x, y, seconds) for name, x, y, seconds, _ in points]
    columns = (("step", "step"), ("intensity", "FLOPs per byte"), ("rate", "FLOP/s"), ("seconds", "seconds"))
    notes = (f"{sheet.name}: {sheet.source}.",)
    return Chart(drawn, Table(f"{plan.layer.name} under the roofline, {dtype}", columns, tuple(rows), notes))
