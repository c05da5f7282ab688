"""The documentation is true: every snippet runs, every page is listed, notebooks carry no outputs."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

from tnmoe.question import PLANNERS

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "notebooks" not in p.parts)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace for each page; their assertions hold."""
    monkeypatch.chdir(tmp_path)
    planners = dict(PLANNERS)
    module = types.ModuleType("docs_page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(snippet, str(page), "exec"), module.__dict__)
    for name in set(PLANNERS) - set(planners):  # of the page on extending
        del PLANNERS[name]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in [*PAGES, *NOTEBOOKS]:
        name = f"notebooks/{path.name}" if path.suffix == ".ipynb" else path.relative_to(ROOT / "docs").as_posix()
        assert f": {name}\n" in navigation, f"{name} is not in mkdocs.yml"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
