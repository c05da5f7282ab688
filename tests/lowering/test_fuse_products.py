"""Products that are read once, and not kept, may stay unwritten: what is fused, what is not, and what that changes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import any_kept
from support.layers_strategy import any_order, layers

import tnmoe
from tnmoe.backends.numpy import execute as numpy_backend
from tnmoe.errors import ProgramError
from tnmoe.io.json_fields import Field
from tnmoe.ir.contractions import Contract, ContractAdd, Multiply
from tnmoe.ir.fused_ops import ContractMix, ContractMultiply, DualContract, FusedOp
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value
from tnmoe.ir.verify import verify
from tnmoe.lowering.fuse_products import WIDEST, fuse_products, fuse_program, fusible
from tnmoe.presets.registry import PRESETS

GATE = tnmoe.Gate("entmax15", "layer")


def fused(plan: tnmoe.Plan) -> dict[str, str]:
    """Kind of each fused op, by its result."""
    return {op.out.name: type(op).__name__ for op in plan.executed.ops if isinstance(op, FusedOp)}


def test_the_gpt2_blocks():
    """CP fuses both factors, or the one that is not kept; the ring fuses the projected input, or nothing."""

    def of(name: str, memory: str | int) -> dict[str, str]:
        return fused(tnmoe.plan(PRESETS[name].spec, tokens=4096, memory=memory, flavour="triton"))

    assert of("gpt2-cp", 26_000_000) == {"up_gated": "DualContract", "down_gated": "DualContract"}
    assert of("gpt2-cp", "recompute") == {"up_gated": "ContractMultiply", "down_gated": "ContractMultiply"}
    assert of("gpt2-cp", "save") == {}
    assert of("gpt2-tr", 26_000_000) == {"up_gated": "ContractMix", "down_gated": "ContractMix"}
    assert of("gpt2-tr", "recompute") == {}


@pytest.mark.parametrize(
    ("factorization", "experts", "kinds"),
    [
        (tnmoe.CP(6), (5,), [DualContract]),
        (tnmoe.CP(6), (5, 3), [DualContract, ContractMultiply]),
        (tnmoe.CP(6), (5, 3, 2), [DualContract, ContractMultiply, ContractMultiply]),
        (tnmoe.TensorRing((2, 3, 40)), (5,), [ContractMix]),
        (tnmoe.TensorRing((2, 3, 2, 40)), (5, 3), [ContractMix, ContractMix]),
        (tnmoe.Dense(), (WIDEST,), [ContractMix]),
        (tnmoe.Dense(), (WIDEST + 1,), []),
    ],
    ids=lambda v: v.kind if hasattr(v, "kind") else None,
)
def test_levels(factorization, experts, kinds):
    """As many levels as there are: each further factor is multiplied in by the product that makes it."""
    plan = tnmoe.plan(tnmoe.MuMoE(300, 50, experts, factorization, GATE), tokens=4096)
    program = fuse_program(plan.program, plan.bound.sizes)
    assert [type(op) for op in program.ops if isinstance(op, FusedOp)] == kinds


@pytest.mark.slow
@settings(max_examples=40)
@given(layers(), st.integers(0, 2**32))
def test_any_layer_keeps_its_meaning(spec, seed):
    """Any order, whatever is kept: the same values, nothing kept is lost, and every other op is left as it was."""
    plan = any_order(tnmoe.plan(spec, tokens=3, flavour="triton"), seed)
    plan = any_kept(replace(plan, function=tnmoe.plan(plan.layer, tokens=3, flavour="triton").function), seed)
    bound = plan.bound
    names = fusible(plan.adjoint.ops, {bound.output.name}, bound.sizes)
    plan = replace(plan, function=replace(plan.function, fused=tuple(sorted(names))))
    executed = verify(plan.executed, laid_out=True)
    rng = np.random.default_rng(seed)
    env = {v.name: rng.normal(size=[int(bound.sizes[i]) for i in v.indices]) for v in bound.leaves}
    env |= {b.name: abs(env[b.name]) + 0.5 for b in bound.buffers}
    want, got = numpy_backend.execute(bound, env), numpy_backend.execute(executed, env)
    assert set(plan.function.kept) <= set(got) <= set(want)
    assert set(want) - set(got) == {v for v in names - set(plan.function.kept) if v not in got}
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-9, atol=1e-11)
    before = {op.out.name: op for op in bound.ops}
    assert all(isinstance(op, FusedOp) or op == before[op.out.name] for op in executed.ops)


@pytest.mark.slow
@settings(max_examples=25)
@given(layers(), st.integers(0, 2**32))
def test_the_report_follows(spec, seed):
    """The same work; of the bytes, those of the factors: each neither written nor read again. Counted op by op."""
    plan = any_order(tnmoe.plan(spec, tokens=3), seed)
    sizes = {i: int(n) for i, n in plan.bound.sizes.items()}
    plan = replace(plan, function=tnmoe.plan(spec, tokens=3, memory="save").function)
    plan = any_kept(plan, seed)
    names = fusible(plan.adjoint.ops, {plan.bound.output.name}, sizes)
    other = replace(plan, function=replace(plan.function, flavour="triton", fused=tuple(sorted(names))))
    left = {op.out.name for op in other.executed.ops}
    gone = [op.out for op in plan.bound.ops if op.out.name not in left]
    saved_bytes = sum(4 * math.prod(sizes[i] for i in v.indices) for v in gone)
    plain, kernels = tnmoe.cost(plan), tnmoe.cost(other)
    for figure in ("macs", "flops", "matmul_flops", "elementwise_flops", "training_flops", "saved_bytes"):
        assert kernels.number(figure) == plain.number(figure), figure
    assert plain.activation_bytes - kernels.activation_bytes == saved_bytes
    assert plain.read_bytes - kernels.read_bytes >= saved_bytes  # more, where both products read the same
    formula = kernels.formula("activation_bytes")
    assert formula.subs({s: other.values[s.name] for s in formula.free_symbols}) == kernels.activation_bytes


def test_bytes_of_a_cp_block_by_hand():
    """R factors a token of both layers, expert and input side: neither written nor read."""
    spec = PRESETS["gpt2-cp"].spec
    plain = tnmoe.cost(tnmoe.plan(spec, tokens=4096, memory=26_000_000))
    kernels = tnmoe.cost(tnmoe.plan(spec, tokens=4096, memory=26_000_000, flavour="triton"))
    assert plain.activation_bytes - kernels.activation_bytes == 4 * 4096 * 556 * 4
    assert plain.read_bytes - kernels.read_bytes == 4 * 4096 * 556 * 4
    on_h100 = [
        tnmoe.predict(
            tnmoe.plan(spec, tokens=4096, memory=26_000_000, flavour=flavour).executed, tnmoe.datasheet("h100")
        )
        for flavour in ("portable", "triton")
    ]
    assert on_h100[1].seconds < on_h100[0].seconds


# ---- programs by hand ----------------------------------------------------------------------------------------

T_N, T_I, N_R, I_R, T_R = (Value(name, tuple(name)) for name in ("tn", "ti", "nr", "ir", "tr"))
SIZES = {"t": 4, "n": 3, "i": 5, "r": 2, "s": 3, "c": 7, "m": 2}


def program(*ops: Op, inputs: tuple[Value, ...] = (T_N, T_I, N_R, I_R)) -> Program:
    return verify(Program(inputs, (), (), ops, ops[-1].out, SIZES), laid_out=True)


A, B = Contract(Value("a", ("t", "r")), T_N, N_R), Contract(Value("b", ("t", "r")), T_I, I_R)


def test_what_is_used_twice_is_written():
    out = Multiply(T_R, A.out, B.out)
    twice = Multiply(Value("out", ("t", "r")), T_R, A.out)
    made = fuse_products(program(A, B, out, twice).ops, {"a", "b", "tr"})
    assert made == (A, ContractMultiply(T_R, T_I, I_R, None, A.out), twice)


def test_what_is_wanted_is_written():
    ops = program(A, B, Multiply(T_R, A.out, B.out)).ops
    assert fusible(ops, {"tr"}, SIZES) == {"a", "b"}
    assert fusible(ops, {"tr", "b"}, SIZES) == {"a"}
    assert fuse_products(ops, {"a"}) == (B, ContractMultiply(T_R, T_N, N_R, None, B.out))
    assert fuse_products(ops, set()) == ops


def test_a_broadcast_factor_is_no_epilogue():
    """A factor without the rows, or without the columns, is multiplied by an op of its own."""
    row = Value("row", ("r",))
    ops = program(A, Multiply(T_R, row, A.out), inputs=(T_N, N_R, row)).ops
    assert fuse_products(ops, {"a"}) == ops


def test_a_bias_of_rows_and_columns_is_not_fused():
    bias = Value("bias", ("t", "r"))
    whole = ContractAdd(Value("a", ("t", "r")), T_N, N_R, bias)
    out = Multiply(T_R, whole.out, B.out)
    made = fuse_products(program(whole, B, out, inputs=(T_N, T_I, N_R, I_R, bias)).ops, {"a", "b"})
    assert made == (whole, ContractMultiply(T_R, T_I, I_R, None, whole.out))


@pytest.mark.parametrize(
    ("op", "rule"),
    [
        (DualContract(T_R, T_N, N_R, None, T_I, T_I, None), "not defined"),
        (ContractMultiply(T_R, T_N, N_R, None, Value("factor", ("t",))), "differ in their axes"),
        (ContractMultiply(T_R, T_N, N_R, Value("factor", ("t",)), T_R), "not defined"),
        (ContractMix(Value("o", ("t", "m")), Value("mtr", ("t", "m", "r")), T_N, N_R, None), "rows of the product"),
    ],
)
def test_faulty_ops_are_refused(op, rule):
    wrong = Value("tr", ("t", "r")) if rule == "not defined" else None
    given = [v for v in operands(op) if v != wrong]
    if rule == "not defined":
        given = [v for v in given if v.name != operands(op)[-1].name]
    with pytest.raises(ProgramError, match=rule):
        verify(Program(tuple(dict.fromkeys(given)), (), (), (op,), op.out, SIZES), laid_out=True)


def test_numpy_defines_them():
    """Against one einsum each, in float64."""
    rng = np.random.default_rng(0)
    mixer, w, p = (Value(n, tuple(n)) for n in ("tms", "isc", "sc"))
    values = [T_N, T_I, N_R, I_R, mixer, w, p, Value("r", ("r",)), Value("factor", ("t", "r"))]
    env = {v.name: rng.normal(size=[SIZES[i] for i in v.indices]) for v in values}
    x = dict(env)
    cases = {
        DualContract(Value("o", ("t", "r")), T_N, N_R, None, T_I, I_R, values[7]): (
            np.einsum("tn,nr->tr", x["tn"], x["nr"]) * (np.einsum("ti,ir->tr", x["ti"], x["ir"]) + x["r"])
        ),
        ContractMultiply(Value("o", ("t", "r")), T_N, N_R, values[7], values[8]): (
            (np.einsum("tn,nr->tr", x["tn"], x["nr"]) + x["r"]) * x["factor"]
        ),
        ContractMix(Value("o", ("t", "m", "c")), mixer, T_I, w, p): (
            np.einsum("tms,tsc->tmc", x["tms"], np.einsum("ti,isc->tsc", x["ti"], x["isc"]) + x["sc"])
        ),
    }
    for op, want in cases.items():
        made = Program(tuple(values), (), (), (op,), op.out, SIZES)
        got = numpy_backend.execute(verify(made, laid_out=True), env)
        assert set(got) == set(env) | {"o"}
        np.testing.assert_allclose(got["o"], want, rtol=1e-12)


def test_plans_in_json():
    """What is fused is written and read; what cannot be is refused."""
    plan = tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=64, memory="recompute", flavour="triton")
    assert tnmoe.Plan.from_json(plan.to_json()) == plan
    assert plan.function.fused == ("experts", "projected")
    for fault, text in (
        ({"fused": ["gated"]}, "function.fused of a plan must be some of experts, projected, got .'gated'"),
        ({"fused": "experts"}, "function.fused of a plan must be a list"),
        ({"flavour": "fast"}, "only the flavour 'triton'"),
    ):
        data = {**plan.function.to_mapping(), **fault}
        with pytest.raises(tnmoe.PlanError, match=text):
            type(plan.function).read(
                Field(data, "a plan", tnmoe.PlanError, "function"), plan.bound, plan.adjoint.requires_grad
            )
