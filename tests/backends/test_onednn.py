"""The product of the flavour `fast` over many rows: exact, counted, and without any copy."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import oracle
from support.modules import SPECS
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.backends.runtime import onednn
from tnmoe.backends.runtime.onednn import _mm, _over_rows

SHAPES = [(2048, 8, 8), (2048, 38, 768), (2048, 768, 38), (2500, 40, 33), (49152, 16, 11), (3, 5, 7), (1, 1, 1)]


@pytest.mark.parametrize(("rows", "left", "right"), SHAPES)
def test_sums_over_rows_as_a_convolution(rows: int, left: int, right: int) -> None:
    a, b = torch.randn(rows, left), torch.randn(rows, right)
    with FlopCounterMode(display=False) as counter:
        found = _over_rows(a, b)
    assert counter.get_total_flops() == 2 * rows * left * right
    assert found.shape == (left, right)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), a.double().mT @ b.double(), rtol=0, atol=1e-4 * rows**0.5)


def test_takes_no_memory_but_its_result() -> None:
    a, b = torch.randn(2048, 32), torch.randn(2048, 24)
    with MemTracker() as found:
        kept = _over_rows(a, b)
        peak = sum(s["Total"] for s in found.get_tracker_snapshot("peak").values())
    assert peak == sum(t.untyped_storage().nbytes() for t in (a, b, kept))


def test_gradients_of_weights_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is called where oneDNN multiplies, for the weight alone, and gives the same gradients."""
    calls = []

    def spied(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a.shape, b.shape))
        return _over_rows(a, b)

    monkeypatch.setattr(onednn, "_over_rows", spied)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    x, w = torch.randn(2048, 12, requires_grad=True), torch.randn(12, 9, requires_grad=True)
    seed = torch.randn(2048, 9)
    got = torch.autograd.grad(_mm(x, w), (x, w), seed)
    assert calls == ([] if onednn._onednn is None else [((2048, 12), (2048, 9))])
    for one, other in zip(got, torch.autograd.grad(x @ w, (x, w), seed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("a", "b", "threads"),
    [
        (torch.ones(2048, 12), torch.ones(2048, 9), 1),
        (torch.ones(2047, 12), torch.ones(2047, 9), 2),
        (torch.ones(2048, 9), torch.ones(2048, 12), 2),
        (torch.ones(2048, 12), torch.ones(2048, 7), 2),
        (torch.ones(2048, 12), torch.ones(9, 2048).mT, 2),
        (torch.ones(12, 2048).mT, torch.ones(2048, 9), 2),
    ],
    ids=["one thread", "few rows", "few columns on the left", "few columns", "right turned", "left turned"],
)
def test_other_products_stay_products(a: Tensor, b: Tensor, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Tensor) -> Tensor:
        raise AssertionError("a product of this kind is faster as it is")

    monkeypatch.setattr(onednn, "_over_rows", never)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(_mm(a.mT, b), torch.full((a.shape[1], b.shape[1]), float(len(a))))


def test_under_vmap_and_compile() -> None:
    a, b = torch.randn(3, 2048, 10), torch.randn(3, 2048, 9)
    want = a.mT @ b
    torch.testing.assert_close(torch.func.vmap(lambda s, t: _mm(s.mT, t))(a, b), want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.func.vmap(lambda s: _mm(s.mT, b[0]))(a)[0], want[0], rtol=1e-4, atol=1e-3)
    compiled = torch.compile(lambda s, t: _mm(s.mT, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a[0], b[0]), want[0], rtol=1e-4, atol=1e-3)


# ---- autocast ------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """How often each operation runs that computes: views, empty tensors and changes of type or place aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name() and func.name() != "aten::detach":
            self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"memory": "save"}, {"memory": "recompute"}], ids=str)
@pytest.mark.parametrize("name", ["cp", "tr_block", "tr_batch_norm", "custom", "mlp"])
def test_under_autocast_it_is_the_portable_module(name: str, way: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations, forward and backward, and the same numbers; those planned to keep less still do."""
    results = []
    for flavour in ("portable", "fast"):
        plan = tnmoe.plan(SPECS[name], tokens=16, input_gradients=True, flavour=flavour, **way)
        module = oracle.randomise(tnmoe.build(plan, dtype=torch.float32), 0)
        if flavour == "fast":
            space = vars(sys.modules[type(module).__module__])
            monkeypatch.setitem(space, "_onednn", torch.ops.mkldnn._linear_pointwise)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with Ops() as ops:
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            y.float().square().mean().backward()
        results.append((y.detach(), ops.count, [x.grad, *(p.grad for p in module.parameters())]))
    (y, count, grads), (fast_y, fast_count, fast_grads) = results
    assert torch.equal(y, fast_y)
    assert y.dtype == torch.bfloat16
    assert not any("mkldnn" in op for op in fast_count)
    assert count == fast_count
    for want, got in zip(grads, fast_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-2 * float(want.abs().max()))


def test_steps_aside_where_nothing_was_asked_but_products() -> None:
    """What a plan says of it survives its JSON form, and a plan of before has no such thing."""
    spec = SPECS["tr_block"]
    for way, aside in (({}, True), ({"memory": "save"}, False), ({"chunk": 4}, False)):
        plan = tnmoe.plan(spec, tokens=16, flavour="fast", **way)
        assert plan.function.aside is aside
        assert tnmoe.Plan.from_json(plan.to_json()) == plan
        assert ("_autocasts(" in tnmoe.emit(plan)) is aside
    with pytest.raises(tnmoe.PlanError, match="aside"):
        tnmoe.Plan.from_json(plan.to_json().replace('"flavour": "fast"', '"flavour": "fast", "aside": 1'))


# ---- what torch's own counter sees ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 2048])
@pytest.mark.parametrize("way", [{}, {"memory": "recompute"}, {"chunk": 5}, {"chunk": 1024, "memory": 10**9}], ids=str)
@pytest.mark.parametrize("name", ["cp", "tr_block", "mlp", "custom"])
def test_a_users_counter_sees_all_flops(name: str, way: dict, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a module that was imported where oneDNN multiplies: forward and backward, with no formula of the user's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that long sums are those of a convolution
    plan = tnmoe.plan(SPECS[name], tokens=rows, flavour="fast", input_gradients=True, **way)
    module = tnmoe.build(plan, name="Counted")  # a name of its own, so that this source is imported here
    assert vars(sys.modules[type(module).__module__])["_onednn"] is torch.ops.mkldnn._linear_pointwise
    x = torch.randn(rows, 6, requires_grad=True)
    report = tnmoe.cost(plan)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert counter.get_total_flops() == report.matmul_flops
    with Ops() as ops, FlopCounterMode(display=False) as counter:
        y.mean().backward()
    assert report.matmul_flops + counter.get_total_flops() == report.training_matmul_flops
    assert ops.count["mkldnn::_linear_pointwise"]


ALONE = """
import importlib.util, sys
import torch
torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
layers = []
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("emitted", path)
    emitted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emitted)
    layers += [v() for v in vars(emitted).values() if isinstance(v, type) and issubclass(v, torch.nn.Module)]
assert "tnmoe" not in sys.modules
for layer in layers:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(torch.randn(16, 6))
    print(counter.get_total_flops())
"""


@pytest.mark.slow
def test_emitted_files_tell_the_counter_alone(tmp_path: Path) -> None:
    """Two files in one process, without this package."""
    plans = [tnmoe.plan(SPECS[name], tokens=16, flavour="fast") for name in ("cp", "mlp")]
    paths = [tmp_path / f"layer_{k}.py" for k, _ in enumerate(plans)]
    for plan, path in zip(plans, paths, strict=True):
        path.write_text(tnmoe.emit(plan), encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in done.stdout.split()] == [tnmoe.cost(plan).matmul_flops for plan in plans]
