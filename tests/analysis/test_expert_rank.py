"""Ranks of experts against matrices of known singular values, and against matrices formed from the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle

import tnmoe

GATE = tnmoe.Gate("softmax", "none")


def with_singular_values(rows: list[list[float]]) -> tuple[tnmoe.Plan, torch.nn.Module]:
    """A CP layer whose expert n is diag(rows[n]): the identity as input and output factor."""
    width = len(rows[0])
    plan = tnmoe.plan(tnmoe.MuMoE(width, width, len(rows), tnmoe.CP(width), GATE, bias=False))
    module = tnmoe.build(plan)
    with torch.no_grad():
        module.input_factor.copy_(torch.eye(width))
        module.output_factor.copy_(torch.eye(width))
        module.expert_factor.copy_(torch.tensor(rows))
    return plan, module


def test_ranks_of_known_singular_values() -> None:
    found = tnmoe.expert_ranks(*with_singular_values([[1, 1, 0, 0], [3, 1, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]]))
    assert [r.numerical for r in found.rows] == [2, 2, 4, 0]
    assert [r.expert for r in found.rows] == [(0,), (1,), (2,), (3,)]
    # exp of the entropy: of (½, ½) it is 2; of (¾, ¼) it is 4 / 3^¾
    assert [r.effective for r in found.rows] == pytest.approx([2, 4 / 3**0.75, 4, 0])
    assert [r.stable for r in found.rows] == pytest.approx([2, (9 + 1) / 9, 4, 0])
    assert {r.max_rank for r in found.rows} == {4}
    assert found.mean_effective == pytest.approx((2 + 4 / 3**0.75 + 4) / 4)
    assert found.parameters_per_rank == pytest.approx((16 + 16 + 16 + 16) / found.mean_effective)
    plan, _ = with_singular_values([[1, 1, 0, 0], [3, 1, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert found.flops_per_rank == pytest.approx(tnmoe.cost(plan).flops / found.mean_effective)
    assert "4.00" in str(found)


@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.MuMoE(9, 8, (3, 2), tnmoe.CP(5), GATE),
        tnmoe.MuMoEBlock(9, 7, 8, 4, tnmoe.TensorRing((2, 3, 2)), GATE),
        tnmoe.MuMoE(6, 7, 3, tnmoe.Dense(), GATE, bias=False),
    ],
    ids=["CP, two levels", "TR block", "dense"],
)
def test_matrices_are_those_of_the_definition(spec: Any) -> None:
    plan = tnmoe.plan(spec)
    module = tnmoe.build(plan, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    found = tnmoe.expert_ranks(plan, module.state_dict())
    weights = oracle.canonical(plan, oracle.leaves(module))
    rows = iter(found.rows)
    for prefix in ("up_", "down_") if isinstance(spec, tnmoe.MuMoEBlock) else ("",):
        whole = oracle.whole_weight(spec, weights, prefix).detach().numpy()
        inputs = whole.shape[-2] - spec.bias  # the last row is the bias
        for expert in np.ndindex(whole.shape[: len(spec.levels)]):
            matrix, row = whole[expert][:inputs], next(rows)
            values = np.linalg.svd(matrix, compute_uv=False)
            shares = values / values.sum()
            assert row.expert == expert
            assert row.numerical == np.linalg.matrix_rank(matrix) == row.max_rank
            entropy = -sum(s * math.log(s) for s in shares if s > 0)
            assert row.effective == pytest.approx(math.exp(entropy), rel=1e-6)
            assert row.stable == pytest.approx(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
    assert next(rows, None) is None


def test_split_axes_are_one_axis_of_the_matrix() -> None:
    """Kronecker factors: the singular values of each expert are all products of the factors' singular values."""
    plan = tnmoe.plan(tnmoe.FactorizedLinear(6, 6, tnmoe.Kronecker((2, 3)), bias=False))
    module = tnmoe.build(plan, dtype=torch.float64)
    (row,) = tnmoe.expert_ranks(plan, module).rows
    with torch.no_grad():
        dense = module(torch.eye(6, dtype=torch.float64)).numpy()
    assert row.numerical == np.linalg.matrix_rank(dense) == 4  # 2 × 3 times 3 × 2
    values = np.linalg.svd(dense, compute_uv=False)
    assert row.stable == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)


def test_some_experts_and_faults() -> None:
    plan, module = with_singular_values([[1, 1], [3, 1], [2, 2]])
    assert [r.expert for r in tnmoe.expert_ranks(plan, module, experts=[2, (0,)]).rows] == [(2,), (0,)]
    with pytest.raises(tnmoe.DeclarationError, match=r"no expert \(3,\): the levels have 3"):
        tnmoe.expert_ranks(plan, module, experts=[3])
    with pytest.raises(tnmoe.DeclarationError, match="must have the axes"):
        tnmoe.expert_ranks(plan, {})
    mlp = tnmoe.plan(tnmoe.Network.parse("bi,io->bo", weights="io"), sizes={"b": 1, "i": 2, "o": 3})
    with pytest.raises(tnmoe.CostError, match="no experts in factors"):
        tnmoe.expert_ranks(mlp, {})
