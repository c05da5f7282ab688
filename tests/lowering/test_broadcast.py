"""Small matrices broadcast to a mode in the middle of a tensor: no copies, and every figure as torch counts it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.cases import case
from support.function_memory import reported, tracked
from support.training import saved_bytes
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.backends.numpy.execute import execute
from tnmoe.ir.contractions import Contract, ContractAdd, MatmulGroups, Permute, is_matmul, matmul_groups
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value
from tnmoe.lowering import broadcast
from tnmoe.planning.plan import Plan

TUCKER = "befg,hijklm,ah,ci,dj,ek,fl,gm->bacd"
FULL = dict(zip("befgacdhijklm", (2048, 4, 12, 16, 4, 12, 16, 3, 8, 11, 3, 8, 11), strict=True))
"""A Tucker layer 768 → 768 of tensorly-torch, at 10 % of the dense parameters."""

NETWORKS = {
    "tucker": TUCKER,
    "tucker, 2 modes": "bef,hikl,ah,ci,ek,fl->bac",
    "kronecker": "befg,ae,cf,dg->bacd",
    "cp": "befg,er,fr,gr,ar,cr,dr->bacd",
    "tensor train": "befg,aep,pcfq,qdg->bacd",
    "product of weights": "befg,ek,kl,fm->blmg",
    "several summed": "befgh,efk->bkgh",
    "several in front": "bgefh,efkl->bgklh",
    "two inputs": "bef,bgh,ek,gl->bkflh",
}
WAYS = {
    "autograd": {},
    "save": {"memory": "save"},
    "recompute": {"memory": "recompute", "flavour": "fast"},
    "chunk": {"memory": "recompute", "chunk": 2},
    "fast chunk": {"memory": "save", "chunk": 3, "flavour": "fast"},
}


def broadcasts(program: Program) -> int:
    return sum(isinstance(op, Contract) and bool(matmul_groups(op).outer) for op in program.ops)


def copies(program: Program) -> int:
    return sum(isinstance(op, Permute) for op in program.ops)


def plan_of(expression: str, sizes: dict[str, int], **options: object) -> Plan:
    """A plan of a network whose inputs are the terms that start with b."""
    terms = expression.split("->")[0].split(",")
    network = tnmoe.Network.parse(expression, weights=" ".join(t for t in terms if t[0] != "b"))
    return tnmoe.plan(network, sizes=sizes, **options)  # type: ignore[arg-type]


def test_groups() -> None:
    """`out[outer, rows, cols] = lhs[rows, inner] @ rhs[outer, inner, cols]`, laid out exactly so, and nothing else."""

    def product(out: str, lhs: str, rhs: str) -> Contract:
        return Contract(Value("y", tuple(out)), Value("w", tuple(lhs)), Value("x", tuple(rhs)))

    for lhs in ("ke", "ek"):
        op = product("bckfg", lhs, "bcefg")
        assert matmul_groups(op) == MatmulGroups((), ("k",), ("e",), ("f", "g"), ("b", "c"))
        assert is_matmul(op)
    for out, lhs, rhs in (
        ("kbcf", "ke", "bcef"),
        ("bkcf", "ke", "bcef"),
        ("bcfk", "ke", "bcef"),
        ("bckf", "ke", "becf"),
    ):
        assert not matmul_groups(product(out, lhs, rhs)).outer
        assert not is_matmul(product(out, lhs, rhs))
    assert not matmul_groups(product("kf", "ke", "ef")).outer  # nothing in front
    assert not matmul_groups(product("bkf", "bke", "bef")).outer  # a batch of matrices
    op = product("bkf", "ke", "bef")
    added = ContractAdd(op.out, op.lhs, op.rhs, Value("c", ("f",)))
    assert not matmul_groups(added).outer
    assert not is_matmul(added)


def test_three_modes_are_not_copied() -> None:
    """A layout for large products alone makes seven copies; backward there are none either."""
    plan = plan_of(TUCKER, FULL, objective="training")
    assert copies(plan.program) == plan.copied == 0
    assert broadcasts(plan.program) == 4
    assert copies(plan_of(TUCKER, FULL, memory="save").adjoint.backward_program) == 0  # type: ignore[union-attr]
    source = tnmoe.emit(plan)
    assert "self.ek.expand(befg.shape[0], -1, -1), befg.flatten(2)" in source
    assert "permute" not in source
    assert "permute" not in tnmoe.emit(replace(plan, turned=()))


@pytest.mark.parametrize(
    ("rows", "inner", "cols", "worth"),
    [
        (8, 12, 16, True),
        (24, 24, 16, True),
        (8, 12, 4, False),
        (64, 64, 192, True),
        (64, 64, 16, False),
        (768, 768, 4, False),
    ],
)
def test_it_has_to_pay(rows: int, inner: int, cols: int, worth: bool) -> None:
    """A large matrix, or short rows, are better off with a copy and one large product; unknown sizes decide nothing."""
    groups = MatmulGroups((), ("k",), ("e",), ("f",), ("b",))
    sizes = {"k": rows, "e": inner, "f": cols}
    assert broadcast.pays(groups, sizes) == worth
    assert not broadcast.pays(groups, {"k": rows, "e": inner})
    plan = plan_of("bef,ek->bkf", {"b": 32, **sizes})
    assert (broadcasts(plan.program), copies(plan.program)) == ((1, 0) if worth else (0, 2))


def random_case(rng: random.Random, expression: str) -> tuple[dict[str, int], list[str]]:
    """Sizes that are small and often 1, and the inputs that need a gradient."""
    sizes = {i: rng.choice([1, 2, 3, 4, 6]) for i in sorted(set(expression) - set(",->"))}
    sizes["b"] = rng.choice([2, 5, 7])
    inputs = [t for t in expression.split("->")[0].split(",") if t[0] == "b"]
    return sizes, [t for t in inputs if rng.random() < 0.6]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_gradients_and_figures(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against einsum of NumPy and of torch, float64; FLOPs, saved bytes and peaks against torch's counters."""
    monkeypatch.setattr(broadcast, "LEAST_COLUMNS", 1)
    expression = NETWORKS[name]
    found = 0
    for trial in range(40):
        with case(name, way, trial) as rng:
            sizes, inputs = random_case(rng, expression)
            plan = plan_of(expression, sizes, input_gradients=inputs, **WAYS[way])
            if not broadcasts(plan.program):
                continue
            check(expression, plan, rng)
            found += 1
            if found == 2:
                break
    assert found == 2, "nothing was broadcast"


def check(expression: str, plan: Plan, rng: random.Random) -> None:
    terms = expression.split("->")[0].split(",")
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    arrays = {
        t: torch.randn([plan.values[i] for i in t], generator=generator, dtype=torch.float64, requires_grad=True)
        for t in terms
    }
    module = tnmoe.build(plan, dtype=torch.float64)
    frozen = {n for n, _ in module.named_parameters() if plan.function is None and rng.random() < 0.25}
    stored = {p.name: [p.name.index(i) for i in p.indices] for p in plan.bound.parameters}
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
        with torch.no_grad():
            p.copy_(arrays[name].permute(stored[name]))
    inputs = [arrays[v.name].detach().clone().requires_grad_(v.name in plan.input_gradients) for v in plan.bound.inputs]
    numbers = {t: a.detach().numpy() for t, a in arrays.items()}
    expected = np.einsum(expression, *numbers.values())
    laid_out = {n: np.transpose(a, stored[n]) if n in stored else a for n, a in numbers.items()}
    np.testing.assert_allclose(execute(plan.program, laid_out)["result"], expected, rtol=1e-9, atol=1e-10)
    with FlopCounterMode(display=False) as counter:
        y = module(*inputs)
    report = tnmoe.cost(plan, dtype="float64", frozen=sorted(frozen))
    assert counter.get_total_flops() == report.matmul_flops
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-10)

    seed = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    torch.einsum(expression, *arrays.values()).backward(seed)
    with FlopCounterMode(display=False) as counter:
        if y.requires_grad:
            y.backward(seed)
    assert report.training_matmul_flops == report.matmul_flops + counter.get_total_flops()
    for v, x in zip(plan.bound.inputs, inputs, strict=True):
        if v.name in plan.input_gradients:
            torch.testing.assert_close(x.grad, arrays[v.name].grad)
    for name, p in module.named_parameters():
        if name not in frozen:
            torch.testing.assert_close(p.grad, arrays[name].grad.permute(stored[name]))  # type: ignore[union-attr]

    saved, _ = saved_bytes(lambda: module(*inputs), [*module.parameters(), *module.buffers(), *inputs])
    assert saved == report.saved_bytes
    assert reported(plan, torch.float64, frozen) == tracked(plan, torch.float64, frozen)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_full_size_takes_the_memory_predicted(way: str) -> None:
    """Peaks and remains in float32, without allocating any of it."""
    options = WAYS[way] | ({"chunk": 500} if "chunk" in WAYS[way] else {})
    plan = plan_of(TUCKER, FULL, objective="training", **options)
    with FakeTensorMode():
        assert reported(plan, torch.float32, set()) == tracked(plan, torch.float32, set())


def test_sums_of_items_are_counted() -> None:
    """The gradient of a broadcast matrix is made for each item and summed, b·k·e elements, by either backward pass."""
    sizes = {"b": 10, "e": 4, "f": 32, "k": 3}
    for options in ({}, {"memory": "save"}):
        report = tnmoe.cost(plan_of("bef,ek->bkf", sizes, **options))
        assert report.training_matmul_flops == 3 * 2 * 10 * 4 * 32 * 3
        assert report.training_flops == report.training_matmul_flops + 10 * 3 * 4


@pytest.mark.parametrize("terms", [1, 4])
def test_kronecker_layers_are_not_copied(terms: int) -> None:
    """Axes split in two, one product and a sum of several; values as NumPy has them."""
    spec = tnmoe.FactorizedLinear(24 * 32, 24 * 32, tnmoe.Kronecker((24, 24), terms))
    plan = tnmoe.plan(spec, tokens=8)
    assert broadcasts(plan.program)
    assert plan.copied == 0
    module = tnmoe.build(plan, dtype=torch.float64)
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    x = np.random.default_rng(0).normal(size=(8, 24 * 32))
    result = execute(plan.program, {**weights, "x": x})[plan.program.output.name]
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), result, rtol=1e-9, atol=1e-10)


def test_compiled_and_exported() -> None:
    """Broadcast products in a graph with any number of tokens, and per-sample gradients."""
    sizes = dict(zip("befgacdhijklm", (8, 4, 6, 16, 4, 6, 16, 3, 4, 5, 3, 4, 5), strict=True))
    plan = plan_of(TUCKER, sizes)
    assert broadcasts(plan.program)
    module = tnmoe.build(plan)
    x = torch.randn(8, 4, 6, 16)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},)).module()
    more = torch.randn(11, 4, 6, 16)
    torch.testing.assert_close(exported(more), module(more))
    weights = dict(module.named_parameters())

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, weights, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    whole = torch.func.grad(lambda w: torch.func.functional_call(module, w, (x,)).square().sum())(weights)
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-4, atol=1e-4)
