"""Figures: what is plotted equals the cost report, and every label lies inside the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tnmoe
from tnmoe.errors import PlanError, TnmoeError
from tnmoe.presets.registry import PRESETS

RING = tnmoe.Network.parse("bn,xny,bi,yiz,zox->bo", weights="xny yiz zox")


@pytest.fixture(scope="module")
def atlas() -> tnmoe.Atlas:
    bounds = {"b": (1, 4096), "n": (4, 512), "x": (2, 8), "y": (2, 64), "z": (2, 64), "i": (64, 768), "o": (64, 1000)}
    return tnmoe.atlas(RING, bounds=bounds)


def assert_in_frame(chart: tnmoe.Chart) -> None:
    """No text is cut off at the edge of the figure."""
    figure = chart.figure
    figure.canvas.draw()
    frame = figure.bbox
    drawn = [chart.axes.get_tightbbox(), *(t.get_window_extent() for t in chart.axes.texts)]
    for box in drawn:
        assert frame.x0 <= box.x0 + 1
        assert frame.y0 <= box.y0 + 1
        assert box.x1 <= frame.x1 + 1
        assert box.y1 <= frame.y1 + 1


@pytest.mark.parametrize("figure", ["parameters", "flops", "training_flops", "max_rank"])
def test_lines_are_the_reports(figure: str) -> None:
    """The plotted points, read back from the lines, are the figures of reports made one by one."""
    experts = (2, 8, 64)
    layers = {
        "CP": lambda n: tnmoe.MuMoE(12, 20, n, tnmoe.CP(7)),
        "TR": lambda n: tnmoe.MuMoE(12, 20, n, tnmoe.TensorRing((2, 3, 5))),
    }
    chart = tnmoe.against_experts(figure, layers, experts, tokens=32)
    for line, declared in zip(chart.axes.lines, layers.values(), strict=True):
        x, y = line.get_data()
        assert tuple(x) == experts
        assert list(y) == [getattr(tnmoe.cost(tnmoe.plan(declared(n), tokens=32)), figure) for n in experts]
    assert [row[1:] for row in chart.data.rows] == [
        (n, int(v)) for line in chart.axes.lines for n, v in zip(*line.get_data(), strict=True)
    ]
    assert_in_frame(chart)


def test_dense_layer_by_hand() -> None:
    """768 × 769 parameters an expert, and the gate's 768."""
    chart = tnmoe.against_experts("parameters", experts=(2, 4))
    assert list(chart.axes.lines[0].get_data()[1]) == [n * (768 * 769 + 768) for n in (2, 4)]


def test_breakdown_adds_up() -> None:
    plan = tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=64)
    report = tnmoe.cost(plan)
    chart = tnmoe.cost_breakdown(plan)
    widths = [[bar.get_width() for bar in group] for group in chart.axes.containers]
    assert [sum(w) for w in widths] == [report.matmul_flops, report.elementwise_flops, report.special_flops]
    assert_in_frame(chart)


def test_front_shows_every_point() -> None:
    """The exact front of the GPT-2 CP layer: 26.1, 17.4, 8.7 and 0 MiB at +0, 0.004, 2.1 and 8.3 %."""
    network = tnmoe.Network.parse("bn,nr,bi,ir,ro->bo", weights="nr ir ro")
    sizes = {"b": 4096, "n": 256, "r": 556, "i": 768, "o": 3072}
    chart = tnmoe.pareto_front(tnmoe.pareto(network, sizes=sizes))
    x, y = chart.axes.lines[-1].get_data()
    assert list(y) == pytest.approx([26.1, 17.4, 8.7, 0.0], abs=0.05)
    assert list(x) == pytest.approx([0, 0.004, 2.1, 8.3], abs=0.05)
    assert_in_frame(chart)


@pytest.mark.slow
def test_regions_are_the_optimum(atlas: tnmoe.Atlas) -> None:
    """At sampled points the winner shown costs what the concrete planner finds."""
    at = {"x": 4, "y": 32, "z": 64, "i": 768, "o": 1000}
    chart = tnmoe.winner_regions(atlas, "b", "n", at, steps=9)
    paths = {order.tree: order for order in atlas.orders}
    for b, n, tree in chart.data.rows[::7]:
        best = tnmoe.plan(RING, sizes={**at, "b": int(b), "n": int(n)})
        assert paths[str(tree)].cost.at({**at, "b": b, "n": n}) == best.flops
    assert len({row[2] for row in chart.data.rows}) > 1
    assert_in_frame(chart)
    with pytest.raises(PlanError, match="no index 'q'"):
        tnmoe.winner_regions(atlas, "q", "n", at)


@pytest.mark.parametrize("train", [True, False])
def test_timeline_shows_the_peak(train: bool) -> None:
    """Stacked classes reach the peak of each step; weights and what is saved at the turn are the report's."""
    plan = tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=64)
    report = tnmoe.cost(plan)
    chart = tnmoe.memory_timeline(plan, train=train)
    stacks = np.array([[bar.get_height() for bar in group] for group in chart.axes.containers]) * 2**20
    rows = chart.data.records()
    assert stacks.sum(0) == pytest.approx([row["peak"] for row in rows])
    assert stacks[0] == pytest.approx([report.weight_bytes] * len(rows))
    saved = [row["saved"] for row in rows]
    assert max(saved) == (report.saved_bytes if train else 0)
    assert_in_frame(chart)


def test_roofline_by_hand() -> None:
    """y = x W on an H100 in bfloat16: 2·64·32·16 FLOPs over 2·(64·32 + 32·16 + 64·16) bytes, below both bounds."""
    plan = tnmoe.plan(tnmoe.Linear(32, 16, bias=False), tokens=64)
    chart = tnmoe.roofline_chart(plan)
    ((_, intensity, rate, seconds),) = chart.data.rows
    assert intensity == 2 * 64 * 32 * 16 / (2 * (64 * 32 + 32 * 16 + 64 * 16))
    assert rate == pytest.approx(2 * 64 * 32 * 16 / float(seconds))
    assert float(rate) <= min(989.5e12, float(intensity) * 3.35e12)
    assert_in_frame(chart)
    assert_in_frame(tnmoe.roofline_chart(tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=4096), "mi300x", "float32"))
    with pytest.raises(TnmoeError, match="h100"):
        tnmoe.roofline_chart(plan, "h1000")


@pytest.mark.slow
def test_front_of_layers_by_brute_force() -> None:
    """Parameters against rank of thirty layers: filled are those that no other has fewer of and more of."""
    reports = {}
    for r in range(4, 64, 4):
        reports[f"CP {r}"] = tnmoe.cost(tnmoe.plan(tnmoe.MuMoE(64, 64, 32, tnmoe.CP(r))))
        reports[f"TR {r}"] = tnmoe.cost(tnmoe.plan(tnmoe.MuMoE(64, 64, 32, tnmoe.TensorRing((4, 4, r)))))
    chart = tnmoe.pareto_chart(reports)
    kept = {row[0] for row in chart.data.rows if row[3]}
    for label, report in reports.items():
        mine = (report.parameters, report.max_rank)
        others = [(o.parameters, o.max_rank) for o in reports.values()]
        beaten = any(o != mine and o[0] <= mine[0] and o[1] >= mine[1] for o in others)
        assert (label in kept) is not beaten
    assert 3 < len(kept) < len(reports)
    assert_in_frame(chart)
    timed = tnmoe.pareto_chart(reports, "seconds", "-max_rank", {"seconds": dict.fromkeys(reports, 1.0)})
    assert {row[1] for row in timed.data.rows} == {1.0}
    with pytest.raises(TnmoeError, match="unknown figure 'secs'"):
        tnmoe.pareto_chart(reports, "secs")


def test_figures_as_files(tmp_path: Path) -> None:
    """The same figure gives the same bytes; it is not blank."""
    chart = tnmoe.against_experts("parameters", experts=(2, 4))
    first = chart.save(tmp_path / "a.svg").read_bytes()
    assert first == tnmoe.against_experts("parameters", experts=(2, 4)).save(tmp_path / "b.svg").read_bytes()
    assert b"number of experts" in first  # text stays text
    assert chart.save(tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"
    assert chart._repr_png_()[:4] == b"\x89PNG"
    chart.figure.canvas.draw()
    assert np.unique(np.asarray(chart.figure.canvas.buffer_rgba())).size > 50
    with pytest.raises(TnmoeError, match=r"must end in \.svg, \.png, \.pdf"):
        chart.save(tmp_path / "a.bmp")
    with pytest.raises(TnmoeError, match="parameters"):
        tnmoe.against_experts("parametres")
