"""The house rules that a reader cannot see at a glance: one-way imports, no cycles, no eval."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "_version": set(),
    "errors": set(),
    "values": set(),
    "routing_ops": {"values"},
    "fused_ops": {"values"},
    "ops": {"fused_ops", "routing_ops", "values"},
    "unfused": {"fused_ops", "ops"},
    "routing_cost": {"dims", "errors", "routing_ops", "values"},
    "routing_saved": {"dims", "errors", "routing_ops", "values"},
    "scripts": {"cost", "dims", "errors", "values"},
    "routing_memory": {"cost", "dims", "errors", "routing_ops", "routing_saved", "scripts", "values"},
    "dims": {"errors"},
    "report": {"errors"},
    "path": {"errors"},
    "writing": {"errors"},
    "cache": {"writing"},
    "progress": set(),
    "race": set(),
    "initialise": {"dims"},
    "drawing": {"drawing", "errors", "report"},
    "network": {"dims", "drawing", "errors"},
    "layer": {"dims", "errors", "initialise", "network", "ops"},
    "program": {"dims", "errors", "initialise", "layer", "ops", "report", "routing_ops", "unfused"},
    "passes": {"fused_ops", "initialise", "layer", "network", "ops", "passes", "program", "unfused"},
    "formulas": {"dims"},
    "integer_ranges": {"dims", "errors", "vectorised"},
    "goals": {"dims", "errors"},
    "plan_format": {"dims", "errors", "goals", "layer", "layers", "path", "report", "shortlist"},
    "shortlist": {"errors", "goals"},
    "objective": {"backward", "cost", "goals", "network", "ops", "traffic"},
    "layout": {"errors"},
    "least_squares": {"network"},
    "useful_ranks": {"layer", "network"},
    "safetensors_files": {"errors", "plan"},
    "lower": {"errors", "layer", "network", "ops", "passes", "path", "program"},
    "cost": {"dims", "errors", "ops", "program", "routing_cost", "routing_ops", "unfused"},
    "allocations": {
        "backward",
        "cost",
        "dims",
        "errors",
        "ops",
        "routing_memory",
        "routing_ops",
        "routing_saved",
        "scripts",
    },
    "training_time": {
        "adjoint",
        "backward",
        "cost",
        "datasheet",
        "errors",
        "hardware",
        "network",
        "ops",
        "program",
        "rates",
        "report",
        "reverse_mode",
        "routing_ops",
        "routing_time",
    },
    "heap": {"scripts"},
    "gradient_memory": {"allocations", "backward", "dims", "heap", "ops", "program", "routing_ops", "scripts"},
    "memory": {
        "allocations",
        "backward",
        "cost",
        "gradient_memory",
        "heap",
        "ops",
        "program",
        "routing_ops",
        "scripts",
    },
    "stream": {"adjoint", "cost", "memory", "ops", "program"},
    "function_memory": {
        "adjoint",
        "backward",
        "cost",
        "gradient_memory",
        "heap",
        "memory",
        "ops",
        "program",
        "scripts",
        "stream",
    },
    "release": {"errors", "memory", "ops", "program"},
    "backward": {"cost", "dims", "errors", "network", "ops", "program", "routing_cost", "routing_saved"},
    "reverse_mode": {"errors", "ops", "program"},
    "adjoint": {"backward", "cost", "dims", "errors", "ops", "passes", "program", "release", "reverse_mode"},
    "datasheet": {"cost", "dims", "errors", "ops", "report", "routing_time", "traffic"},
    "device_profile": {"cache", "cost", "errors", "rates", "report"},
    "function": {"adjoint", "dims", "errors", "passes", "program", "rematerialise"},
    "routing_time": {"cost", "dims", "errors", "ops", "rates", "routing_ops"},
    "hardware": {
        "adjoint",
        "cost",
        "datasheet",
        "device_profile",
        "dims",
        "errors",
        "ops",
        "program",
        "rates",
        "report",
        "routing_ops",
        "routing_time",
        "traffic",
        "unfused",
    },
    "built": {"plan"},
    "expert_rank": {"dims", "errors", "layer", "network", "plan", "rank", "report"},
    "rates": {"errors"},
    "rematerialise": {"cost", "errors", "ops"},
    "rank": {"cost", "dims", "errors", "layer", "network", "routing_ops"},
    "factorizations": {"dims", "errors", "initialise", "layer", "network", "factorizations"},
    "layers": {"dims", "errors", "factorizations", "initialise", "layer", "layers", "network", "ops", "routing_ops"},
    "files": {"errors", "layer", "layers"},
    "moe_presets": {"factorizations", "layers"},
    "published_presets": {"layers"},
    "presets": {"errors", "factorizations", "layers", "moe_presets", "published_presets"},
    "vectorised": {"dims", "errors"},
    "constraints": {"dims", "errors", "vectorised"},
    "frame": {"constraints", "errors", "report", "vectorised"},
    "traffic": {"backward", "cost", "dims", "ops", "program", "routing_ops"},
    "optimizers": {"cost", "dims", "errors", "network", "program", "traffic"},
    "counted": {
        "adjoint",
        "backward",
        "cost",
        "dims",
        "function",
        "layer",
        "network",
        "ops",
        "padding",
        "program",
        "traffic",
    },
    "padding": {"cost", "dims", "ops", "program"},
    "figures": {
        "counted",
        "function",
        "backward",
        "cost",
        "dims",
        "errors",
        "formulas",
        "layer",
        "program",
        "rank",
        "traffic",
    },
    "cost_report": {"backward", "cost", "figures", "ops", "optimizers", "program", "report", "traffic"},
    "components": {"network"},
    "plan": {
        "components",
        "adjoint",
        "backward",
        "cost",
        "cost_report",
        "dims",
        "drawing",
        "errors",
        "goals",
        "layer",
        "layers",
        "layout",
        "lower",
        "ops",
        "passes",
        "path",
        "plan_format",
        "program",
        "release",
        "function",
        "report",
        "shortlist",
    },
    "saved": {"adjoint", "allocations", "backward", "memory", "ops", "program", "routing_ops", "scripts"},
    "memory_report": {
        "allocations",
        "cost",
        "errors",
        "function_memory",
        "heap",
        "memory",
        "network",
        "ops",
        "plan",
        "program",
        "report",
        "routing_memory",
        "routing_ops",
        "saved",
        "scripts",
    },
    "variants": {"backward", "errors", "function", "layout", "plan", "rematerialise"},
    "tuned": {"errors", "plan", "report", "variants"},
    "planners": {
        "_version",
        "backward",
        "cache",
        "cost",
        "errors",
        "goals",
        "layer",
        "lower",
        "network",
        "objective",
        "ops",
        "passes",
        "path",
        "planners",
        "report",
    },
    "backends": {
        "stream",
        "adjoint",
        "backends",
        "dims",
        "errors",
        "initialise",
        "fused_ops",
        "layer",
        "network",
        "ops",
        "passes",
        "program",
        "routing_ops",
        "unfused",
        "values",
    },
}
"""Module or package: what it may import of tnmoe. The api, the command line, `check` and `__init__` are above all."""

TOP = {
    "__init__",
    "__main__",
    "advice",
    "api",
    "axes",
    "calibrate",
    "calibration_cases",
    "calibration_training",
    "candidates",
    "charts",
    "check",
    "cli",
    "crossover",
    "explain",
    "fit_ranks",
    "fit_table",
    "from_weights",
    "replace",
    "html_report",
    "limits",
    "measured",
    "peaks",
    "planning",
    "question",
    "slicing",
    "sweep",
    "counting",
    "trial",
    "tune",
}


def sources() -> list[tuple[str, Path]]:
    found = [(p.stem, p) for p in (ROOT / "tnmoe").glob("*.py")]
    for folder in (
        "tnmoe/drawing",
        "tnmoe/charts",
        "tnmoe/cli",
        "tnmoe/counting",
        "tnmoe/counting/torch_formulas",
        "tnmoe/factorizations",
        "tnmoe/layers",
        "tnmoe/passes",
        "planners",
        "backends",
    ):
        found += [(folder.removeprefix("tnmoe/").partition("/")[0], p) for p in (ROOT / folder).glob("*.py")]
    return sorted(found)


def imports(path: Path) -> list[tuple[str, bool]]:
    """First component of every import of tnmoe, and whether it stands inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if node is not function
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tnmoe":
            parts = node.module.split(".")[1:]
            names = parts[:1] or [alias.name for alias in node.names]
            found += [(name, id(node) in inside) for name in names]
        elif isinstance(node, ast.Import):
            found += [(a.name.split(".")[1], id(node) in inside) for a in node.names if a.name.startswith("tnmoe.")]
    return found


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_imports_point_one_way(module: str, path: Path) -> None:
    if module in TOP:
        return
    assert module in ALLOWED, f"{module} is new: say in ALLOWED what it may import"
    for name, inside in imports(path):
        assert name in ALLOWED[module], f"{path.name} imports tnmoe.{name}"
        assert not inside, f"{path.name} imports tnmoe.{name} inside a function"


def test_allowed_imports_have_no_cycle() -> None:
    """Packages may import themselves; nothing else comes back to where it started."""
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {m for m, wants in ALLOWED.items() if m not in done and wants - {m} <= done}
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_nothing_evaluates_text() -> None:
    """Names and sizes from a user's file never reach eval or sympify; exec runs emitted source alone."""
    for module, path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "eval", path
                assert node.func.id != "exec" or module == "api", path


def test_symlinks_show_the_packages() -> None:
    """Type checkers and a plain pytest see `tnmoe.planners` and `tnmoe.backends` where the wheel puts them."""
    for name in ("planners", "backends"):
        link = ROOT / "tnmoe" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
