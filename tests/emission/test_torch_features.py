"""Emitted modules are modules like any other: compile, export, autocast, state dicts, copies, functional calls, DDP."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import oracle
from support.modules import SPECS, draw
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import tnmoe

every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)

some = pytest.mark.parametrize("name", ["cp", "tr_block", "tr_batch_norm"])

BATCHES = (7, 4, 12, 2, 33)


def fresh(spec, *, seed: int = 0, **factory) -> nn.Module:
    """A module whose gates choose."""
    return oracle.randomise(tnmoe.build(tnmoe.plan(spec, tokens=16), **factory), seed)


# ---- compile and export --------------------------------------------------------------------------------------


def close_to(got: Tensor, want: Tensor) -> None:
    """Equal to rounding: a compiled gate searches for its threshold; on few rows a plain one finds it by sorting."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.detach().abs().max())))


@pytest.fixture
def _clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_clean_dynamo")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every
def test_compiles_once_for_every_batch_size(spec, training):
    """One graph, no break, no recompilation: what a three-operand einsum would spoil."""
    module = fresh(spec).train(training)
    plain = copy.deepcopy(module)
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch in BATCHES:
        x = draw(batch, 6, seed=batch)
        close_to(compiled(x), plain(x))
    assert counter.frame_count == 1
    for got, want in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("_clean_dynamo")
@some
def test_compiles_once_for_every_batch_and_sequence(name):
    module = fresh(SPECS[name]).eval()
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens in ((3, 5), (2, 9), (8, 4)):
        x = draw(batch, tokens, 6, seed=batch)
        close_to(compiled(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_clean_dynamo")
@some
def test_compiled_training_steps(name):
    """Forward and backward through AOTAutograd, one compilation, the gradients of eager."""
    module = fresh(SPECS[name]).train()
    plain = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch in BATCHES[:3]:
        for m, call in ((module, compiled), (plain, plain)):
            m.zero_grad()
            call(draw(batch, 6, seed=batch)).square().sum().backward()
        for (parameter, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
            scale = float(q.grad.abs().max())
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-5 * max(scale, 1), msg=parameter)
    assert counter.frame_count == 1


@pytest.mark.slow
@every
def test_exports_with_a_dynamic_batch(spec):
    module = fresh(spec).eval()
    exported = torch.export.export(module, (draw(7, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in BATCHES:
        x = draw(batch, 6, seed=batch)
        close_to(exported.module()(x), module(x))


def test_exports_in_training_mode():
    """The rule for one row (`shape[0] > 1`) must not pin the batch size."""
    module = fresh(SPECS["tr_batch_norm"]).train()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(module, (draw(7, 6),), dynamic_shapes=({0: batch},)).module()
    for size in BATCHES:
        x = draw(size, 6, seed=size)
        close_to(exported(x), module(x))


def test_exports_with_dynamic_batch_and_sequence():
    module = fresh(SPECS["tr_block"]).eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    exported = torch.export.export(module, (draw(3, 5, 6),), dynamic_shapes=(dims,)).module()
    for shape in ((2, 9), (8, 4)):
        x = draw(*shape, 6)
        close_to(exported(x), module(x))


# ---- precision -----------------------------------------------------------------------------------------------


@every
def test_autocast_to_bfloat16(spec):
    """The result is bfloat16, near the float32 one, and gradients reach every parameter in its own type."""
    module = fresh(spec)
    x = draw(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    want = copy.deepcopy(module)(x)
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.05 * float(want.detach().abs().max()))
    got.float().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32
        assert bool(p.grad.isfinite().all()), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_half_precision_module(spec, dtype):
    module = fresh(spec).to(dtype)
    got = module(draw(9, 6, dtype=dtype))
    assert got.dtype == dtype
    got.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {dtype}
    again = tnmoe.build(tnmoe.plan(spec), dtype=dtype)
    assert {v.dtype for v in again.state_dict().values()} == {dtype}


# ---- state and copies ----------------------------------------------------------------------------------------


@every
def test_state_dict_round_trip(spec):
    """Strictly, into a fresh module, and through a file's bytes; nothing but tensors is in it."""
    module = fresh(spec)
    state = module.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = fresh(spec, seed=1)
    x = draw(7, 6)
    assert not torch.equal(module.eval()(x), other.eval()(x))
    other.load_state_dict(loaded, strict=True)
    assert torch.equal(module(x), other(x))
    names = {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
    assert set(state) == names


@every
def test_the_first_call_creates_nothing(spec):
    """Optimisers are made before the first call; a lazy parameter would never be trained."""
    module = fresh(spec).train()
    before = {n: id(v) for n, v in (*module.named_parameters(), *module.named_buffers())}
    attributes = set(vars(module))
    module(draw(7, 6)).sum().backward()
    assert {n: id(v) for n, v in (*module.named_parameters(), *module.named_buffers())} == before
    assert set(vars(module)) == attributes
    assert not list(module.children())


@every
def test_copies_after_a_training_step(spec):
    """deepcopy and pickle fail on modules that keep a tensor of the graph."""
    module = fresh(spec).train()
    module(draw(7, 6)).sum().backward()
    x = draw(5, 6, seed=1)
    want = module.eval()(x)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x), want)
        assert {p.data_ptr() for p in clone.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())


@every
def test_meta_then_empty_then_reset(spec):
    """How large models are built: shapes first, memory later, values last."""
    plan = tnmoe.plan(spec, tokens=16)
    module = tnmoe.build(plan, device="meta")
    assert {v.device.type for v in module.state_dict().values()} == {"meta"}
    assert module(torch.empty(7, 6, device="meta")).shape == (7, 5)
    module.to_empty(device="cpu")
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    direct = tnmoe.build(plan)
    for (name, got), want in zip(module.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


@every
def test_functional_call_and_per_example_gradients(spec):
    module = fresh(spec, dtype=torch.float64).eval()
    state = {n: v.detach() for n, v in module.named_parameters()}
    x = draw(6, 6, dtype=torch.float64)
    zeros = {n: torch.zeros_like(v) for n, v in state.items()}
    assert not torch.equal(torch.func.functional_call(module, zeros, (x,)), module(x))

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    whole = torch.func.grad(loss)(state, x)
    for name, g in whole.items():
        torch.testing.assert_close(each[name].sum(0), g, rtol=1e-9, atol=1e-9, msg=name)


def test_repr_shows_the_declaration():
    module = tnmoe.build(tnmoe.plan(SPECS["tr_block"], tokens=16))
    assert "".join(repr(module).split()) == "".join(f"TensorRingMuMoEBlock({SPECS['tr_block']})".split())


def test_names_of_state_do_not_depend_on_the_plan():
    """A checkpoint outlives the plan it was trained under; only orders that store weights otherwise may differ."""
    for spec in SPECS.values():
        few, many = (tnmoe.build(tnmoe.plan(spec, tokens=t)).state_dict() for t in (1, 1 << 20))
        assert list(few) == list(many)


# ---- data parallel -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_distributed_data_parallel():
    """In a process of its own: see data_parallel.py for why."""
    names = ["cp", "tr_block", "tr_batch_norm"]
    command = [sys.executable, "-m", "support.data_parallel", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout.split("\n")) == (0, [*(f"{n} agrees" for n in names), ""]), done.stderr
