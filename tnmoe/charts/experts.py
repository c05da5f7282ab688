"""A figure of the cost report against the number of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tnmoe.charts.chart import COLORS, DASHES, MARKERS, Chart, new_axes, si_ticks, styled
from tnmoe.errors import CostError, unknown
from tnmoe.factorizations.cp import CP
from tnmoe.factorizations.dense import Dense
from tnmoe.factorizations.tensor_ring import TensorRing
from tnmoe.layers.mumoe import MuMoE
from tnmoe.planning.request import Planable
from tnmoe.render.table import Table
from tnmoe.reports import calls
from tnmoe.reports.figures import FIGURES

EXPERTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
Declared = Callable[[int], Planable]

DEFAULT: Mapping[str, Declared] = {
    "dense": lambda n: MuMoE(768, 768, n, Dense()),
    "CP, R = 512": lambda n: MuMoE(768, 768, n, CP(512)),
    "TR, r = 4, 4, 128": lambda n: MuMoE(768, 768, n, TensorRing((4, 4, 128))),
}
"""A layer of 768 inputs and outputs, as the paper (arXiv 2402.12550) compares them: at fixed ranks."""

LABELS = {
    "parameters": "parameters",
    "macs": "MACs",
    "flops": "FLOPs, forward",
    "training_flops": "FLOPs, forward and backward",
    "max_rank": "maximal rank of an expert",
}


@styled
def against_experts(
    figure: str = "parameters",
    layers: Mapping[str, Declared] = DEFAULT,
    experts: Sequence[int] = EXPERTS,
    tokens: int = 1024,
) -> Chart:
    """A line for each layer; both axes are logarithmic, but for ranks.

    Args:
        figure: "parameters", "flops", "max_rank" or another figure of a cost report.
        layers: by label, the declaration for a number of experts.
        experts: the numbers of experts.
        tokens: for the figures that depend on them.

    Raises:
        TnmoeError: there is no such figure, or matplotlib is missing.
    """
    if figure not in FIGURES:
        raise CostError(unknown("figure", figure, FIGURES))
    rows = []
    drawn, axes = new_axes()
    for k, (label, declared) in enumerate(layers.items()):
        values = [int(getattr(calls.cost(declared(n), tokens=tokens), figure)) for n in experts]
        rows += [(label, n, value) for n, value in zip(experts, values, strict=True)]
        axes.plot(
            experts,
            values,
            label=label,
            color=COLORS[k % len(COLORS)],
            marker=MARKERS[k % len(MARKERS)],
            linestyle=DASHES[k % len(DASHES)],
            markersize=4.5,
        )
    name = LABELS.get(figure, figure.replace("_", " "))
    axes.set(xlabel="number of experts", ylabel=name)
    if figure == "max_rank":
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(experts), [str(n) for n in experts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(si_ticks())
    axes.legend()
    columns = (("layer", "layer"), ("experts", "experts"), (figure, name))
    return Chart(drawn, Table(f"{name} against the number of experts", columns, tuple(rows)))
