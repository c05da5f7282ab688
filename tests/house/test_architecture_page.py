"""The page on the architecture, the decisions and the guide for contributors say what the tree is."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType

import pytest

import tnmoe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [ROOT / "CONTRIBUTING.md", *(p for p in (ROOT / "docs").rglob("*.md") if "notebooks" not in p.parts)]
NAMED = re.compile(r"`((?:tnmoe|planners|backends|docs|tests|benchmarks)/[\w./]*)(?::([\w.]+))?`")
"""A path of the repository, and perhaps what is defined there: `tnmoe/ir/bound.py:bind`."""

LAYER = tnmoe.MuMoE(768, 3072, 256, tnmoe.CP(556))


def script() -> ModuleType:
    """The script that draws the picture."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


rooms = script()
HOUSE = rooms.read(ROOT)

# ---- the picture ---------------------------------------------------------------------------------------------


def test_the_picture_and_the_counts_are_the_trees() -> None:
    """If this fails, rooms import other rooms than they did: run `python docs/rooms.py` and look at the picture."""
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.draw(HOUSE)
    assert rooms.counted(PAGE, HOUSE) == PAGE
    assert HOUSE.counts() in PAGE


def test_every_room_is_drawn_and_says_what_it_is_for() -> None:
    packages = {p.parent.name for p in (ROOT / "tnmoe").glob("*/__init__.py")}
    modules = {p.stem for p in (ROOT / "tnmoe").glob("*.py")} - {"__init__"}
    assert set(HOUSE.arrows) == packages | modules | {"tnmoe"}
    assert all(HOUSE.purposes.values())


@pytest.mark.slow
def test_arrows_are_what_is_imported_where_a_second_reader_looks() -> None:
    """Python itself says which rooms are loaded when one is imported: they are those that its arrows reach."""
    reached: dict[str, set[str]] = {}
    for room in reversed(HOUSE.order):
        reached[room] = {room}.union(*(reached[below] for below in HOUSE.arrows[room]))
    for room in ("ir", "lowering", "costing"):
        names = [p.stem for p in (ROOT / "tnmoe" / room).glob("*.py") if p.stem != "__init__"]
        wanted = "; ".join(f"import tnmoe.{room}.{name}" for name in names)
        shown = "import sys; print(*{m.split('.')[1] for m in sys.modules if m.startswith('tnmoe.')})"
        run = subprocess.run([sys.executable, "-c", f"{wanted}; {shown}"], capture_output=True, text=True, cwd=ROOT)
        assert set(run.stdout.split()) <= reached[room] | {"_version"}, run.stderr
        assert room in run.stdout.split()


def test_floors_and_circles() -> None:
    """Of a house that is known."""
    house = rooms.House(
        {}, {"roof": frozenset({"hall", "cellar"}), "hall": frozenset({"cellar"}), "cellar": frozenset()}
    )
    assert house.floors == {"cellar": 1, "hall": 2, "roof": 3}
    assert house.counts() == "3 rooms on 3 floors, 3 arrows"
    round_about = rooms.House({}, {"a": frozenset({"b"}), "b": frozenset({"a"})})
    with pytest.raises(ValueError, match="circle: a, b"):
        _ = round_about.floors


# ---- what pages name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_pages_name_is_there(page: Path) -> None:
    """Files, and what pages say is defined in them."""
    for path, name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"
        if name:
            assert name in defined(ROOT / path), f"{page.name} names {path}:{name}, which is not defined there"


def defined(path: Path) -> set[str]:
    """Functions, classes, their methods, and constants of a module."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names |= {f"{node.name}.{n.name}" for n in inner if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return names


def test_decisions_that_the_code_names_are_there() -> None:
    """A docstring keeps the rule and names the page that has the story; each page is in the list of all."""
    named = {
        page: path.relative_to(ROOT).as_posix()
        for folder in ("tnmoe", "planners", "backends")
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"docs/decisions/[\w-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    for page, path in named.items():
        assert (ROOT / page).exists(), f"{path} names {page}"
    pages = {p.name for p in (ROOT / "docs" / "decisions").glob("*.md")} - {"index.md"}
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(pages)


def test_what_is_not_there_is_seen() -> None:
    assert NAMED.findall("in `tnmoe/ir/bound.py:bind`, `docs/` and `make docs`") == [
        ("tnmoe/ir/bound.py", "bind"),
        ("docs/", ""),
    ]
    assert {"bind", "BoundProgram", "BoundProgram.owner"} <= defined(ROOT / "tnmoe/ir/bound.py")
    assert "unbind" not in defined(ROOT / "tnmoe/ir/bound.py")


MOVED = [line for line in (ROOT / "docs" / "moved.md").read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]


def file_of(module: str) -> Path:
    """Where a module is, or the `__init__` of a package."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("line", MOVED, ids=lambda line: line.split("`")[1])
def test_what_moved_is_where_the_page_says(line: str) -> None:
    """Modules, and names in them."""
    now = line.split("|", 2)[2]
    for name in re.findall(r"`(?:python -m )?(tnmoe\.[\w.]+)`", now):
        room, _, last = name.rpartition(".")
        assert file_of(name).exists() or last in defined(file_of(room)) or last in tnmoe.__all__, name
    for names, module in re.findall(r"((?:`\w+`(?:, )?)+)(?:: | of )`(tnmoe\.[\w.]+)`", now):
        assert set(re.findall(r"`(\w+)`", names)) <= defined(file_of(module)), (names, module)


def test_every_page_of_the_move_has_rows() -> None:
    assert len(MOVED) > 150


# ---- the two walks -------------------------------------------------------------------------------------------


def called(run: Callable[[], object]) -> list[tuple[str, str]]:
    """The functions of the tree that a run calls, in the order of their first calls: file and name."""
    first: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            first.setdefault((frame.f_code.co_filename, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    files = {file: Path(file).resolve() for file, _ in first}
    inside = {file: path.relative_to(ROOT).as_posix() for file, path in files.items() if path.is_relative_to(ROOT)}
    return [(inside[file], name) for file, name in first if file in inside]


def steps(heading: str) -> list[tuple[str, str]]:
    """The functions that the numbered steps of a section name, in order."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    numbered = re.findall(r"^\d+\. .*(?:\n   .*)*", section, re.M)
    assert len(numbered) > 5
    return [(path, name) for step in numbered for path, name in NAMED.findall(step) if name]


def read_memory(plan: tnmoe.Plan) -> None:
    """All that the second walk speaks of."""
    report = tnmoe.memory(plan)
    assert report.training_peak > report.inference_peak > report.saved_bytes


def test_the_way_of_a_rank() -> None:
    way = steps("The way of a rank")
    order = called(lambda: tnmoe.emit(tnmoe.plan(tnmoe.MuMoE(768, 3072, 256, tnmoe.CP(556)), tokens=4096)))
    assert way == sorted(way, key=order.index)
    assert len(way) > 25


def test_the_way_of_a_program_to_its_memory() -> None:
    way = steps("The way of a program to its memory")
    plan = tnmoe.plan(LAYER, tokens=4096)
    assert plan.bound.released  # made before, as the first walk tells
    order = called(lambda: read_memory(plan))
    assert way == sorted(way, key=order.index)
    assert len(way) > 15


def test_the_source_that_the_walk_shows() -> None:
    source = tnmoe.emit(tnmoe.plan(LAYER, tokens=4096))
    (shown,) = re.findall(r"```text\n(self\.input_factor.*?)```", PAGE, re.S)
    for line in shown.splitlines():
        assert line == "..." or line in source
