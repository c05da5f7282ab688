"""`tnmoe table moe`: every family at equal parameters and at equal MACs a token."""

from __future__ import annotations

import json

import pytest

import tnmoe
from tnmoe.cli.main import main
from tnmoe.layers.kinds import KINDS
from tnmoe.presets import registry
from tnmoe.presets.moe import EQUAL_MACS, EQUAL_PARAMETERS, TOKENS
from tnmoe.presets.published import PUBLISHED

MLP_PARAMETERS = 768 * 3072 * 2 + 3072 + 768


@pytest.mark.parametrize("label", EQUAL_PARAMETERS)
def test_parameters_are_equal(label: str) -> None:
    assert tnmoe.cost(EQUAL_PARAMETERS[label], tokens=TOKENS).parameters == pytest.approx(MLP_PARAMETERS, rel=0.03)


@pytest.mark.parametrize("label", EQUAL_MACS)
def test_macs_are_equal(label: str) -> None:
    assert tnmoe.cost(EQUAL_MACS[label], tokens=TOKENS).macs == pytest.approx(TOKENS * 768 * 3072 * 2, rel=0.03)


def test_published_sizes() -> None:
    """Parameters by arithmetic on the published sizes, written out; and the command shows them."""
    found = {label: tnmoe.cost(p.spec, tokens=TOKENS).parameters for label, p in PUBLISHED.items()}
    assert found == {
        "Switch-Base (top-1 of 256)": 768 * 256 + 256 * 2 * 768 * 3072,
        "DeepSeekMoE 16B (top-6 of 64, two shared)": 2048 * 64 + 66 * 2 * 2048 * 1408,
        "Soft MoE B/16 (128 experts, one slot)": 768 * 128 + 128 * (2 * 768 * 3072 + 3072 + 768),
        "PEER (1,048,576 experts, 8 heads of 16)": 1024**2 * 1024 + 8 * (512 * 256 + 2 * 1024 * 128),
        "Mixture of Depths (12.5 %)": 768 + 2 * 768 * 3072 + 3072 + 768,
        "MoA, Transformer base (8 of 8 heads of 128)": 512 * 8 + 2 * 8 * 512 * 128 + 2 * 512 * 128,
        "MoEfication of T5-Base (26 of 128 groups)": 768 * 128 + 2 * 768 * 3072 + 3072 + 768,
        "MoLORA, T5-Large (10 adapters, r = 4)": 1024 * 10 + 10 * 4 * (1024 + 2816) + 1024 * 2816,
        "MoSLoRA, LLaMA-3 8B (r = 16)": 16 * (4096 + 14336) + 16 * 16 + 4096 * 14336,
    }
    assert all(p.source.startswith("arXiv ") for p in PUBLISHED.values())
    rows = registry.find("moe-published")[1]
    assert [row.label for row in rows] == list(PUBLISHED)
    assert tnmoe.MixtureOfDepths(64, 64).layer().declaration["capacity"] == 12.5


def test_every_kind_of_mixture_is_there() -> None:
    shown = {spec.kind for spec in EQUAL_PARAMETERS.values()}
    assert set(KINDS) - shown == {"mumoe", "factorized_linear", "linear"}
    assert shown - {spec.kind for spec in EQUAL_MACS.values()} == {"moslora"}


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def table(*arguments: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(["table", *arguments])
        assert done.value.code == 0
        return capsys.readouterr().out

    records = json.loads(table("moe", "--format", "json"))
    assert len(records) == len(EQUAL_PARAMETERS) + len(EQUAL_MACS)
    marked = {r["layer"] for r in records if r["layer"].endswith("†")}
    families = ("MoA", "expert choice", "Soft MoE", "Mixture of Tokens", "Mixture of Depths", "sparse MoE, capacity")
    assert all(name.startswith(families) for name in marked)
    assert {f for f in families if any(name.startswith(f) for name in marked)} == set(families)
    assert "† couples tokens" in table("moe-flops")


def test_rank_of_gathered_factors() -> None:
    """min(I, O, R) for CP, min(I, O, r3 · min(r1, r2)) for a tensor ring, as in the other lowering."""
    for lowering in ("gathered", "masked"):
        cp = tnmoe.SparseMoE(20, 30, 8, 2, factorization=tnmoe.CP(7), lowering=lowering)
        ring = tnmoe.SparseMoE(20, 30, 8, 2, factorization=tnmoe.TensorRing((2, 3, 4)), lowering=lowering)
        assert (tnmoe.cost(cp).max_rank, tnmoe.cost(ring).max_rank) == (7, 8)
