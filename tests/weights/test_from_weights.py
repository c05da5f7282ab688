"""Layers from existing weights: exact where ranks allow, the best approximation elsewhere, files in and out."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import tnmoe
from tnmoe.ir.network import Tensor
from tnmoe.weights.least_squares import contract, factorize

FREE = tnmoe.Gate("softmax", "none")


def low_rank_linear(rank, inputs=24, outputs=36, seed=0):
    """A linear layer whose matrix, with its bias as one more column, has the given rank."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator).double() for s in ((outputs, rank), (rank, inputs + 1)))
    linear = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        whole = left @ right
        linear.weight.copy_(whole[:, :-1])
        linear.bias.copy_(whole[:, -1])
    return linear


EXACT = {
    "cp": tnmoe.CP(5),
    "tensor_ring": tnmoe.TensorRing((2, 2, 3)),
    "mixed ring": tnmoe.TensorRing((2, 5, 5), ("i", "n", "o")),
    "train n, i, o": tnmoe.TensorTrain((3, 5)),
    "train i, n, o": tnmoe.TensorTrain((5, 5), ("i", "n", "o")),
    "tucker": tnmoe.Tucker((2, 5, 5)),
    "block_term": tnmoe.BlockTerm(2, (2, 3, 3)),
    "hierarchical": tnmoe.HierarchicalTucker(("n", ("i", "o")), (2, 5, 5, 4)),
    "low_rank": tnmoe.LowRank(4),
    "custom": tnmoe.Custom("bn,bi,nr,ir,ro->bo", {"r": 5}),
    "dense": tnmoe.Dense(),
    "monarch": tnmoe.Monarch((6, 9), 4),
}


@pytest.mark.parametrize("factorization", EXACT.values(), ids=EXACT)
def test_a_deficient_matrix_is_reconstructed(factorization):
    """Rank 4: the layer computes what the linear one did, whatever its gate says; each expert is the map."""
    linear = low_rank_linear(4)
    made = tnmoe.from_linear(linear, factorization, experts=3, gate=FREE)
    assert len(made.errors) == 3
    assert max(made.errors) < 1e-5
    with torch.no_grad():
        made.module.gate_projection.normal_()  # the gate chooses, and all experts are alike
        x = torch.randn(7, 24, dtype=torch.float64)
        torch.testing.assert_close(made.module(x), linear(x), rtol=1e-5, atol=1e-5)


def test_a_sum_of_kronecker_products_is_found():
    """The rearranged matrix has rank 2 (Van Loan & Pitsianis, 1993)."""
    rng = np.random.default_rng(0)
    whole = sum(np.kron(rng.standard_normal((4, 6)), rng.standard_normal((6, 6))) for _ in range(2))
    linear = nn.Linear(24, 36).double()
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(whole.T.copy()))
    made = tnmoe.from_linear(linear, tnmoe.Kronecker((4, 6), 2), experts=(2, 2), gate=FREE)
    assert made.error < 1e-10
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(made.module(x), linear(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "factorization", [tnmoe.CP("R"), tnmoe.TensorRing((4, "R")), tnmoe.Tucker(("R", "R"))], ids=str
)
def test_error_falls_with_rank_and_is_that_of_the_truncated_svd(factorization):
    """A random 768 × 768; Eckart & Young: no map of that rank comes closer."""
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(weight.double())
    step = 4 if isinstance(factorization, tnmoe.TensorRing) else 1
    ranks = [8 // step, 32 // step, 64 // step]
    curve = tnmoe.error_curve(weight, factorization, ranks)
    errors = [p.error for p in curve]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 3
    for point in curve:
        best = float(values[point.rank * step :].square().sum().sqrt() / values.norm())
        assert point.error == pytest.approx(best, rel=1e-6)
    assert curve[0].parameters == {"cp": 12288, "tensor_ring": 12288, "tucker": 12352}[factorization.kind]


def test_low_rank_experts_are_truncated_svds():
    """Each expert by itself, whatever the others are."""
    weights = torch.randn(5, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    made = tnmoe.from_experts(weights, tnmoe.LowRank(6))
    for k in range(5):
        values = torch.linalg.svdvals(weights[k])
        assert made.errors[k] == pytest.approx(float(values[6:].norm() / values.norm()), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "factorization", [tnmoe.CP("R"), tnmoe.TensorRing((3, 3, "R")), tnmoe.Tucker((4, "R", "R"))], ids=str
)
def test_experts_of_a_factorized_stack_are_found(factorization):
    """Experts that a network made are recovered by the same network; fewer ranks lose more."""
    weights = torch.randn(4, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors = [p.error for p in tnmoe.error_curve(weights, factorization, [2, 4, 8])]
    assert errors[0] > errors[1] > errors[2]
    rng = np.random.default_rng(4)
    network = [Tensor("a", ("n", "r")), Tensor("b", ("i", "r")), Tensor("c", ("o", "r"))]
    arrays = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal((10, 3)), "c": rng.standard_normal((12, 3))}
    whole = contract(network, arrays, ("n", "o", "i"))
    made = tnmoe.from_experts(torch.from_numpy(whole), tnmoe.CP(3), sweeps=500)
    assert made.error < 1e-3
    assert max(made.errors) < 1e-2


def test_experts_from_linear_layers_keep_their_biases():
    layers = [nn.Linear(6, 5).double() for _ in range(3)]
    for factorization in (tnmoe.Dense(), tnmoe.Monarch((2, 1), 6)):
        made = tnmoe.from_experts(layers, factorization, gate=FREE)
        assert made.error < 1e-10
        x = torch.randn(4, 6, dtype=torch.float64)
        with torch.no_grad():
            made.module.gate_projection.normal_()
            (shares,) = made.module.expert_coefficients(x)
            expected = sum(shares[:, k : k + 1] * layers[k](x) for k in range(3))
            torch.testing.assert_close(made.module(x), expected)


def test_spread_parts_the_experts_and_without_experts_there_is_none():
    linear = low_rank_linear(4)
    made = tnmoe.from_linear(linear, tnmoe.CP(5), experts=3, spread=0.1)
    assert len(torch.unique(made.module.expert_factor, dim=0)) == 3
    plain = tnmoe.from_linear(linear.float(), tnmoe.TensorTrain((5,)))
    assert isinstance(plain.spec, tnmoe.FactorizedLinear)
    assert len(plain.errors) == 1
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(plain.module(x), linear(x), rtol=1e-4, atol=1e-4)


def test_large_cores_need_no_large_system():
    """A block term's core has P·r·r unknowns at once; conjugate gradients take them without their matrix."""
    rng = np.random.default_rng(5)
    sizes = {"p": 2, "a": 50, "b": 50, "i": 60, "o": 60}
    network = [Tensor("u", ("p", "i", "a")), Tensor("core", ("p", "a", "b")), Tensor("v", ("p", "o", "b"))]
    found = factorize(network, sizes, rng.standard_normal((60, 60)), ("i", "o"), sweeps=3)
    assert found.error < 1e-4


def test_safetensors_files_round_trip(tmp_path):
    """A Mixtral-like checkpoint in, a factorized layer out, with its declaration."""
    experts = {f"layers.0.moe.experts.{k}.w1.weight": torch.randn(8, 6) for k in range(3)}
    source = tnmoe.write_safetensors({**experts, "norm": torch.ones(6)}, tmp_path / "in.safetensors")
    stack = tnmoe.stack_experts(tnmoe.read_safetensors(source), "layers.0.moe.experts.{}.w1.weight")
    assert stack.shape == (3, 8, 6)
    made = tnmoe.from_experts(stack, tnmoe.LowRank(6), gate=FREE)
    assert made.error < 1e-5
    target = tnmoe.write_safetensors(made.module.state_dict(), tmp_path / "out.safetensors", planned=made.plan)
    header = target.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    again = tnmoe.build(tnmoe.plan(tnmoe.declare(json.loads(metadata["tnmoe_declaration"]))))
    again.load_state_dict(tnmoe.read_safetensors(target))
    x = torch.randn(4, 6)
    torch.testing.assert_close(again(x), made.module(x))


FAULTS = {
    "no linear layer": (lambda: tnmoe.from_linear(nn.ReLU(), tnmoe.CP(3)), "takes a torch.nn.Linear, got ReLU"),
    "a matrix for experts": (lambda: tnmoe.from_experts(torch.ones(3, 4), tnmoe.CP(3)), "must be (N, O, I)"),
    "infinite": (lambda: tnmoe.from_experts(torch.full((2, 3, 4), torch.inf), tnmoe.CP(3)), "infinite or undefined"),
    "biases": (
        lambda: tnmoe.from_experts(torch.ones(2, 3, 4), tnmoe.CP(3), biases=torch.ones(2)),
        "biases must be (2, 3), got (2,)",
    ),
    "layers that differ": (
        lambda: tnmoe.from_experts([nn.Linear(2, 3), nn.Linear(2, 4)], tnmoe.CP(3)),
        "the experts differ in shape",
    ),
    "no open rank": (lambda: tnmoe.error_curve(torch.ones(3, 4), tnmoe.CP(3), [1]), "needs one open symbol"),
    "no such expert": (lambda: tnmoe.stack_experts({"a": torch.ones(1)}, "b.{}"), "no tensor 'b.0'; there are a"),
    "no such file": (lambda: tnmoe.read_safetensors("missing.safetensors"), "missing.safetensors cannot be read"),
}


@pytest.mark.parametrize(("call", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(call, words):
    with pytest.raises(tnmoe.TnmoeError) as caught:
        call()
    assert words in str(caught.value)
