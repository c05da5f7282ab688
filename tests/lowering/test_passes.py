"""Common subexpressions, identities and dead ops: gone from the program, and every value as einsum has it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.cases import case

import tnmoe
from tnmoe.backends.numpy.execute import execute
from tnmoe.ir.contractions import Add, Contract, Merge, Multiply, Permute, Split
from tnmoe.ir.initialise import Normal
from tnmoe.ir.ops import Op
from tnmoe.ir.pointwise_ops import Gelu, LayerNorm
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Noise
from tnmoe.ir.value import Parameter, Value
from tnmoe.ir.verify import verify
from tnmoe.lowering.lower import run_passes
from tnmoe.lowering.prune import bypass, prune
from tnmoe.lowering.share import share

SIZES = {"t": 3, "i": 4, "r": 5, "a": 2, "b": 2}
X, W = Value("x", ("t", "i")), Value("w", ("i", "r"))


def program(*ops: Op, output: Value, coefficients: tuple[str, ...] = (), diagnostics: tuple[Op, ...] = ()) -> Program:
    return verify(
        Program(
            inputs=(X,),
            parameters=(Parameter("w", ("i", "r"), Normal(0, 1)),),
            buffers=(),
            ops=ops,
            output=output,
            sizes=SIZES,
            coefficients=coefficients,
            diagnostics=diagnostics,
        )
    )


def names(p: Program) -> list[str]:
    return [op.out.name for op in p.ops]


def value(name: str, *indices: str) -> Value:
    return Value(name, indices)


ONE, TWO = value("one", "t", "r"), value("two", "r", "t")
SUM = value("sum", "t", "r")


def run(p: Program) -> np.ndarray:
    rng = np.random.default_rng(0)
    laid_out = run_passes(p, SIZES)[-1][1]
    stored = {q.name: q.indices for q in laid_out.parameters}
    w = rng.normal(size=(4, 5))
    arrays = {"x": rng.normal(size=(3, 4)), "w": np.einsum(f"ir->{''.join(stored['w'])}", w)}
    return execute(laid_out, arrays)[p.output.name]


def expected() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 5))
    x = rng.normal(size=(3, 4))
    return x, w


def test_a_product_written_twice_is_computed_once() -> None:
    """Also with its operands exchanged and its axes named in another order; readers get the first one."""
    p = program(Contract(ONE, X, W), Contract(TWO, W, X), Add(SUM, ONE, TWO), output=SUM)
    found = verify(share(p))
    assert names(found) == ["one", "sum"]
    assert {v.name for v in (found.ops[-1].lhs, found.ops[-1].rhs)} == {"one"}
    x, w = expected()
    np.testing.assert_allclose(run(p), 2 * x @ w, rtol=1e-13)


def test_chains_of_repetitions_collapse() -> None:
    first, second = value("g1", "t", "r"), value("g2", "t", "r")
    two = value("two", "t", "r")
    p = program(
        Contract(ONE, X, W),
        Contract(two, X, W),
        Gelu(first, ONE),
        Gelu(second, two),
        Multiply(SUM, first, second),
        output=SUM,
    )
    assert names(share(p)) == ["one", "g1", "sum"]
    x, w = expected()
    gelu = torch.nn.functional.gelu(torch.tensor(x @ w)).numpy()
    np.testing.assert_allclose(run(p), gelu**2, rtol=1e-12)


def test_what_is_not_the_same_stays() -> None:
    """Another operand, another norm axis, noise, and results that callers know by name."""
    a, b = value("a1", "t", "i"), value("b1", "t", "i")
    noisy = program(Noise(a, X, X), Noise(b, X, X), Add(value("y", "t", "i"), a, b), output=value("y", "t", "i"))
    assert share(noisy) == noisy
    norms = program(
        LayerNorm(a, X, "i"), LayerNorm(b, X, "t"), Add(value("y", "t", "i"), a, b), output=value("y", "t", "i")
    )
    assert share(norms) == norms
    two = value("two", "t", "r")
    named = program(Contract(ONE, X, W), Contract(two, X, W), output=two, coefficients=("one",))
    assert share(named) == named


def test_orders_of_axes_and_views_undone_are_no_ops() -> None:
    turned, parts, whole = value("turned", "r", "t"), value("parts", "t", "a", "b"), value("whole", "t", "i")
    y = value("y", "t", "r")
    p = program(
        Split(parts, X, "i", ("a", "b")),
        Merge(whole, parts, "i", ("a", "b")),
        Contract(ONE, whole, W),
        Permute(turned, ONE),
        Gelu(y, replace(turned, indices=("t", "r"))),
        output=y,
    )
    assert names(verify(bypass(p))) == ["parts", "whole", "one", "turned", "y"]  # still there, but unread
    assert names(verify(prune(p))) == ["one", "y"]
    assert prune(p).ops[0].lhs.name == "x"
    x, w = expected()
    np.testing.assert_allclose(run(p), torch.nn.functional.gelu(torch.tensor(x @ w)).numpy(), rtol=1e-12)


def test_padding_and_names_that_callers_know_stay() -> None:
    parts, whole = value("parts", "t", "a", "b"), value("whole", "t", "i")
    padded = program(
        Split(parts, X, "i", ("a", "b"), padded=True), Merge(whole, parts, "i", ("a", "b"), padded=True), output=whole
    )
    assert prune(padded) == padded
    out = value("out", "i", "t")
    assert names(prune(program(Permute(out, X), output=out))) == ["out"]


def test_what_nobody_reads_is_left_out() -> None:
    """Unless it is a coefficient, or a diagnostic reads it."""
    extra, more, y = value("extra", "t", "i"), value("more", "t", "i"), value("y", "t", "r")
    p = program(Gelu(extra, X), LayerNorm(more, X, "i"), Contract(y, X, W), output=y)
    assert names(prune(p)) == ["y"]
    assert names(prune(replace(p, coefficients=("more",)))) == ["more", "y"]
    told = replace(p, diagnostics=(Gelu(value("told", "t", "i"), extra),))
    assert names(prune(told)) == ["extra", "y"]
    assert prune(told).diagnostics == told.diagnostics


def test_a_random_program_computes_the_same() -> None:
    """200 programs of sums, products and norms with repetitions, against the same ops without any pass."""
    shrunk = 0
    for trial in range(200):
        with case(trial) as rng:
            values, ops = [X], []
            for k in range(rng.randint(3, 9)):
                out = value(f"v{k}", *rng.sample(["t", "i"], 2))
                a, b = rng.choice(values), rng.choice(values)
                ops.append(rng.choice([Add(out, a, b), Multiply(out, a, b), LayerNorm(out, a, "i"), Permute(out, a)]))
                values.append(out)
            y = value("y", "t", "i")
            ops.append(Add(y, rng.choice(values), values[-1]))
            p = program(*ops, output=y)
            short = prune(share(p))
            shrunk += len(short.ops) < len(p.ops)
            x = np.random.default_rng(1).normal(size=(3, 4))
            env = {"x": x}
            for op in ops:  # by hand: every array (t, i), whatever order its value names
                match op:
                    case Add(out, a, b):
                        env[out.name] = env[a.name] + env[b.name]
                    case Multiply(out, a, b):
                        env[out.name] = env[a.name] * env[b.name]
                    case LayerNorm(out, a):
                        rows = env[a.name]
                        spread = np.sqrt(rows.var(1, keepdims=True) + 1e-5)
                        env[out.name] = (rows - rows.mean(1, keepdims=True)) / spread
                    case Permute(out, a):
                        env[out.name] = env[a.name]
            laid_out = run_passes(p, SIZES)[-1][1]
            found = execute(laid_out, {"x": x, "w": np.ones((4, 5))})["y"]
            np.testing.assert_allclose(found, env["y"], rtol=1e-9, atol=1e-9)
    assert shrunk > 100


@pytest.mark.parametrize("tokens", [1, 4096])
def test_an_explanation_tells_what_the_passes_did(tokens: int) -> None:
    block = tnmoe.MuMoEBlock(768, 3072, 768, 256, tnmoe.CP(556), tnmoe.Gate("entmax15", "layer"))
    said = tnmoe.explain(tnmoe.plan(block, tokens=tokens))
    assert "Biases added inside their matrix products: up_projected, down_projected." in said
    assert "Stored with the longer side last, which few rows read faster: up_input_factor, down_input_factor." in said
    assert "Computed once" not in said
    assert "Left out" not in said
