"""`tnmoe table moe`: every family at equal parameters and at equal MACs a token."""

from __future__ import annotations

import json

import pytest

import tnmoe
from tnmoe.cli import main
from tnmoe.layers import KINDS
from tnmoe.moe_presets import EQUAL_MACS, EQUAL_PARAMETERS, TOKENS

MLP_PARAMETERS = 768 * 3072 * 2 + 3072 + 768


@pytest.mark.parametrize("label", EQUAL_PARAMETERS)
def test_parameters_are_equal(label: str) -> None:
    assert tnmoe.cost(EQUAL_PARAMETERS[label], tokens=TOKENS).parameters == pytest.approx(MLP_PARAMETERS, rel=0.03)


@pytest.mark.parametrize("label", EQUAL_MACS)
def test_macs_are_equal(label: str) -> None:
    assert tnmoe.cost(EQUAL_MACS[label], tokens=TOKENS).macs == pytest.approx(TOKENS * 768 * 3072 * 2, rel=0.03)


def test_every_kind_of_mixture_is_there() -> None:
    shown = {spec.kind for spec in EQUAL_PARAMETERS.values()}
    assert set(KINDS) - shown == {"mumoe", "factorized_linear", "linear"}
    assert shown - {spec.kind for spec in EQUAL_MACS.values()} == {"moslora"}


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
