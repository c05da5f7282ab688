"""Modules with a backward pass of their own: gradients of autograd, and exactly the planned memory and FLOPs."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import blocks, case
from support.gradients import any_kept, assert_same, draw, every, gradients, measure, pair
from support.layers_strategy import any_order, layers
from support.modules import SPECS
from support.networks import random_network
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import tnmoe
from tnmoe.cli.main import main
from tnmoe.ir.value import Role
from tnmoe.planning.plan import Plan
from tnmoe.presets.registry import PRESETS

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("any_processor")

some = pytest.mark.parametrize("name", ["cp", "tr_block", "tr_batch_norm", "mlp"])

ways = pytest.mark.parametrize(
    "way",
    [
        {"memory": "save"},
        {"memory": "recompute", "chunk": 5},
        {"memory": "save", "flavour": "fast"},
        {"memory": "recompute", "flavour": "fast", "chunk": 5},
    ],
    ids=lambda w: "-".join(map(str, w.values())),
)


# ---- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=30)
@given(layers(), st.integers(0, 2**32), st.sampled_from(["portable", "fast"]), st.sampled_from([None, 1, 2]))
def test_gradients_are_those_of_autograd(spec, seed, flavour, chunk):
    """Any layer, any order, whatever is kept, any chunk: float64 to 1e-10."""
    plan = any_kept(any_order(tnmoe.plan(spec, tokens=5, flavour=flavour, chunk=chunk), seed), seed)
    plain, module = pair(plan)
    lead = random.Random(seed).choice([(0,), (1,), (5,), (2, 3)])
    assert_same(plain, module, draw(*lead, int(plan.bound.sizes["i"])), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{"memory": "recompute", "chunk": 5}, {"flavour": "fast"}], ids=str)
@every
def test_float32_is_as_close(spec, way):
    plain, module = pair(tnmoe.plan(spec, tokens=16, **way), torch.float32)
    assert_same(plain, module, draw(16, 6, dtype=torch.float32), 2e-4)


@pytest.mark.parametrize("block", blocks(100, of=25))
def test_random_networks(block: range):
    """Any einsum whose ops have an adjoint: outer products, batches, copies, frozen weights."""
    tried = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, rng.randint(2, 5), max_size=4)
            names = [t.name for t in network.tensors if t.role is Role.DATA]
            wanted = [name for name in names if rng.random() < 0.7]
            plan = tnmoe.plan(network, sizes=sizes, input_gradients=wanted)
            try:
                plan = any_kept(plan, seed)
            except tnmoe.PlanError:
                continue
            shapes = {t.name: [sizes[i] for i in t.indices] for t in network.tensors}
            inputs = [draw(*shapes[n], grad=n in wanted, seed=seed) for n in names]
            plain, module = pair(plan)
            results = []
            for m in (plain, module):
                leaves = [x for x in (*inputs, *m.parameters()) if x.requires_grad]
                y = m(*inputs)
                seed_grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
                results.append(torch.autograd.grad(y, leaves, seed_grad) if leaves else ())
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            tried += bool(results[0])
    assert tried > 8


@pytest.mark.parametrize("name", ["cp_two_levels", "tr_block"])
def test_gradcheck(name):
    """Against finite differences, over the input and all weights; sigmoid gates, which are smooth."""
    spec = replace(SPECS[name], gate=tnmoe.Gate("sigmoid", "layer"))
    _, module = pair(tnmoe.plan(spec, tokens=3, memory="recompute"))
    names, weights = zip(*((n, p.detach().clone().requires_grad_()) for n, p in module.named_parameters()))

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (draw(3, 6), *weights), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "input_gradients"),
    [("gpt2-cp", True), ("gpt2-tr", False), ("mixer-token-tr", True), ("clip-128-cp", False)],
)
@ways
def test_presets_train_as_predicted(name, way, input_gradients):
    """Equality of the cost report with torch's counter and hooks, formulas included."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=12, input_gradients=input_gradients, **way)
    report = tnmoe.cost(plan)
    x = torch.randn(12, int(plan.bound.sizes["i"]), requires_grad=input_gradients)
    assert measure(tnmoe.build(plan), x) == (report.training_matmul_flops, report.saved_bytes)
    assert (4 * plan.saved, plan.training_flops) == (report.saved_bytes, report.training_flops)
    formula = report.formula("saved_bytes")
    assert formula.subs({s: plan.values[s.name] for s in formula.free_symbols}) == report.saved_bytes


@pytest.mark.slow
@settings(max_examples=15)
@given(layers(), st.integers(0, 2**32), st.booleans())
def test_whatever_is_kept_is_predicted(spec, seed, input_gradients):
    plan = any_order(tnmoe.plan(spec, tokens=5, input_gradients=input_gradients), seed)
    plan = any_kept(plan, seed)
    report = tnmoe.cost(plan)
    x = draw(5, int(plan.bound.sizes["i"]), dtype=torch.float32, grad=input_gradients)
    flops, saved = measure(tnmoe.build(plan), x)
    assert (flops, saved) == (report.training_matmul_flops, report.saved_bytes)


def test_gpt2_block_at_4096_tokens():
    """By hand, in float32 elements for each token of the CP block: kept by the gate are logits, root and result.

    Besides them x̂ (768) and, of the block, R = 556 for each product kept; "save" leaves out both Hadamard products and
    the GELU's result, "recompute" the hidden layer (3072) and the mixed expert factors as well.
    """
    gate = 3 * 256 + 2 + 2  # logits, root, coefficients; mean and 1/σ of both norms
    for memory, kept in (("save", 4 * 556 + 3072), ("recompute", 2 * 556)):
        plan = tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=4096, memory=memory)
        assert plan.saved == 4096 * (gate + 768 + kept)
        assert set(plan.function.kept) >= {"up_projected", "down_projected"}
    repeated = plan.training_flops - tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=4096).training_flops
    products = 2 * 4096 * 556 * (3072 + 2 * 256)  # the hidden layer, and both mixed factors
    hadamards_and_gelu = 4096 * (2 * 556 + 5 * 3072)
    gate_gradients_added = 4096 * 256  # an op here; autograd adds those of both layers uncounted
    assert repeated == products + hadamards_and_gelu + gate_gradients_added


def test_budgets_are_met_with_the_fewest_flops():
    spec = PRESETS["gpt2-cp"].spec
    previous = None
    for budget in (600_000, 1_000_000, 1_500_000, 10**9):
        report = tnmoe.cost(tnmoe.plan(spec, tokens=64, memory=budget))
        assert report.saved_bytes <= budget
        assert previous is None or report.training_flops <= previous
        previous = report.training_flops
    gate_gradients_added = 64 * 256  # an op here; autograd adds those of both layers uncounted
    assert previous == tnmoe.cost(tnmoe.plan(spec, tokens=64)).training_flops + gate_gradients_added


# ---- modules like any other ----------------------------------------------------------------------------------


@ways
@some
def test_frozen_parameters_get_no_gradient(name, way):
    plain, module = pair(tnmoe.plan(SPECS[name], tokens=16, **way))
    for k, parameters in enumerate(zip(plain.parameters(), module.parameters(), strict=True)):
        for p in parameters:
            p.requires_grad_(k % 2 == 0)
    assert_same(plain, module, draw(9, 6, grad=False), 1e-10)
    assert_same(plain, module, draw(9, 6), 1e-10)


def test_second_derivatives_are_refused():
    _, module = pair(tnmoe.plan(SPECS["cp"], tokens=8, memory="save"))
    x = draw(4, 6)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_a_gradient_that_was_not_planned_is_refused():
    """Silence would be a wrong gradient."""
    spec = tnmoe.MLP(6, 8, 5)
    _, module = pair(tnmoe.plan(spec, tokens=8, memory="save", input_gradients=False))
    module(draw(4, 6, grad=False)).sum().backward()
    with pytest.raises(RuntimeError, match="without a gradient of x"):
        module(draw(4, 6)).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [("cp", {"memory": "save"}), ("tr_batch_norm", {"memory": "recompute", "flavour": "fast", "chunk": 5})],
)
def test_compiled_training_steps(name, way):
    """One graph and one compilation for every batch size, with the gradients of eager."""
    torch._dynamo.reset()
    plain, module = pair(tnmoe.plan(SPECS[name], tokens=16, **way))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module.train(), fullgraph=True, dynamic=True, backend=counter)
    for batch in (7, 4, 12):
        want = gradients(plain.train(), draw(batch, 6, seed=batch))
        got = gradients(compiled, draw(batch, 6, seed=batch))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "way"),
    [("cp", {"memory": "save"}), ("tr_batch_norm", {"memory": "recompute", "flavour": "fast", "chunk": 5})],
)
def test_exports_with_a_dynamic_batch(name, way):
    _, module = pair(tnmoe.plan(SPECS[name], tokens=16, **way))
    module.eval()
    x = draw(7, 6, grad=False)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (2, 12):
        x = draw(batch, 6, grad=False)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("way", [{"memory": "recompute", "chunk": 5}, {"flavour": "fast"}], ids=str)
@some
def test_autocast_to_bfloat16(name, way):
    """Result and gradients near those of the plain module under autocast, each gradient in its parameter's type."""
    plain, module = pair(tnmoe.plan(SPECS[name], tokens=16, **way), torch.float32)
    x = draw(9, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_grads = gradients(module, x)
        want, want_grads = gradients(plain, x)
    assert got.dtype == want.dtype == torch.bfloat16
    for a, b in zip([got, *got_grads], [want, *want_grads], strict=True):
        assert a.dtype == b.dtype
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * max(scale, 1e-3))


@ways
@some
def test_copies_and_functional_calls(name, way):
    plain, module = pair(tnmoe.plan(SPECS[name], tokens=16, **way))
    x = draw(7, 6)
    module(x).sum().backward()
    assert_same(plain, copy.deepcopy(module), x, 1e-10)
    weights = {n: p.detach() for n, p in plain.named_parameters()}

    def loss(values: dict[str, Tensor], m: nn.Module) -> Tensor:
        return torch.func.functional_call(m, values, (x.detach(),)).square().sum()

    for (key, got), want in zip(
        torch.func.grad(loss)(weights, module).items(), torch.func.grad(loss)(weights, plain).values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("flavour", ["portable", "fast"])
def test_no_gradient_no_memory(flavour):
    """Without a gradient nothing is kept, and the result is that of training."""
    plain, module = pair(tnmoe.plan(SPECS["tr_block"], tokens=16, memory="save", flavour=flavour), torch.float32)
    x = draw(9, 6, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-4)
        assert not module(x).requires_grad


def test_fast_falls_back(monkeypatch: pytest.MonkeyPatch):
    """Where oneDNN is switched off, or the type is not its own, the public products run."""
    plain, module = pair(tnmoe.plan(SPECS["cp"], tokens=16, flavour="fast"), torch.float32)
    calls = []
    namespace = type(module).forward.__globals__
    if namespace["_onednn"] is None:
        pytest.skip("this torch has no oneDNN product")
    real = namespace["_onednn"]
    monkeypatch.setitem(namespace, "_onednn", lambda *args: calls.append(args) or real(*args))
    x = draw(9, 6, dtype=torch.float32)
    assert_same(plain, module, x, 2e-4)
    assert len(calls) == 12  # four forward, eight backward, the gate among them
    calls.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same(plain, module, x, 2e-4)
    assert_same(plain.double(), module.double(), x.detach().double().requires_grad_(), 1e-10)
    assert not calls


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT", "SVE256"])
def test_fast_is_portable_where_onednn_is_slower(capability: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    namespace: dict[str, object] = {"__name__": "emitted"}
    exec(tnmoe.emit(tnmoe.plan(SPECS["cp"], tokens=16, flavour="fast")), namespace)
    assert namespace["_onednn"] is None
    product = namespace["_mm"]
    assert callable(product)
    a, b, bias = draw(3, 4), draw(4, 5), draw(5)
    torch.testing.assert_close(product(a, b, bias), a @ b + bias)


@some
def test_chunks_allocate_no_more_than_a_chunk(name):
    """Without a gradient, 64 times the tokens need 64 times the result, and the same rooms."""
    plan = tnmoe.plan(SPECS[name], tokens=16, memory="save", chunk=8)
    _, module = pair(plan)
    function = type(module).forward.__globals__[f"_{type(module).__name__}Function"]
    shapes = []
    for tokens in (8, 512):
        with torch.no_grad():
            arrays = [
                draw(tokens, *(int(plan.bound.sizes[i]) for i in v.indices[1:]), grad=False)
                if v.indices[:1] == plan.bound.output.indices[:1]
                else draw(*(int(plan.bound.sizes[i]) for i in v.indices), grad=False)
                for v in plan.adjoint.inputs
            ]
            sizes = Recorder()
            with sizes:
                function.apply(True, *arrays)
            shapes.append(sizes.found)
    few, many = map(Counter, shapes)
    assert many - few == {512 * 5 * 8: 1}  # the result alone
    assert few - many == {8 * 5 * 8: 1}


class Recorder(TorchDispatchMode):
    """Bytes of every array that is allocated as such."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.found.append(result.untyped_storage().nbytes())
        return result


def test_per_sample_gradients_of_chunks():
    """`vmap` of `grad` over a module that streams: it sees plain ops."""
    plain, module = pair(tnmoe.plan(SPECS["tr_block"], tokens=16, memory="recompute", chunk=5))
    x = draw(4, 7, 6, grad=False)

    def loss(m, values, row):
        return torch.func.functional_call(m, values, (row,)).square().sum()

    weights = {n: p.detach() for n, p in plain.named_parameters()}
    got, want = (
        torch.func.vmap(torch.func.grad(lambda v, r, m=m: loss(m, v, r)), in_dims=(None, 0))(weights, x)
        for m in (module, plain)
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


# ---- the plan ------------------------------------------------------------------------------------------------


@ways
def test_plans_round_trip(way):
    plan = tnmoe.plan(SPECS["tr_block"], tokens=16, **way)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert tnmoe.emit(again) == tnmoe.emit(plan)


def test_command_line(capsys, tmp_path):
    """`--keep`, `--flavour` and `--chunk` are what the calls take; a plan in JSON has them already."""
    with pytest.raises(SystemExit) as stop:
        main(["emit", "clip-128-cp", "--tokens", "64", "--keep", "recompute", "--flavour", "fast", "--chunk", "32"])
    assert stop.value.code == 0
    way = {"memory": "recompute", "flavour": "fast", "chunk": 32}
    plan = tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=64, **way)
    assert capsys.readouterr().out == tnmoe.emit(plan)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    for arguments, code in ((["emit", str(file)], 0), (["emit", str(file), "--keep", "save"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert tnmoe.memory(tnmoe.Plan.from_json(file.read_text())).training_peak == tnmoe.memory(plan).training_peak


def test_golden_file(update_golden):
    """A person reads what changes: forward, what is kept, and backward of a CP block."""
    spec = tnmoe.MuMoEBlock(16, 64, 16, 8, tnmoe.CP(12), tnmoe.Gate("entmax15", "layer"), input_norm=True)
    source = tnmoe.emit(tnmoe.plan(spec, tokens=64, memory="recompute", flavour="fast", chunk=32)).encode()
    path = GOLDEN / "cp_block_training.py"
    if update_golden:
        path.write_bytes(source)
    assert path.is_file(), f"{path} is missing; run pytest --update-golden and read what it writes"
    assert path.read_bytes() == source, f"{path} differs; run pytest --update-golden and read the difference"


def test_sources_are_lint_clean_and_deterministic(tmp_path):
    """ruff finds nothing, no line is beyond 100 columns, and the same plan gives the same bytes."""
    ways = itertools.product(("gpt2-cp", "gpt2-tr", "clip-128-tr"), ("save", "recompute"), ("portable", "fast"))
    for k, (name, memory, flavour) in enumerate(ways):
        first, again = (
            tnmoe.emit(tnmoe.plan(PRESETS[name].spec, tokens=64, memory=memory, flavour=flavour)) for _ in range(2)
        )
        assert first == again
        assert [line for line in first.splitlines() if len(line) > 100 or line != line.rstrip()] == []
        (tmp_path / f"emitted_{k}.py").write_text(first, encoding="utf-8")
    (tmp_path / "ruff.toml").write_text((GOLDEN / "ruff.toml").read_text())
    done = subprocess.run([sys.executable, "-m", "ruff", "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bad_input_says_what_to_do():
    spec = SPECS["cp"]
    for wrong in ("less", -1, 1.5, True):
        with pytest.raises(tnmoe.PlanError, match="memory must be"):
            tnmoe.plan(spec, memory=wrong)
    with pytest.raises(tnmoe.PlanError, match="flavour"):
        tnmoe.plan(spec, flavour="fastest")
    with pytest.raises(tnmoe.PlanError, match=r"the least .* is [\d,]+ bytes"):
        tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=64, memory=1)
    for wrong in (0, -1, 2.5, "8", True):
        with pytest.raises(tnmoe.PlanError, match="chunk must be"):
            tnmoe.plan(spec, chunk=wrong)
    for text in ("ti,ij->j", "it,ij->tj", "ti,ij->jt"):
        network = tnmoe.Network.parse(text, weights="ij")
        with pytest.raises(tnmoe.PlanError, match="chunk= needs tokens"):
            tnmoe.plan(network, sizes=dict.fromkeys(network.indices, 4), chunk=2)
    frozen = tnmoe.Network.parse("ab,bc->ac", frozen="bc")
    with pytest.raises(tnmoe.PlanError, match="needs no gradient"):
        tnmoe.plan(frozen, sizes={"a": 2, "b": 3, "c": 4}, memory="save", input_gradients=False)


@pytest.mark.parametrize("flavour", ["portable", "fast"])
@pytest.mark.parametrize(
    ("expression", "weights"),
    [("bci,ir,ro->bco", "ir ro"), ("bcd,di,io->bco", "di io"), ("tgi,ir,rj,tgj->tg", "ir rj")],
)
def test_chunks_of_data_with_several_free_axes(expression: str, weights: str, flavour: str) -> None:
    """Sizes that only the data knows are read inside each chunk, also in the last, shorter one."""
    sizes = dict.fromkeys(set(expression) - set(",->"), 4)
    net = tnmoe.Network.parse(expression, weights=weights)
    module = tnmoe.build(tnmoe.plan(net, sizes=sizes, flavour=flavour, chunk=2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    arrays = {}
    for tensor in net.tensors:
        shape = [{**sizes, tensor.indices[0]: 5, tensor.indices[1]: 3}[i] for i in tensor.indices]
        if tensor.role is not tnmoe.Role.DATA:
            shape = [4] * len(tensor.indices)
        arrays[tensor.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    data = {t.name: arrays[t.name].requires_grad_() for t in net.tensors if t.role is tnmoe.Role.DATA}
    stored = {t.name: t.indices for t in tnmoe.plan(net, sizes=sizes, flavour=flavour, chunk=2).bound.parameters}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            declared = net.tensor(name).indices
            parameter.copy_(arrays[name].permute([declared.index(i) for i in stored[name]]))
    expected = torch.einsum(expression, *arrays.values())
    result = module(*data.values())
    assert torch.allclose(result, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(result.square().sum(), list(data.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(data.values()))
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, rtol=0, atol=1e-10)
