"""What is alive in memory, step by step, in a training step or in inference."""

from __future__ import annotations

from itertools import groupby

from tnmoe.charts.chart import COLORS, HATCHES, Chart, new_axes, styled
from tnmoe.footprint.timeline import CLASSES
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table
from tnmoe.reports.memory_report import MemoryReport

MIB = 2**20


@styled
def memory_timeline(plan: Plan, *, train: bool = True, dtype: str = "float32") -> Chart:
    """A bar for each step: most bytes alive while it runs, by class, as torch's allocator would see them.

    Args:
        plan: of a layer or a network.
        train: forward with autograd and backward; else inference.
        dtype: of all values.

    Raises:
        TnmoeError: matplotlib is missing.
    """
    report = MemoryReport(plan, dtype)
    moments = report.training if train else report.inference
    drawn, axes = new_axes(6.4, 3.6)
    places = list(range(len(moments)))
    base = [0.0] * len(moments)
    for k, kind in enumerate(CLASSES):
        values = [moment.live.get(kind, 0) / MIB for moment in moments]
        axes.bar(
            places, values, bottom=base, width=1.0, color=COLORS[k], hatch=HATCHES[k], edgecolor="white", label=kind,
            linewidth=0.4,
        )  # fmt: skip
        base = [a + b for a, b in zip(base, values, strict=True)]
    highest = max(range(len(base)), key=base.__getitem__)
    note = f"peak {base[highest]:,.1f} MiB: {moments[highest].step}"
    right = highest > 0.6 * len(base)
    axes.annotate(
        note, (highest, base[highest]), xytext=(-6 if right else 6, 6), textcoords="offset points", fontsize=8,
        ha="right" if right else "left",
    )  # fmt: skip
    start = 0
    for phase, group in groupby(moments, key=lambda moment: moment.phase):
        count = len(list(group))
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=1, linestyle="--")
        axes.text(start + count / 2 - 0.5, 1.02, phase, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        start += count
    axes.set_xticks(places, [moment.step for moment in moments], rotation=60, ha="right", fontsize=7)
    axes.set(xlim=(-0.5, len(moments) - 0.5), ylim=(0, 1.12 * max(base)), ylabel="alive (MiB)")
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    rows: list[tuple[Cell, ...]] = []
    for m in moments:
        rows.append((m.phase, m.step, *(m.live.get(kind, 0) for kind in CLASSES), m.peak))
    columns = (
        ("phase", "phase"),
        ("step", "step"),
        *((kind, f"{kind} bytes") for kind in CLASSES),
        ("peak", "peak bytes"),
    )
    return Chart(drawn, Table(f"Memory of {plan.layer.name}, {dtype}", columns, tuple(rows)))
