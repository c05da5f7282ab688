"""What shows itself in a notebook or as a file: diagrams of networks and orders, tables as HTML."""

from __future__ import annotations

import io
import random
import re
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from pypdfium2 import PdfDocument
from rich.console import Console
from support.cases import seeds
from support.networks import random_network

import tnmoe
from tnmoe.errors import PlanError, TnmoeError
from tnmoe.presets.registry import PRESETS
from tnmoe.render.labels import box
from tnmoe.render.placement import place
from tnmoe.render.scene import Line, Scene, Shape, Text
from tnmoe.render.table import Table

SVG = "{http://www.w3.org/2000/svg}"
FAMILIES = {
    "cp": "bn,nr,bi,ir,ro->bo",
    "tensor ring": "bn,xny,bi,yiz,zox->bo",
    "tucker": "bn,nx,bi,iy,xyz,zo->bo",
    "two-level ring": "bn,bm,xny,ymz,bi,ziw,wox->bo",
    "hierarchical tucker": "bn,bm,nx,my,xyp,bi,iz,oq,zqs,ps->bo",
}


def texts(scene: Scene) -> list[str]:
    return [item.text for item in scene.items if isinstance(item, Text)]


@pytest.mark.parametrize("expression", FAMILIES.values(), ids=FAMILIES)
def test_network_diagram_is_legible(expression: str) -> None:
    """Every tensor and index has one label; no label lies on another, no node on another; all is within the frame."""
    network = tnmoe.Network.parse(expression)
    sizes = {i: 10 + k for k, i in enumerate(network.indices)}
    scene = network.diagram(sizes)
    labels = texts(scene)
    for tensor in network.tensors:
        assert labels.count(tensor.name) == 1
    for index, size in sizes.items():
        assert labels.count(f"{index} = {size}") == 1
    boxes = [box(item) for item in scene.items if isinstance(item, Text)]
    nodes = [box(item) for item in scene.items if isinstance(item, Shape) and item.radius > 4]
    inside = [b for b in boxes if any(n[0] <= b[0] and b[2] <= n[2] and n[1] <= b[1] and b[3] <= n[3] for n in nodes)]
    free = [b for b in boxes if b not in inside]
    for a, b in [*combinations(free, 2), *combinations(nodes, 2), *((a, n) for a in free for n in nodes)]:
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]), (a, b)
    for left, top, right, bottom in boxes + nodes:
        assert min(left, top) >= 0
        assert right <= scene.width
        assert bottom <= scene.height


@pytest.mark.parametrize("seed", seeds(40, 3))
def test_random_networks_can_be_drawn(seed: int) -> None:
    rng = random.Random(seed)
    network, _ = random_network(rng, rng.randint(1, 7), max_size=4)
    assert ElementTree.fromstring(network._repr_svg_()).tag == f"{SVG}svg"


@pytest.mark.parametrize("expression", ["->", "a->", "a->a", ",a->a", "ab,ab->", "ab,cd->abcd", "aB,Bc->ac"])
def test_every_network_can_be_drawn(expression: str) -> None:
    """Scalars, hyperedges, parts that nothing joins, indices of one tensor alone."""
    assert ElementTree.fromstring(tnmoe.Network.parse(expression)._repr_svg_()).tag == f"{SVG}svg"


def test_roles_differ_by_shape() -> None:
    """Colour alone would be lost in print."""
    network = tnmoe.Network.parse("bi,ir,ro->bo", weights="ir", frozen="ro")
    kinds = [item.kind for item in network.diagram().items if isinstance(item, Shape) and item.radius > 10]
    assert kinds == ["circle", "square", "diamond"]
    assert {"data", "weight", "frozen weight"} <= set(texts(network.diagram()))


def test_placement_of_a_path_is_a_line() -> None:
    """Stress zero is possible there: distances come to those wished for."""
    where = place(4, [(0, 1, 1.0), (1, 2, 2.0), (2, 3, 1.0)])
    assert where[:, 0] - where[0, 0] == pytest.approx([0, 1, 3, 4], abs=0.05)
    assert abs(where[:, 1]).max() < 0.15


def test_tree_shows_the_plan() -> None:
    """One node a step, whose area is its share of the plan's FLOPs."""
    sizes = {"b": 64, "n": 8, "x": 2, "y": 3, "i": 20, "z": 5, "o": 9}
    plan = tnmoe.plan(tnmoe.Network.parse(FAMILIES["tensor ring"]), sizes=sizes)
    scene = plan.diagram()
    nodes = [item for item in scene.items if isinstance(item, Shape) and item.fill == "#2E6FA7"]
    assert len(nodes) == len(plan.path) == 4
    shares = [float(m[1]) for t in texts(scene) if (m := re.search(r"\((\d+)%\)", t))]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=4)
    rows = plan.table().records()
    largest = max(rows, key=lambda row: int(row["flops"]))
    share = 100 * int(largest["flops"]) / plan.flops
    assert max(shares) == pytest.approx(share, abs=1)
    assert max(n.radius for n in nodes) == pytest.approx(17 * (share / 100) ** 0.5, rel=0.01)


def test_tree_of_a_layer_needs_a_name_where_there_are_several() -> None:
    plan = tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=64)
    with pytest.raises(PlanError, match="several networks; name one of hidden, y"):
        plan.diagram()
    with pytest.raises(PlanError, match="no network defines 'z'"):
        plan.diagram("z")
    assert "r1 r3" in " ".join(texts(plan.diagram("hidden")))


def test_pictures_as_files(tmp_path: Path) -> None:
    """Of the picture's size: two dots for each pixel in PNG, three quarters of a point in PDF, whose text is text."""
    scene = tnmoe.Network.parse(FAMILIES["cp"]).diagram({"r": 8})
    assert scene.save(tmp_path / "a.svg").read_text() == f"{scene.svg()}\n"
    assert scene.svg() == scene._repr_svg_() == tnmoe.Network.parse(FAMILIES["cp"]).diagram({"r": 8}).svg()
    high, wide, _ = imread(scene.save(tmp_path / "a.png")).shape
    assert (wide, high) == (2 * round(scene.width), 2 * round(scene.height))
    (page,) = PdfDocument(scene.save(tmp_path / "a.pdf"))
    assert page.get_size() == (0.75 * round(scene.width), 0.75 * round(scene.height))
    letters = "".join(page.get_textpage().get_text_range().split())
    assert sorted(letters) == sorted("".join(texts(scene)).replace(" ", ""))
    with pytest.raises(TnmoeError, match=r"'a\.gif'; the name must end in \.svg, \.png or \.pdf"):
        scene.save(tmp_path / "a.gif")


def as_png(scene: Scene, path: Path) -> np.ndarray:
    return imread(scene.save(path.with_suffix(".png")))


def as_pdf(scene: Scene, path: Path) -> np.ndarray:
    """The page as another library draws it, two dots for each pixel of the picture."""
    (page,) = PdfDocument(scene.save(path.with_suffix(".pdf")))
    return page.render(scale=2 / 0.75).to_numpy() / 255


@pytest.mark.parametrize("drawn", [as_png, as_pdf])
@pytest.mark.parametrize("text", ["αβγ μ ΣΠ", "→ ≤ × ·", "r1 & <b>"])
def test_text_is_drawn_above_its_halo(tmp_path: Path, drawn: Callable[[Scene, Path], np.ndarray], text: str) -> None:
    """Letters are dark, and white around them lies over what is below; a missing font would leave the line whole."""
    line = Line(10, 50, 190, 50, width=3)
    bare = drawn(Scene(200, 100, (line,)), tmp_path / "bare")[..., :3].mean(-1)
    full = drawn(Scene(200, 100, (line, Text(100, 50, text, 20))), tmp_path / "full")[..., :3].mean(-1)
    assert full.shape == bare.shape == (200, 400)
    assert (full[110:] < 0.5).sum() + (full[:90] < 0.5).sum() > 60, "no letter is dark outside of the line"
    on_line = slice(98, 102)
    assert (bare[on_line, 30:370] < 0.5).all()
    covered = full[on_line, 100:300] > 0.9
    assert covered.any(0).sum() > 40, "the line runs through the text"


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    scene = tnmoe.Network.parse(FAMILIES["cp"]).diagram()
    for ending in ("png", "pdf"):
        with pytest.raises(TnmoeError, match=rf"{ending} files need vl-convert: pip install 'tnmoe\[images\]'"):
            scene.save(tmp_path / f"a.{ending}")
    assert not list(tmp_path.iterdir())
    scene.save(tmp_path / "a.svg")


def test_notebook_forms_are_well_formed() -> None:
    """Names from a user's file are escaped; each form is a single well-formed fragment."""
    plan = tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=16)
    report = tnmoe.cost(plan)
    for text in (plan._repr_html_(), report._repr_html_(), plan.program._repr_html_(), plan.table()._repr_html_()):
        ElementTree.fromstring(f"<div>{text}</div>")
    assert "<svg" in plan._repr_html_()
    assert report._repr_latex_().startswith(r"\begin{table}")
    table = Table("a < b & c", (("k", "<k>"),), (("<script>",),))
    assert table.render("html").count("script") == table.render("html").count("&lt;script&gt;") == 1


def test_a_terminal_shows_tables_not_fields() -> None:
    """Under rich, whose print takes dataclasses apart otherwise; brackets are no markup."""
    plan = tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=16)
    for shown in (plan, tnmoe.cost(plan), plan.program, plan.table()):
        console = Console(width=400, record=True, file=io.StringIO())
        console.print(shown)
        assert [line.rstrip() for line in console.export_text().splitlines()] == str(shown).splitlines()
