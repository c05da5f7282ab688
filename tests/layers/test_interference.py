"""What a layer that does not couple tokens promises: no other token of the batch changes a bit of a token's result."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from support.families import built, rows
from torch import Tensor, nn

import tnmoe
from tnmoe.layers.kinds import KINDS

GATE = tnmoe.Gate("entmax15", "layer")

UNCOUPLED: dict[str, tnmoe.Spec] = {
    "linear": tnmoe.Linear(48, 40),
    "mlp": tnmoe.MLP(48, 64, 40),
    "factorized linear": tnmoe.FactorizedLinear(48, 40, tnmoe.LowRank(9)),
    "μMoE": tnmoe.MuMoE(48, 40, 8, tnmoe.CP(20), GATE),
    "μMoE block": tnmoe.MuMoEBlock(48, 64, 40, (4, 3), tnmoe.TensorRing((2, 2, 2, 6)), GATE),
    "dense": tnmoe.DenseMoE(48, 32, 40, 8),
    "sparse": tnmoe.SparseMoE(48, 40, 8, 2, hidden=64),
    "sparse, one": tnmoe.SparseMoE(48, 40, 8, 1, hidden=64, bias=False, shares="before"),
    "sparse, fine-grained, shared": tnmoe.SparseMoE.fine_grained(48, 64, 40, 8, 2, 2, shared=32),
    "sparse, null": tnmoe.SparseMoE(48, 40, 6, 3, hidden=64, null=4, shares="normalised"),
    "sparse, masked": tnmoe.SparseMoE(48, 40, 8, 2, hidden=64, lowering="masked"),
    "sparse, CP": tnmoe.SparseMoE(48, 40, 8, 2, hidden=64, factorization=tnmoe.CP(12)),
    "SMILE": tnmoe.SMILE(48, 64, 40, 3, 4, 2, 2),
    "multi-head": tnmoe.MultiHeadMoE(48, 64, 6, 2, 3),
    "PEER": tnmoe.PEER(48, 40, 64, 2, 4, 8),
    "CartesianMoE": tnmoe.CartesianMoE(48, 64, 6, 2),
    "DeepMoE": tnmoe.DeepMoE(48, 64, 40, 6),
    "Residual MoE": tnmoe.ResidualMoE(48, 40, 6, tnmoe.CP(10)),
    "MoEfied": tnmoe.MoEfied(48, 96, 40, 6, 2),
    "MoLORA": tnmoe.MoLoRA(48, 40, 6, 4, True),
    "MoV": tnmoe.MoV(48, 6),
    "MoSLoRA": tnmoe.MoSLoRA(48, 40, 6, True),
    "TensorPoly-I": tnmoe.TensorPoly(48, 40, 6, 4),
    "TensorPoly-II": tnmoe.TensorPoly(48, 40, 6, 4, 2, "II"),
    "TensorPoly-II, norm": tnmoe.TensorPoly(48, 40, 6, 4, 3, "II", True),
    "SMILE, masked": tnmoe.SMILE(48, 64, 40, 3, 4, 2, 2, lowering="masked"),
    "multi-head, masked": tnmoe.MultiHeadMoE(48, 64, 6, 2, 3, lowering="masked"),
    "CartesianMoE, masked": tnmoe.CartesianMoE(48, 64, 6, 2, lowering="masked"),
    "MoEfied, masked": tnmoe.MoEfied(48, 96, 40, 6, 2, "masked"),
}


@functools.cache
def made(name: str, tokens: int) -> tuple[tnmoe.Plan, nn.Module]:
    """Planned and built once."""
    return built(UNCOUPLED[name], tokens)


def batches(x: Tensor, t: int) -> Iterator[Tensor]:
    """Batches of the same size with the same token `t`: others at random, all alike, all like it, and all NaN."""
    generator = torch.Generator().manual_seed(t)
    for other in (
        *(torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(3)),
        torch.randn(x.shape[1], generator=generator, dtype=x.dtype).expand_as(x).clone(),
        x[t].expand_as(x).clone(),
        torch.cat([x[t].expand(len(x) // 2, -1), torch.randn(x[len(x) // 2 :].shape, dtype=x.dtype)]),
        torch.full_like(x, torch.nan),
    ):
        other[t] = x[t]
        yield other


def test_every_kind_is_held_to_it() -> None:
    """Each kind of declaration stands here, or says that it couples tokens."""
    sample = {spec.kind for spec in UNCOUPLED.values()}
    assert set(KINDS) - sample == {
        "expert_choice",
        "soft_moe",
        "mixture_of_tokens",
        "mixture_of_depths",
        "mixture_of_heads",
    }
    assert not any(spec.layer().couples_tokens for spec in UNCOUPLED.values())


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNCOUPLED)
def test_other_tokens_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """As declared by default; of few tokens (multiplied one by one) and of many (sorted, in blocks)."""
    unchanged(name, dtype, (3, 90))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["sparse", "sparse, null", "multi-head"])
def test_nor_with_two_threads(name: str, dtype: torch.dtype) -> None:
    """A library may give a thread the last few rows, which it sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        unchanged(name, dtype, (90,))
    finally:
        torch.set_num_threads(before)


def unchanged(name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Compare three tokens' results in batches that agree in that token alone."""
    for tokens in sizes:
        plan, module = made(name, tokens)
        module = copy.deepcopy(module).to(dtype)
        x = rows(plan, tokens).to(dtype)
        y = module(x)
        assert bool(y.isfinite().all())
        for t in (0, 1, tokens - 1):
            for other in batches(x, t):
                assert torch.equal(module(other)[t], y[t]), (tokens, t)


def test_without_blocks_the_number_of_rows_shows() -> None:
    """The test above is sharp: rows that run as they are chosen (block = 1) do change in their last bits."""
    plan, module = built(tnmoe.SparseMoE(48, 40, 8, 2, hidden=64, block=1), 90)
    x = rows(plan, 90)
    y = module(x)
    moved = [not torch.equal(module(other)[t], y[t]) for t in range(0, 90, 9) for other in batches(x, t)]
    assert any(moved) or not _rows_show(x.dtype)


def _rows_show(dtype: torch.dtype) -> bool:
    """Whether this library's product of a row depends on how many rows it is given."""
    x, w = torch.randn(1, 48, dtype=dtype), torch.randn(48, 64, dtype=dtype)
    return any(not torch.equal((x.expand(m, -1).contiguous() @ w)[0], (x @ w)[0]) for m in range(2, 12))
