"""Emitted files as files: standalone, deterministic, lint-clean, and the ones on record."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.emitted_files import EMITTED_PRESETS, RECORDED, ruff, variety
from support.layers_strategy import any_order, layers

import tnmoe
from tnmoe.ir.contractions import Permute

GOLDEN = Path(__file__).parents[1] / "golden"

WIDTH = 100


def recorded(name: str) -> str:
    return tnmoe.emit(tnmoe.plan(RECORDED[name], tokens=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source of `variety` as a file."""
    path = tmp_path_factory.mktemp("emitted")
    for name, source in variety():
        (path / f"{name}.py").write_text(source, encoding="utf-8")
    return path


# ---- golden files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_golden_files(name, update_golden):
    """A change of the emitter shows as a change of a file that a person reads; `--update-golden` accepts it."""
    path = GOLDEN / f"{name}.py"
    source = recorded(name).encode()
    if update_golden:
        path.write_bytes(source)
    assert path.is_file(), f"{path} is missing; run pytest --update-golden and read what it writes"
    assert path.read_bytes() == source, f"{path} differs; run pytest --update-golden and read the difference"


# ---- determinism ---------------------------------------------------------------------------------------------

HASHES = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from support.emitted_files import variety
for name, source in variety():
    print(name, hashlib.sha256(source.encode()).hexdigest())
"""


@pytest.mark.slow
def test_same_bytes_under_any_hash_seed():
    """Sets and dictionaries of names must not decide an order."""
    script = HASHES.format(tests=str(Path(__file__).parents[1]))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": seed}, text=True
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert len(first.splitlines()) > 100
    assert first == second


@pytest.mark.slow
@settings(max_examples=30)
@given(spec=layers())
def test_same_bytes_from_a_saved_plan(spec):
    plan = tnmoe.plan(spec, tokens=64)
    again = tnmoe.Plan.from_json(plan.to_json())
    assert tnmoe.emit(plan) == tnmoe.emit(plan) == tnmoe.emit(again)


# ---- what is in a file ---------------------------------------------------------------------------------------


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Last name of what is called, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", ""), node


def rooted_in_self(node: ast.expr) -> bool:
    """True for `self.weight` and any chain of methods and views on it."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return True
        node = node.func if isinstance(node, ast.Call) else node.value
    return False


@pytest.mark.slow
def test_imports_torch_alone(folder):
    for path in folder.iterdir():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            assert {n.partition(".")[0] for n in names} <= {"torch"}, path.name


@pytest.mark.slow
def test_no_einsum_of_three_and_no_concatenation(folder):
    """Torch replans such an einsum on every call; a column of ones copies the input."""
    for path in folder.iterdir():
        for name, call in called(ast.parse(path.read_text(encoding="utf-8"))):
            assert name not in {"cat", "concat", "concatenate", "stack", "hstack"}, path.name
            assert name != "pad" or "monarch" in path.name, path.name  # declared with pad = true
            assert name != "einsum" or len(call.args) <= 3, path.name


@pytest.mark.parametrize("preset", EMITTED_PRESETS, ids=lambda p: p.name)
def test_presets_copy_no_weight(preset):
    """Weights are stored as the matrix products want them; `.mT` is a view that costs nothing."""
    plan = tnmoe.plan(preset.spec, tokens=preset.tokens)
    for name, call in called(ast.parse(tnmoe.emit(plan))):
        if name in {"permute", "transpose", "contiguous", "clone", "movedim", "t"}:
            assert not rooted_in_self(call.func), ast.unparse(call)
    assert not [op for op in plan.program.ops if isinstance(op, Permute)], "nor is any intermediate value copied"


def test_a_planned_order_copies_no_weight():
    """The best order here joins experts and projection first, and leaves the bonds in the other order."""
    gate = tnmoe.Gate("softmax", "none")
    spec = tnmoe.MuMoEBlock(196, 768, 3072, 4, tnmoe.TensorRing((8, 37, 37)), gate, bias=False, input_norm=True)
    plan = tnmoe.plan(spec, tokens=4096)
    weights = {p.name for p in plan.program.parameters}
    assert not [op for op in plan.program.ops if isinstance(op, Permute) and op.x.name in weights]


@pytest.mark.slow
@settings(max_examples=60)
@given(spec=layers(max_levels=4), seed=st.integers(0, 2**16))
def test_without_a_bias_no_order_copies_a_weight(spec, seed):
    """Each weight then has one consumer, for which it can be stored. (Along with a folded bias it may have two.)"""
    plan = any_order(tnmoe.plan(replace(spec, bias=False), tokens=64, planner="greedy"), seed)
    weights = {p.name for p in plan.program.parameters}
    copied = [op for op in plan.program.ops if isinstance(op, Permute) and op.x.name in weights]
    assert not copied


@pytest.mark.parametrize("name", RECORDED)
def test_the_docstring_declares_the_layer(name):
    """The declaration in the file is the TOML that makes the file."""
    tree = ast.parse(recorded(name))
    (made,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))
    text = ast.get_docstring(made)
    block = text.partition("Declaration:\n")[2].partition("\n\n")[0]
    layer = tnmoe.declare(tomllib.loads(block))
    assert layer.declaration == RECORDED[name].layer().declaration
    report = tnmoe.cost(tnmoe.plan(RECORDED[name], tokens=64))
    for figure in (report.parameters, report.macs, report.flops, report.matmul_flops):
        assert f"{figure:,}" in text
    assert f"{tnmoe.__version__}" in ast.get_docstring(tree)


@pytest.mark.parametrize(
    "name", ["super", "tuple", "ValueError", "_Entmax15Root", "_entmax15_threshold", "Tensor", "nn", "class"]
)
def test_class_names_that_would_break_the_file(name):
    """Refused, or harmless: a class called `super` would call itself."""
    plan = tnmoe.plan(tnmoe.MuMoE(4, 3, 2, tnmoe.CP(2)), tokens=4)
    try:
        source = tnmoe.emit(plan, name=name)
    except (tnmoe.EmitError, tnmoe.DeclarationError):
        return
    space = {"__name__": "emitted"}
    exec(compile(source, "emitted", "exec"), space)
    module = space[name]()
    assert module(torch.randn(5, 4)).shape == (5, 3)
    with pytest.raises(ValueError, match="expected"):
        module(torch.randn(5, 5))


def test_several_layers_need_names_that_differ():
    plan = tnmoe.plan(tnmoe.MuMoE(4, 3, 2, tnmoe.CP(2)), tokens=4)
    with pytest.raises(tnmoe.EmitError, match="CPMuMoE"):
        tnmoe.emit([plan, plan])
    tree = ast.parse(tnmoe.emit([plan, plan], name=["First", "Second"]))
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef)]
    assert classes == ["_Entmax15Root", "First", "Second"], "the gate's function stands once, before the layers"


@pytest.mark.slow
def test_ruff_check(folder):
    """With more than the default rules: imports in order, nothing unused, modern syntax."""
    ruff("check", str(folder), "--select", "E,F,W,I,B,UP,PIE", "--line-length", str(WIDTH))


@pytest.mark.slow
def test_ruff_format(folder):
    ruff("format", "--check", "--diff", str(folder), "--line-length", str(WIDTH))


# ---- on its own ----------------------------------------------------------------------------------------------

ALONE = """
import importlib.abc, importlib.util, pathlib, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tnmoe", "entmax"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    emitted = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = emitted
    spec.loader.exec_module(emitted)
    made, *_ = (v for v in vars(emitted).values() if isinstance(v, type) and issubclass(v, torch.nn.Module))
    torch.manual_seed(0)
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-4)
    x = torch.randn(32, 16)
    before = [p.detach().clone() for p in layer.parameters()]
    (layer(x) - 1).square().mean().backward()
    optimizer.step()
    for p, old in zip(layer.parameters(), before):
        assert bool(p.isfinite().all()) and not torch.equal(p, old), path.name
    if hasattr(layer, "expert_coefficients"):
        for a in layer.expert_coefficients(x):
            assert torch.allclose(a.sum(-1), torch.ones(32))
assert "tnmoe" not in sys.modules
print("trained", len(list(pathlib.Path(sys.argv[1]).glob("*.py"))))
"""


@pytest.mark.slow
def test_runs_and_trains_where_tnmoe_is_absent(tmp_path):
    """The file goes to people who have torch and nothing of ours."""
    for name in RECORDED:
        (tmp_path / f"{name}.py").write_text(recorded(name), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"trained {len(RECORDED)}"
