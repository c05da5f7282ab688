"""What Triton's interpreter shows; `test_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1.

The oracles: NumPy's einsum in float64, the entmax package, and the module of the flavour `portable`.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from dataclasses import replace

import entmax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from support import oracle
from support.gradients import any_kept, assert_same, draw, pair
from support.layers_strategy import any_order, layers
from support.strides import STRIDES
from tnmoe.backends.runtime import triton_kernels as kernels
from tnmoe.ir.fused_ops import FusedOp

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton's library is compiled or interpreted from its import on"

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GATE = tnmoe.Gate("entmax15", "layer")
SPECS = {
    "cp": tnmoe.MuMoE(9, 7, 5, tnmoe.CP(6), GATE),
    "cp_no_bias": tnmoe.MuMoE(9, 7, 5, tnmoe.CP(6), GATE, bias=False),
    "cp_block": tnmoe.MuMoEBlock(9, 20, 7, 5, tnmoe.CP(6), GATE, input_norm=True),
    "cp_two_levels": tnmoe.MuMoEBlock(9, 20, 7, (5, 3), tnmoe.CP(6), GATE),
    "cp_three_levels": tnmoe.MuMoE(9, 7, (5, 3, 2), tnmoe.CP(6), GATE, bias=False),
    "tr": tnmoe.MuMoE(33, 21, 5, tnmoe.TensorRing((2, 3, 8)), GATE),
    "tr_block": tnmoe.MuMoEBlock(33, 40, 21, 5, tnmoe.TensorRing((2, 3, 8)), GATE, input_norm=True),
    "tr_two_levels": tnmoe.MuMoE(33, 21, (5, 3), tnmoe.TensorRing((2, 3, 2, 8)), GATE, bias=False),
    "tr_three_levels": tnmoe.MuMoE(33, 21, (5, 3, 2), tnmoe.TensorRing((2, 3, 2, 4, 8)), GATE),
    "dense": tnmoe.MuMoE(9, 7, 5, tnmoe.Dense(), tnmoe.Gate("softmax", "none")),
}
every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: object) -> object:
        self.launches += 1
        return self.kernel[grid]


def counted(module: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    """Every kernel of an emitted module's file that is launched from outside, by name."""
    space = sys.modules[type(module).__module__].__dict__
    found = {name: Counted(value) for name, value in space.items() if name.endswith("_kernel")}
    for name, value in found.items():
        monkeypatch.setitem(space, name, value)
    return found


def close(got: Tensor, want: np.ndarray, dtype: torch.dtype, scale: float | None = None) -> None:
    """Within the rounding of sums of products of `dtype`, for entries of the size of the largest."""
    scale = max(1.0, float(np.abs(want).max())) if scale is None else scale
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


def matrix(
    rng: np.random.Generator, rows: int, cols: int, dtype: torch.dtype, layout: int
) -> tuple[Tensor, np.ndarray]:
    """A random matrix in one of three layouts: as it is, stored transposed, or a view of a larger one."""
    x = torch.from_numpy(rng.normal(size=(rows, cols))).to(dtype)
    if layout == 1:
        x = x.mT.contiguous().mT
    if layout == 2:
        wide = torch.full((rows + 2, 2 * cols + 3), torch.nan, dtype=dtype)
        wide[1 : rows + 1, 1 : 2 * cols : 2] = x
        x = wide[1 : rows + 1, 1 : 2 * cols : 2]
    return x, x.double().numpy()


sizes = st.one_of(st.integers(1, 5), st.integers(6, 40), st.sampled_from([63, 64, 65, 130]))
inner = st.one_of(st.integers(1, 5), st.sampled_from([31, 32, 33, 65]))
dtypes = st.sampled_from([torch.float32, torch.float16])
deterministic = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16 as the integers that stand for it; here it does so as torch would."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *args):
        if a.dtype.is_bf16():
            a, b = (copy.copy(x) for x in (a, b))
            for x in (a, b):
                x.data = (x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return plain(self, a, b, d, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


# ---- products ------------------------------------------------------------------------------------------------


def multiply(dtype: torch.dtype, rows: int, cols: int, first: int, second: int, biases: int, layout: int) -> None:
    """Both forms against einsum: a second product, and a given factor."""
    rng = np.random.default_rng(rows + cols)
    a, a64 = matrix(rng, rows, first, dtype, layout % 3)
    u, u64 = matrix(rng, first, cols, dtype, (layout + 1) % 3)
    b, b64 = matrix(rng, rows, second, dtype, layout // 3)
    v, v64 = matrix(rng, second, cols, dtype, layout % 2)
    factor, factor64 = matrix(rng, rows, cols, dtype, layout % 3)
    p, q = (torch.from_numpy(rng.normal(size=cols)).to(dtype) if biases & bit else None for bit in (1, 2))
    left = np.einsum("tk,kr->tr", a64, u64) + (0 if p is None else p.double().numpy())
    right = np.einsum("tk,kr->tr", b64, v64) + (0 if q is None else q.double().numpy())
    scale = float(np.abs(left).max() * max(1.0, np.abs(right).max())) + 1
    close(kernels._contract_multiply(a, u, p, b, v, q), left * right, dtype, scale)
    scale = float(np.abs(left).max() * max(1.0, np.abs(factor64).max())) + 1
    close(kernels._contract_multiply(a, u, p, factor), left * factor64, dtype, scale)


@deterministic
@given(dtypes, sizes, sizes, inner, inner, st.integers(0, 3), st.integers(0, 5))
def test_products_of_products(dtype, rows, cols, first, second, biases, layout):
    multiply(dtype, rows, cols, first, second, biases, layout)


def mix(dtype: torch.dtype, rows: int, cols: int, mixed: int, summed: int, k: int, bias: bool, layout: int) -> None:
    rng = np.random.default_rng(rows + cols)
    a, a64 = matrix(rng, rows, k, dtype, layout % 3)
    w, w64 = matrix(rng, k, summed * cols, dtype, layout // 2)
    m, m64 = matrix(rng, rows, mixed * summed, dtype, layout % 3)
    mixer, mixer64 = (x.reshape(rows, mixed, summed) for x in (m, m64))
    if layout % 2:  # stored with the summed index first
        mixer = mixer.transpose(1, 2).contiguous().transpose(1, 2)
    p = torch.from_numpy(rng.normal(size=summed * cols)).to(dtype) if bias else None
    product = np.einsum("tk,kn->tn", a64, w64) + (0 if p is None else p.double().numpy())
    want = np.einsum("tms,tsc->tmc", mixer64, product.reshape(rows, summed, cols))
    scale = float(np.abs(mixer64).sum(2).max() * np.abs(product).max()) + 1
    close(kernels._contract_mix(mixer, a, w, p), want, dtype, scale)


@deterministic
@given(dtypes, sizes, sizes, st.integers(1, 5), st.integers(1, 16), inner, st.booleans(), st.integers(0, 5))
def test_mixed_products(dtype, rows, cols, mixed, summed, k, bias, layout):
    mix(dtype, rows, cols, mixed, summed, k, bias, layout)


def test_bfloat16(monkeypatch):
    """Left out of what the kernels take here, since the interpreter is wrong without the repair above."""
    assert not kernels._kernels_take(torch.ones(2, 2, dtype=torch.bfloat16))
    monkeypatch.setattr(kernels, "_kernels_take", lambda *tensors: True)
    for layout in (0, 3, 4):
        multiply(torch.bfloat16, 17, 70, 40, 5, layout % 4, layout)
        mix(torch.bfloat16, 17, 9, 3, 5, 40, True, layout)


def test_every_tile_size(monkeypatch):
    """What is chosen for many rows on a GPU, whatever it is here: several tiles each way."""
    for tile in ({"M": 16, "N": 16}, {"M": 128, "N": 128}, {"M": 64, "N": 32}):
        monkeypatch.setattr(kernels, "_tile", lambda *args, tile=tile: {**tile, "K": 32, "num_warps": 4})
        multiply(torch.float32, 131, 130, 40, 33, 3, 1)
        mix(torch.float32, 131, 40, 2, 3, 33, True, 1)


@pytest.mark.parametrize("rows", [1, 2, 100, 4096, 10**6])
@pytest.mark.parametrize("cols", [1, 16, 149, 556, 3072])
@pytest.mark.parametrize("depth", [1, 4, 16, 64])
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_tiles_are_ones_that_compile(rows, cols, depth, tensor_cores):
    """Powers of two, at least 16 each way and at most 128; not larger than twice what there is."""
    tile = kernels._tile(rows, cols, tensor_cores, depth)
    wide = tile["N"] * depth
    assert all(n & (n - 1) == 0 for n in tile.values())
    assert 16 <= tile["M"] <= 128
    assert 16 <= wide <= max(128, depth)
    assert tile["M"] < max(17, 2 * rows)
    assert tile["N"] < max(17, 2 * cols)
    if rows >= 4096 and cols >= 556:
        assert tile["M"] * wide >= 4096


# ---- entmax --------------------------------------------------------------------------------------------------


@deterministic
@given(dtypes, st.integers(1, 9), st.one_of(st.integers(1, 40), st.sampled_from([256, 1000, 5000])), st.booleans())
def test_entmax_is_that_of_the_package(dtype, rows, cols, sparse):
    """Values to 1e-6 (half: to its rounding), the support in float32, and gradients."""
    generator = torch.Generator().manual_seed(rows * cols)
    x = (torch.randn(rows, cols, generator=generator) * (8 if sparse else 1)).to(dtype).requires_grad_()
    grad = torch.randn(rows, cols, generator=generator).to(dtype)
    y = kernels.entmax15(x)
    assert type(y.grad_fn).__name__ == "_Entmax15RowsBackward"
    (got,) = torch.autograd.grad(y, x, grad)
    z = x.detach().double().requires_grad_()
    want = entmax.entmax15(z, dim=-1)
    (want_grad,) = torch.autograd.grad(want, z, grad.double())
    rounding = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(y.double(), want, rtol=0, atol=rounding)
    torch.testing.assert_close(got.double(), want_grad, rtol=0, atol=3 * rounding)
    if dtype == torch.float32:
        decided = (want == 0) | (want > 1e-9)
        assert bool(((y > 0) == (want > 0))[decided].all())


def test_entmax_of_odd_rows():
    """Ties, infinities, a row with NaN (which stays in its row), leading axes, strides, and a spread gradient."""
    x = torch.tensor([[0.0, 0, 0, 0], [3, -torch.inf, 3, 1], [torch.nan, 0, 1, 2], [1e30, 0, 0, 0]])
    y = kernels.entmax15(x)
    want = entmax.entmax15(x[[0, 1, 3]].double().nan_to_num(neginf=-1e9), dim=-1)
    torch.testing.assert_close(y[[0, 1, 3]].double(), want, rtol=0, atol=1e-6)
    assert bool(y[2].isnan().all())
    z = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)).transpose(0, 2).requires_grad_()
    y = kernels.entmax15(z)
    assert y.shape == (2, 3, 5)
    (grad,) = torch.autograd.grad(y.sum(), z)  # the gradient of a sum is one number, spread
    torch.testing.assert_close(y.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(grad, torch.zeros(2, 3, 5), rtol=0, atol=1e-6)


def test_entmax_once_differentiable():
    x = draw(3, 5, dtype=torch.float32)
    (grad,) = torch.autograd.grad(kernels.entmax15(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# ---- emitted modules -----------------------------------------------------------------------------------------


def fused_plan(spec: object, tokens: int = 16) -> tnmoe.Plan:
    """A plan that keeps nothing, so that everything that can be fused is."""
    plan = tnmoe.plan(spec, tokens=tokens, memory="save", flavour="triton")
    return replace(plan, function=replace(plan.function, kept=()))


def mild(modules: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The modules with weights that do not blow up the rounding of float32."""
    with torch.no_grad():
        for p in (p for m in modules for p in m.parameters()):
            p.mul_(0.3)
    return modules


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 70])
def test_modules(spec, dtype, rows, monkeypatch):
    """Values and gradients of the portable module, by kernels: each fused op launches one, each gate two."""
    plan = fused_plan(spec)
    plain, module = mild(pair(plan, dtype))
    launched = counted(module, monkeypatch)
    x = draw(rows, plain._rows(torch.zeros(1, spec.inputs)).shape[1], dtype=dtype)
    assert_same(plain, module, x, 2e-4 if dtype == torch.float32 else 3e-2)
    kinds = [type(op).__name__ for op in plan.executed.ops if isinstance(op, FusedOp)]
    assert kinds
    gates = sum(type(op).__name__ == "Entmax15" for op in plan.executed.ops)
    assert {name: k.launches for name, k in launched.items()} == {
        name: n
        for name, n in {
            "_contract_multiply_kernel": kinds.count("DualContract") + kinds.count("ContractMultiply"),
            "_contract_mix_kernel": kinds.count("ContractMix"),
            "_entmax15_kernel": gates,
            "_entmax15_backward_kernel": gates,
        }.items()
        if n
    }


@pytest.mark.parametrize("name", ["cp", "tr_block"])
@pytest.mark.parametrize("stride", STRIDES)
def test_modules_of_any_strides(name, stride):
    """Inputs and gradients that are expanded, turned or sliced."""
    spec = SPECS[name]
    plain, module = mild(pair(fused_plan(spec), torch.float32))
    x, grad = STRIDES[stride](16, spec.inputs), STRIDES[stride](16, spec.outputs)
    found = []
    for m in (plain, module):
        given = x.clone().requires_grad_() if m is plain else x.requires_grad_()
        y = m(given)
        found.append((y.detach(), *torch.autograd.grad(y, [given, *m.parameters()], grad)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * max(1.0, float(want.abs().max())))


@every
def test_a_users_counter_sees_all_flops(spec):
    """Of kernels as well, forward and backward, and they give under the counter what they give without it."""
    plan = replace(fused_plan(spec, 10), input_gradients=("x",))
    module = oracle.randomise(tnmoe.build(plan), 0)
    x = draw(10, plan.bound.sizes["i"], dtype=torch.float32)
    report = tnmoe.cost(plan)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert counter.get_total_flops() == report.matmul_flops
    assert any("tnmoe_emitted" in str(op) for op in counter.get_flop_counts()["Global"])
    assert torch.equal(y, module(x))
    with FlopCounterMode(display=False) as counter:
        y.mean().backward()
    assert report.matmul_flops + counter.get_total_flops() == report.training_matmul_flops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers(), st.integers(0, 2**32), st.sampled_from([None, 2]))
def test_any_layer(spec, seed, chunk):
    """Any layer, any order, whatever is kept, no token at all: the portable module's float32."""
    plan = any_order(tnmoe.plan(spec, tokens=5, flavour="triton", chunk=chunk), seed)
    plan = any_kept(plan, seed)
    plain, module = mild(pair(plan, torch.float32))
    lead = random.Random(seed).choice([(0,), (1,), (5,), (2, 3)])
    assert_same(plain, module, draw(*lead, int(plan.bound.sizes["i"]), dtype=torch.float32), 5e-4)


@every
def test_inference_forms(spec, monkeypatch):
    """`freeze()` fuses whatever the trained module keeps; autocast decides types as for torch's own products."""
    plan = tnmoe.plan(spec, tokens=16, memory="save", flavour="triton")
    module = oracle.randomise(tnmoe.build(plan, freeze=True, dtype=torch.float32), 0).eval()
    frozen = module.freeze()
    launched = counted(frozen, monkeypatch)
    x = draw(9, spec.inputs, dtype=torch.float32, grad=False)
    want = tnmoe.build(replace(plan, function=None), dtype=torch.float32).eval()
    want.load_state_dict(module.state_dict())
    torch.testing.assert_close(frozen(x), want(x), rtol=2e-4, atol=2e-4)
    ran = sum(k.launches for name, k in launched.items() if "contract" in name)
    assert ran == sum(isinstance(op, FusedOp) for op in tnmoe.cost(plan, inference=True).program.ops) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == want(x).dtype == torch.bfloat16
    assert sum(k.launches for name, k in launched.items() if "contract" in name) == ran


@pytest.mark.parametrize("name", ["cp", "tr_block"])
def test_transforms_take_the_plain_path(name):
    """`torch.func` hands out tensors without memory: `vmap` and `grad` give what they give on the portable module."""
    plain, module = mild(pair(fused_plan(SPECS[name]), torch.float32))
    x = draw(4, 3, SPECS[name].inputs, dtype=torch.float32, grad=False)
    for call in (
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.vmap(torch.func.grad(lambda row: m(row).square().sum()))(x),
        lambda m: torch.func.grad(
            lambda weights: torch.func.functional_call(m, weights, (x,)).square().sum(), argnums=0
        )(dict(m.named_parameters())),
    ):
        torch.testing.assert_close(call(module), call(plain), rtol=1e-4, atol=1e-4)


def test_what_the_kernels_take():
    x = torch.ones(3, 4)
    assert kernels._kernels_take(x, None, x.half().float())
    assert kernels._kernels_take(torch.nn.Parameter(x))
    assert not kernels._kernels_take(x.double())
    assert not kernels._kernels_take(x, x.half())
    assert not kernels._kernels_take(x[:0], x)
    assert not kernels._kernels_take(torch.ones(3, device="meta"))
    assert not kernels._kernels_take(x.long())
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert not kernels._kernels_take(torch.ones(3, 4))


def test_precision_follows_torch():
    assert kernels._matmul_precision() == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert kernels._matmul_precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert kernels._matmul_precision() == "ieee"
