"""Where the FLOPs of a plan go, step by step."""

from __future__ import annotations

from tnmoe.charts.chart import COLORS, HATCHES, Chart, new_axes, si_ticks, styled
from tnmoe.costing.op_cost import estimate
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table

CLASSES = ("matmul", "elementwise", "special")


@styled
def cost_breakdown(plan: Plan) -> Chart:
    """A bar for each op of the program, in the order in which they run, split by class of FLOPs.

    Raises:
        TnmoeError: matplotlib is missing.
    """
    ops = plan.bound.ops
    costs = estimate(plan.bound).per_op
    drawn, axes = new_axes(6.0, 0.9 + 0.27 * len(ops))
    names = [f"{op.out.name}  [{' '.join(op.out.indices)}]" for op in ops]
    lines = list(range(len(ops)))
    start = [0] * len(ops)
    rows: list[tuple[Cell, ...]] = [(op.out.name, type(op).__name__) for op in ops]
    for k, kind in enumerate(CLASSES):
        values = [int(getattr(cost, f"{kind}_flops")) for cost in costs]
        axes.barh(
            lines, values, left=start, height=0.7, color=COLORS[k], hatch=HATCHES[k], edgecolor="white", label=kind
        )
        start = [a + b for a, b in zip(start, values, strict=True)]
        rows = [(*row, value) for row, value in zip(rows, values, strict=True)]
    total = max(1, sum(start))
    most = max(1, *start)
    for line, value in zip(lines, start, strict=True):
        axes.text(value + 0.01 * most, line, f"{value / total:.1%}", va="center", fontsize=8)
    axes.set_yticks(lines, names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.13 * most), xlabel="FLOPs of one forward pass")
    axes.xaxis.set_major_formatter(si_ticks())
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right")
    columns = (("step", "step"), ("op", "op"), *((f"{kind}_flops", f"{kind} FLOPs") for kind in CLASSES))
    return Chart(drawn, Table(f"FLOPs of {plan.layer.name}", columns, tuple(rows)))
