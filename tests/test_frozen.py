"""Parameters that are frozen have no gradient and no state; their work is held in `test_exactness.py`."""

from __future__ import annotations

import pytest

import tnmoe


def test_frozen_parameters_have_no_state() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), bias=False))
    report = tnmoe.cost(plan, frozen="input_factor")
    assert tnmoe.cost(plan).trained_parameters - report.trained_parameters == 6 * 3
    assert report.parameters == tnmoe.cost(plan).parameters
    assert report.training_state("adam", "fp32").state_bytes == 8 * report.trained_parameters
    assert not any("gradient of input_factor" in str(r) for r in report.backward().records())
    with pytest.raises(tnmoe.CostError, match="unknown parameter 'factor'"):
        tnmoe.cost(plan, frozen=["factor"])
