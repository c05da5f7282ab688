"""The rules of the house that import-linter's contracts (in `pyproject.toml`) do not say."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tnmoe

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(p for p in (ROOT / "tnmoe").rglob("*.py") if not {"backends", "planners"} & set(p.relative_to(ROOT).parts)),
    *(ROOT / "planners").rglob("*.py"),
    *(ROOT / "backends").rglob("*.py"),
]
ROOMS = [p for p in SOURCES if p.name == "__init__.py" and p.parent != ROOT / "tnmoe"]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_sources() -> None:
    assert len(SOURCES) > 250
    assert len(ROOMS) > 25


@pytest.mark.parametrize("path", ROOMS, ids=shown)
def test_rooms_export_nothing(path: Path) -> None:
    """A room's `__init__` says what the room is for: every name has one place to be imported from."""
    (only,) = tree(path).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)


def inner_imports(path: Path) -> Iterator[str]:
    """Modules of tnmoe that are imported inside a function."""
    for function in ast.walk(tree(path)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.module:
                    yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module[:5] == "tnmoe" else [])
                elif isinstance(node, ast.Import):
                    yield from (a.name for a in node.names if a.name.startswith("tnmoe"))


def test_no_import_inside_a_function_dodges_a_circle() -> None:
    """What is copied into emitted files imports torch, which planning and costing do without: it alone may wait."""
    for path in SOURCES:
        for name in inner_imports(path):
            assert name.startswith("tnmoe.backends.runtime"), f"{shown(path)} imports {name} inside a function"


def test_nothing_evaluates_text() -> None:
    """Names and sizes from a user's file never reach eval or sympify; exec runs emitted source alone."""
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "eval", path
                assert node.func.id != "exec" or shown(path) == "tnmoe/emission/build.py", path


def test_symlinks_show_the_packages() -> None:
    """Type checkers and a plain pytest see `tnmoe.planners` and `tnmoe.backends` where the wheel puts them."""
    for name in ("planners", "backends"):
        link = ROOT / "tnmoe" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_the_wheel_has_every_room() -> None:
    found = {".".join(["tnmoe", *p.parent.relative_to(ROOT).parts]).replace("tnmoe.tnmoe", "tnmoe") for p in ROOMS}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found | {"tnmoe"})


# ---- the tests -----------------------------------------------------------------------------------------------

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=shown)
def test_no_test_imports_another(path: Path) -> None:
    """What tests share is in `tests/support`, where no test is."""
    modules = [n.module or "" for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree(path)) if isinstance(n, ast.Import) for a in n.names]
    assert not [m for m in modules if m.split(".")[-1].startswith("test_") or m.split(".")[0] == "tests"]


def test_tests_lie_where_the_code_does() -> None:
    """A folder for each room, `house` for what is true of all, and no test beside the folders."""
    rooms = {p.parent.name for p in ROOMS if p.parent.parent == ROOT / "tnmoe"} | {"planners", "backends"}
    folders = {p.parent.name for p in TESTS}
    assert folders == rooms | {"house"}
    assert not list((ROOT / "tests").glob("test_*.py"))
    assert not [p for p in (ROOT / "tests/support").glob("*.py") if p.name.startswith("test_")]


# ---- the façade ----------------------------------------------------------------------------------------------


def test_the_facade_says_one_thing() -> None:
    """What type checkers read, what `*` gives and what is imported on demand are the same names from one place."""
    (checked,) = (n for n in tree(ROOT / "tnmoe/__init__.py").body if isinstance(n, ast.If))
    seen = {a.name: n.module for n in checked.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {name: f"tnmoe.{room}" for name, room in tnmoe._HOME.items()}
    assert sorted(tnmoe.__all__) == sorted([*seen, "__version__"])


@pytest.mark.parametrize("name", tnmoe.__all__)
def test_public_names(name: str) -> None:
    """Each is there, is defined where the façade says, and hides no room."""
    value = getattr(tnmoe, name)
    if name != "__version__":
        module = importlib.import_module(f"tnmoe.{tnmoe._HOME[name]}")
        assert getattr(module, name) is value
        assert getattr(value, "__module__", module.__name__) in (module.__name__, "types", "typing", "builtins")
    assert not (ROOT / "tnmoe" / name).exists()
    assert not (ROOT / "tnmoe" / f"{name}.py").exists()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tnmoe' has no attribute 'Mixtral'"):
        _ = tnmoe.Mixtral  # type: ignore[attr-defined]
    assert set(tnmoe.__all__) <= set(dir(tnmoe))


HEAVY = """
import sys
import tnmoe
heavy = {"torch", "sympy", "numpy", "rich"} & set(sys.modules)
assert not heavy, heavy
tnmoe.cost(tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3)), tokens=2))
heavy = {"torch", "matplotlib", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_an_import_is_cheap() -> None:
    """`import tnmoe` loads nothing, and a plan and its cost load no torch."""
    subprocess.run([sys.executable, "-c", HEAVY], check=True, cwd=ROOT)
