"""Emission decides nothing: what it writes was planned, and it plans, searches and lowers nothing again."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import tnmoe
from tnmoe.ir.bound import BoundProgram
from tnmoe.planning import plan_layer
from tnmoe.reports import ideal

PLANS: dict[str, Callable[[], tnmoe.Plan]] = {
    "autograd": lambda: tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3)), tokens=8),
    "own backward pass": lambda: tnmoe.plan(tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.CP(3)), tokens=8, memory="save"),
    "chunks": lambda: tnmoe.plan(tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.CP(3)), tokens=8, flavour="fast", chunk=4),
    "capacity": lambda: tnmoe.plan(tnmoe.SparseMoE(6, 6, 4, 2, 8, capacity=125), tokens=8),
    "masked": lambda: tnmoe.plan(tnmoe.SparseMoE(6, 6, 4, 2, 8, lowering="masked"), tokens=8),
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is planned from now on, by whichever module's name for `plan`."""
    calls: list[object] = []
    original = plan_layer.plan

    def noted(what: tnmoe.Spec, **options: int) -> tnmoe.Plan:
        calls.append(what)
        return original(what, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("tnmoe.") and getattr(module, "plan", None) is original:
            monkeypatch.setattr(module, "plan", noted)
    return calls


@pytest.mark.parametrize("kind", PLANS)
def test_emission_plans_nothing(kind: str, planned: list[object]) -> None:
    plan = PLANS[kind]()
    planned.clear()
    tnmoe.emit(plan)
    tnmoe.build(plan)
    assert not planned


def test_an_inference_form_is_planned_once(planned: list[object]) -> None:
    """Its orders are those for weights that stay the same, which the plan for training does not have."""
    plan = PLANS["capacity"]()
    planned.clear()
    tnmoe.emit(plan, freeze=True)
    assert len(planned) == 1


def test_the_ideal_twin_is_planned_when_it_is_read(planned: list[object]) -> None:
    plan = PLANS["masked"]()
    planned.clear()
    report = tnmoe.cost(plan)
    assert report.macs > 0
    assert str(report.formula("macs"))
    assert not planned
    assert report.ideal is not None
    assert report.ideal.macs < report.macs
    assert len(planned) == 1
    assert ideal.ideal_plan(PLANS["autograd"]()) is None


def test_a_plan_and_its_reports_share_one_bound_program() -> None:
    plan = PLANS["own backward pass"]()
    assert isinstance(plan.bound, BoundProgram)
    assert plan.bound is plan.bound
    assert plan.bound.owner is plan.bound.owner
    assert plan.adjoint is not None
    assert plan.adjoint.program is plan.bound
    assert plan.adjoint.backward is plan.adjoint.backward
