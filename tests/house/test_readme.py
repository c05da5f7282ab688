"""The README and the documentation are true: snippets run, their numbers and tables are what is printed."""

from __future__ import annotations

import json
import re
import sys
import tomllib
import types
from dataclasses import fields
from pathlib import Path

import pytest
from support import snippets

import tnmoe
from tnmoe.cli.main import main
from tnmoe.layers.kinds import KINDS
from tnmoe.planning.request import PLANNERS
from tnmoe.presets.registry import PRESETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DECLARATIONS = (ROOT / "docs" / "guide" / "declarations.md").read_text(encoding="utf-8")
DOCS = sorted(p for p in (ROOT / "docs").rglob("*.md") if "notebooks" not in p.parts)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMPARED = {
    "README.md": 2,
    "docs/architecture.md": 2,
    "docs/index.md": 2,
    "docs/guide/planning.md": 4,
    "docs/guide/costs.md": 6,
    "docs/guide/training.md": 1,
}
"""At least so many values and prints of a page are compared with what its snippets give."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one namespace for each page; their assertions and comments hold."""
    monkeypatch.chdir(tmp_path)
    planners = dict(PLANNERS)
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    compared = snippets.run(page.read_text(encoding="utf-8"), module, capsys)
    assert compared >= COMPARED.get(page.relative_to(ROOT).as_posix(), 0)
    for name in set(PLANNERS) - set(planners):  # of the page on extending
        del PLANNERS[name]


def test_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = snippets.blocks(README, "text")
    with pytest.raises(SystemExit) as stop:
        main(["table", "gpt2"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(shown.rstrip("\n"))


def test_module_is_what_is_emitted() -> None:
    """The block's `forward`, and the file that has it."""
    source = tnmoe.emit(tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=PRESETS["gpt2-cp"].tokens))
    forward, whole = [b for b in snippets.blocks(README, "python") if "def forward" in b]
    assert whole == source
    assert forward.rstrip() in source


def test_toml_and_keys_are_the_schema() -> None:
    (example,) = snippets.blocks(DECLARATIONS, "toml")
    assert tnmoe.declare(tomllib.loads(example)["layer"]).name == "TensorRingMuMoEBlock"
    for kind, spec in KINDS.items():
        (row,) = re.findall(rf"^\| `{kind}` \| `([^`]*)`", DECLARATIONS, re.M)
        assert set(re.sub(r"= [\w.]+|[\[\]]", " ", row).split()) == {f.name for f in fields(spec)}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in [*DOCS, *NOTEBOOKS]:
        name = f"notebooks/{path.name}" if path.suffix == ".ipynb" else path.relative_to(ROOT / "docs").as_posix()
        assert f": {name}\n" in navigation, f"{name} is not in mkdocs.yml"


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
