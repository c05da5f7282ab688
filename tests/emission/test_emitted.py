"""The contract of emitted modules: values, gradients, norms, initialisation, parameters and FLOPs."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import oracle
from support.layers_strategy import ACTIVATIONS, NORMS, SIMPLEX, any_order, layers, lead_shapes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.presets.registry import PRESETS

TOLERANCE = 1e-10

FACTORIZATIONS = {
    "cp": tnmoe.CP(3),
    "tensor_ring": tnmoe.TensorRing((2, 3, 2)),
    "dense": tnmoe.Dense(),
}

BY_LEVELS = {
    1: {"cp": tnmoe.CP(64), "tensor_ring": tnmoe.TensorRing((5, 4, 8)), "dense": tnmoe.Dense()},
    2: {"cp": tnmoe.CP(64), "tensor_ring": tnmoe.TensorRing((5, 4, 6, 7)), "dense": tnmoe.Dense()},
    3: {"cp": tnmoe.CP(64), "tensor_ring": tnmoe.TensorRing((5, 6, 7, 4, 8)), "dense": tnmoe.Dense()},
}


def assert_close(got: Tensor, want: Tensor, what: str, scale: float = 0.0) -> None:
    """Equal to 1e-10 relative to the largest entry.

    Some tensors are zero by cancellation (the gradient through the norm of one entry, say), and only rounding is
    left to compare, which a norm multiplies by up to 1/√ε = 316. For them `scale` is the largest entry of everything
    compared at once; inputs are of order one.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach(), want.detach()
    limit = TOLERANCE * max(float(want.abs().max()), 1e-2 * max(scale, 1))
    error = float((got - want).abs().max())
    assert error <= limit, f"{what}: error {error:.1e}, allowed {limit:.1e}"


def check_against_oracle(plan: tnmoe.Plan, lead: tuple[int, ...], seed: int, training: bool) -> None:
    """Compare output, coefficients, buffers and every gradient."""
    spec = oracle.plan_spec(plan)
    module = oracle.randomise(tnmoe.build(plan, dtype=torch.float64), seed).train(training)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    weights = oracle.leaves(module)
    generator = torch.Generator().manual_seed(seed + 1)
    width = plan.bound.sizes["i"]
    x = torch.randn(*lead, width, generator=generator, dtype=torch.float64, requires_grad=True)
    x_oracle = x.detach().clone().requires_grad_()

    want = oracle.evaluate(spec, oracle.canonical(plan, weights), buffers, x_oracle, training=training)
    got = module(x)
    assert_close(got, want.y, "output")
    for name, b in module.named_buffers():
        assert_close(b, want.buffers[name], name)

    cotangent = torch.randn(want.y.shape, generator=generator, dtype=torch.float64)
    got.backward(cotangent)
    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(want.y, [x_oracle, *weights.values()], cotangent)
    scale = max(float(g.abs().max()) for g in expected if g.numel()) if want.y.numel() else 0.0
    received = [x.grad, *(parameters[name].grad for name in weights)]
    for name, g, e in zip(["x", *weights], received, expected, strict=True):
        assert g is not None, f"{name} got no gradient"
        assert_close(g, e, f"gradient of {name}", scale)

    module.eval()
    want = oracle.evaluate(spec, oracle.canonical(plan, weights), dict(module.named_buffers()), x, training=False)
    with torch.no_grad():
        for e, (g, a) in enumerate(zip(module.expert_coefficients(x), want.coefficients, strict=True)):
            assert_close(g, a.detach(), f"coefficients of level {e + 1}")


# ---- values and gradients ------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=150)
@given(spec=layers(), lead=lead_shapes(), seed=st.integers(0, 2**16), training=st.booleans())
def test_equals_the_oracle(spec, lead, seed, training):
    check_against_oracle(tnmoe.plan(spec, tokens=6), lead, seed, training)


@pytest.mark.slow
@settings(max_examples=100)
@given(spec=layers(max_levels=4), lead=lead_shapes(), seed=st.integers(0, 2**16), training=st.booleans())
def test_any_order_equals_the_oracle(spec, lead, seed, training):
    """A folded bias meets every other tensor first in some order, and layouts conflict in others."""
    plan = any_order(tnmoe.plan(spec, tokens=6, planner="greedy"), seed)
    check_against_oracle(plan, lead, seed, training)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_planned_orders_that_want_transposed_gates(activation):
    """The best order for one input feature multiplies expert factor and coefficients from the left."""
    spec = tnmoe.MuMoE(1, 8, 64, tnmoe.CP(2), tnmoe.Gate(activation, "none"), bias=False)
    check_against_oracle(tnmoe.plan(spec, tokens=2), (2, 3), 0, True)


@pytest.mark.parametrize("factorization", [tnmoe.CP(3), tnmoe.TensorRing((2, 1, 3, 2, 2, 3))], ids=str)
def test_four_levels_planned_exactly(factorization):
    """The exact planner takes a second here, so the random layers above stop at three levels."""
    spec = tnmoe.MuMoE(3, 2, (2, 3, 2, 2), factorization, tnmoe.Gate("entmax15", "layer"))
    check_against_oracle(tnmoe.plan(spec, tokens=6), (2, 3), 0, True)


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
@pytest.mark.parametrize("factorization", FACTORIZATIONS.values(), ids=FACTORIZATIONS)
def test_any_planned_number_of_tokens(factorization, tokens):
    """Orders differ between a few tokens (data first) and many (weights first); the function may not."""
    experts = (3, 4) if not isinstance(factorization, tnmoe.TensorRing) else 3
    spec = tnmoe.MuMoE(5, 4, experts, factorization, tnmoe.Gate("softmax", "none"))
    check_against_oracle(tnmoe.plan(spec, tokens=tokens), (5,), 3, True)


@pytest.mark.parametrize("factorization", FACTORIZATIONS.values(), ids=FACTORIZATIONS)
def test_inputs_of_any_strides(factorization):
    """Transposed, sliced and expanded inputs are inputs like any other."""
    spec = tnmoe.MuMoEBlock(4, 5, 3, 3, factorization, tnmoe.Gate("entmax15", "layer"), input_norm=True)
    module = oracle.randomise(tnmoe.build(tnmoe.plan(spec, tokens=6), dtype=torch.float64), 0)
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    for strided in (x.mT, x.mT[::2], x.mT[:, :1].expand(3, 6, 4)):
        assert not strided.is_contiguous()
        assert_close(module(strided), module(strided.contiguous()), "output")


@pytest.mark.parametrize("wrong", [(), (3,), (5,), (2, 3), (4, 1), (0, 3)])
def test_wrong_width_names_both_shapes(wrong):
    module = tnmoe.build(tnmoe.plan(tnmoe.MuMoE(4, 3, 2, tnmoe.CP(2)), tokens=6))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 4\)") as caught:
        module(torch.zeros(wrong))
    assert str(tuple(wrong)) in str(caught.value)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 4\)"):
        module.expert_coefficients(torch.zeros(wrong))


# ---- second derivatives --------------------------------------------------------------------------------------


def small(activation: str, norm: str, factorization: object, block: bool = False) -> tuple[Callable, tuple]:
    """A layer as a function of its input and parameters, and a point to differentiate it at."""
    gate = tnmoe.Gate(activation, norm)
    if block:
        spec = tnmoe.MuMoEBlock(2, 3, 2, 3, factorization, gate, input_norm=True)
    else:
        spec = tnmoe.MuMoE(2, 3, 3, factorization, gate)
    module = oracle.randomise(tnmoe.build(tnmoe.plan(spec, tokens=4), dtype=torch.float64), 5)
    names = [n for n, _ in module.named_parameters()]
    # Buffers go in as fresh copies: numerical derivatives call the function many times and must see one function.
    buffers = {n: b.clone() for n, b in module.named_buffers()}

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        state = dict(zip(names, weights, strict=True)) | {n: b.clone() for n, b in buffers.items()}
        return torch.func.functional_call(module, state, (x,))

    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=True)
    return function, (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("factorization", FACTORIZATIONS.values(), ids=FACTORIZATIONS)
@pytest.mark.parametrize(("activation", "norm"), list(itertools.product(ACTIVATIONS, NORMS)))
def test_gradcheck(activation, norm, factorization):
    """Numerical derivatives are a second oracle that no formula of ours enters."""
    function, inputs = small(activation, norm, factorization)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation):
    """Double backward works for every gate, the sparse ones with their own autograd functions included."""
    function, inputs = small(activation, "none", tnmoe.CP(2))
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_gradgradcheck_of_a_block(norm):
    function, inputs = small("entmax15", norm, tnmoe.TensorRing((2, 2, 2)), block=True)
    assert torch.autograd.gradgradcheck(function, inputs)


# ---- batch norm ----------------------------------------------------------------------------------------------


def test_batch_norm_is_that_of_torch():
    """Running statistics over several batches equal those of nn.BatchNorm1d, and evaluation uses them."""
    spec = tnmoe.MuMoE(4, 3, (3, 2), tnmoe.CP(2), tnmoe.Gate("softmax", "batch"))
    module = tnmoe.build(tnmoe.plan(spec, tokens=6), dtype=torch.float64)
    norms = [nn.BatchNorm1d(n, affine=False, dtype=torch.float64) for n in (3, 2)]
    with torch.no_grad():
        for level in (1, 2):
            nn.init.normal_(getattr(module, f"gate_projection_{level}"))
    for lead in ((8,), (2, 5), (2,), (3, 1)):
        x = torch.randn(*lead, 4, dtype=torch.float64)
        module(x)
        for level, norm in enumerate(norms, 1):
            norm(x.reshape(-1, 4) @ getattr(module, f"gate_projection_{level}"))
            assert_close(getattr(module, f"gate_running_mean_{level}"), norm.running_mean, "running mean")
            assert_close(getattr(module, f"gate_running_var_{level}"), norm.running_var, "running variance")
    module.eval()
    before = {n: b.clone() for n, b in module.named_buffers()}
    got = module.expert_coefficients(x)
    for level, norm in enumerate(norms, 1):
        logits = x.reshape(-1, 4) @ getattr(module, f"gate_projection_{level}")
        want = torch.softmax(norm.eval()(logits), -1).reshape(*lead, -1)
        assert_close(got[level - 1], want, "coefficients")
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (0,)])
def test_a_training_step_on_one_token_or_none(lead):
    """nn.BatchNorm1d raises for one row; here the running statistics step in and stay as they are."""
    spec = tnmoe.MuMoEBlock(4, 5, 3, 3, tnmoe.TensorRing((2, 2, 2)), tnmoe.Gate("entmax15", "batch"))
    module = oracle.randomise(tnmoe.build(tnmoe.plan(spec, tokens=6)), 0).train()
    before = {n: b.clone() for n, b in module.named_buffers()}
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.randn(*lead, 4)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    assert all(p.isfinite().all() for p in module.parameters())


# ---- analysis ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@given(spec=layers(), lead=lead_shapes())
def test_expert_coefficients(spec, lead):
    """One tensor a level, (…, experts); shares of a simplex gate sum to one."""
    plan = tnmoe.plan(spec, tokens=6, planner="greedy")
    module = oracle.randomise(tnmoe.build(plan, dtype=torch.float64), 1)
    levels = module.expert_coefficients(torch.randn(*lead, plan.bound.sizes["i"], dtype=torch.float64))
    assert [tuple(a.shape) for a in levels] == [(*lead, n) for n in spec.levels]
    for a in levels:
        assert bool((a >= 0).all())
        if spec.gate.activation in SIMPLEX:
            assert_close(a.sum(-1), torch.ones(lead, dtype=torch.float64), "sum of the shares")


def test_reading_coefficients_leaves_no_trace():
    """Analysis between two training steps must not move the running statistics."""
    spec = tnmoe.MuMoE(4, 3, 3, tnmoe.CP(2), tnmoe.Gate("softmax", "batch"))
    module = oracle.randomise(tnmoe.build(tnmoe.plan(spec, tokens=6)), 1).train()
    before = {n: b.clone() for n, b in module.named_buffers()}
    module.expert_coefficients(torch.randn(6, 4))
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())


# ---- initialisation ------------------------------------------------------------------------------------------

# Few experts show what their independent parts add (1/N); the diagonals of a ring need many to average out.
EXPERTS = {1: (16,), 2: (12, 10), 3: (10, 8, 9)}
FEW = {1: (3,), 2: (2, 3), 3: (2, 2, 2)}
WIDTH = 12


@functools.cache
def _fresh(kind: str, levels: int, activation: str) -> tuple[float, float, float]:
    """Variance of the mixed weights and of the output, and of nn.Linear's output, over fresh modules."""
    gate = tnmoe.Gate(activation, "layer")
    spec = tnmoe.MuMoE(WIDTH, 16, (EXPERTS if kind == "tensor_ring" else FEW)[levels], BY_LEVELS[levels][kind], gate)
    plan = tnmoe.plan(spec, tokens=32, planner="greedy")
    module = tnmoe.build(plan)
    mixed, outputs, linear = [], [], []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(500):
            module.reset_parameters()
            weights = oracle.canonical(plan, dict(module.named_parameters()))
            whole = oracle.whole_weight(spec, weights)
            # Zero logits: every expert has the same share, 1/N of a simplex and 1/2 of a sigmoid.
            share = 2.0**-levels * whole[..., 0, 0].numel() if activation == "sigmoid" else 1.0
            mixed.append(share * whole.flatten(0, levels - 1).mean(0)[:-1])
            x = torch.randn(8, WIDTH)
            outputs.append(module(x))
            linear.append(nn.Linear(WIDTH, 16)(x))
    return tuple(float(torch.stack(v).var()) for v in (mixed, outputs, linear))


INITIAL = [(kind, levels, "softmax") for kind in FACTORIZATIONS for levels in (1, 2, 3)]
INITIAL += [(kind, 2, "sigmoid") for kind in FACTORIZATIONS]
INITIAL += [(kind, 1, "entmax15") for kind in FACTORIZATIONS]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "levels", "activation"), INITIAL)
def test_mixed_weights_start_with_the_variance_of_linear(kind, levels, activation):
    """Var = 1 / (3 I), that of nn.Linear's U(±1/√I)."""
    variance, _, _ = _fresh(kind, levels, activation)
    assert variance == pytest.approx(1 / (3 * WIDTH), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "levels", "activation"), INITIAL)
def test_outputs_start_with_the_variance_of_linear(kind, levels, activation):
    _, output, linear = _fresh(kind, levels, activation)
    assert output == pytest.approx(linear, rel=0.2)


@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_experts_start_different_and_gates_uniform(kind):
    """Equal experts would get equal gradients for ever; the gate's zero projection starts them with equal shares."""
    spec = tnmoe.MuMoE(5, 4, (3, 2), BY_LEVELS[2][kind], tnmoe.Gate("entmax15", "batch"))
    plan = tnmoe.plan(spec, tokens=6)
    module = tnmoe.build(plan)
    whole = oracle.whole_weight(spec, oracle.canonical(plan, dict(module.named_parameters())))
    rows = whole.flatten(0, 1).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 6
    for a, n in zip(module.expert_coefficients(torch.randn(7, 5)), spec.levels, strict=True):
        torch.testing.assert_close(a, torch.full((7, n), 1 / n))


def test_reset_parameters_restores_buffers():
    spec = tnmoe.MuMoE(4, 3, 3, tnmoe.CP(2), tnmoe.Gate("softmax", "batch"))
    module = oracle.randomise(tnmoe.build(tnmoe.plan(spec, tokens=6)), 0)
    module.reset_parameters()
    assert torch.equal(module.gate_running_mean, torch.zeros(3))
    assert torch.equal(module.gate_running_var, torch.ones(3))
    assert torch.equal(module.gate_projection, torch.zeros(4, 3))


# ---- parameters and FLOPs ------------------------------------------------------------------------------------


def check_counts(plan: tnmoe.Plan) -> None:
    """The module's own numbers are those of the report, exactly."""
    report = tnmoe.cost(plan)
    module = tnmoe.build(plan, device="meta")
    assert sum(p.numel() for p in module.parameters()) == report.parameters
    assert sum(b.numel() for b in module.buffers()) == report.numbers.buffers
    tokens = plan.values[plan.layer.token_symbol]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(tokens, plan.bound.sizes["i"], device="meta"))
    assert counter.get_total_flops() == report.matmul_flops


@pytest.mark.parametrize("name", [name for name, p in PRESETS.items() if p.emitted])
def test_counts_of_presets(name):
    check_counts(tnmoe.plan(PRESETS[name].spec, tokens=PRESETS[name].tokens))


@pytest.mark.slow
@settings(max_examples=60)
@given(spec=layers(), tokens=st.integers(1, 40))
@example(spec=tnmoe.MuMoE(2, 3, (2, 2, 2, 2), tnmoe.CP(2)), tokens=7)
def test_counts_of_any_layer(spec, tokens):
    check_counts(tnmoe.plan(spec, tokens=tokens))


@pytest.mark.slow
@settings(max_examples=40)
@given(spec=layers(max_levels=4), tokens=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_counts_of_any_order(spec, tokens, seed):
    check_counts(any_order(tnmoe.plan(spec, tokens=tokens, planner="greedy"), seed))
