"""Measured beside predicted times, and predicted times of training. The clock is made up: nothing waits for it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_hardware import OVERHEAD, by_hand

import tnmoe
from tnmoe.api import emit, loaded
from tnmoe.backends.torch_steps import step_sources
from tnmoe.calibrate import processor
from tnmoe.cli import main
from tnmoe.datasheet import datasheet
from tnmoe.device_profile import DeviceProfile
from tnmoe.html_report import html_report
from tnmoe.ops import operands, results
from tnmoe.training_time import predict_training

BLOCK = tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.TensorRing((2, 2, 3)), tnmoe.Gate("entmax15", "batch"), input_norm=True)


def here() -> DeviceProfile:
    """A profile that says it is of this machine."""
    return replace(by_hand(), name=processor(), source=f"calibrated by hand, {torch.get_num_threads()} threads")


@pytest.mark.parametrize(
    "spec",
    [
        BLOCK,
        tnmoe.FactorizedLinear(13, 17, tnmoe.Monarch((4, 5), 3, True)),
        tnmoe.SparseMoE(6, 5, 4, active=2, hidden=8),
        tnmoe.PEER(6, 5, 16, 2, 3, 4),
    ],
    ids=lambda s: type(s).__name__,
)
def test_steps_one_after_the_other_are_the_module(spec: tnmoe.layers.Spec) -> None:
    plan = tnmoe.plan(spec, tokens=7)
    module = tnmoe.build(plan, dtype=torch.float64).eval()
    steps = loaded(f"{emit(plan)}\n\n{step_sources(plan.bound)}")
    x = torch.randn(7, int(plan.bound.sizes["i"]), dtype=torch.float64)
    values = dict(module.named_parameters()) | dict(module.named_buffers()) | {"x": x}
    with torch.no_grad():
        for k, op in enumerate(plan.bound.ops, start=1):
            names = dict.fromkeys(v.name for v in (*plan.bound.inputs, *operands(op)))
            made = getattr(steps, f"step_{k}")(*(values[name] for name in names))
            values |= zip((v.name for v in results(op)), made if isinstance(made, tuple) else (made,), strict=True)
        assert torch.equal(values[plan.bound.output.name], module(x))


@pytest.mark.parametrize("memory", [None, "save"])
def test_measured_stands_beside_predicted(memory: str | None) -> None:
    """By a clock that ticks 1/1024 s a look, the two calls of a sample take as long."""
    plan = tnmoe.plan(BLOCK, tokens=12, memory=memory)
    ticks = itertools.count()
    found = tnmoe.measured(plan, here(), rounds=3, clock=lambda: next(ticks) / 1024)
    prediction = tnmoe.predict(plan.bound, here())
    assert found.prediction == prediction
    assert {*found.per_op, found.forward, found.training} == {1 / 2048}  # two calls a sample
    rows = found.table().records()
    assert [r["op"] for r in rows] == [*(type(op).__name__ for op in plan.bound.ops), "forward", "forward and backward"]
    assert rows[0]["predicted_nanoseconds"] == round(1e9 * prediction.per_op[0])
    assert rows[-2]["predicted_nanoseconds"] == round(1e9 * prediction.seconds)
    assert rows[-2]["ratio"] == round(prediction.seconds * 2048, 2)
    assert "Profile: " in str(found)


def test_frozen_layers_have_no_training_time() -> None:
    network = tnmoe.Network.parse("ti,io->to", weights="")
    plan = tnmoe.plan(network, sizes={"t": 3, "i": 4, "o": 5}, input_gradients=False)
    found = tnmoe.measured(plan, here(), rounds=1)
    assert found.training is None
    assert [r["op"] for r in found.table().records()] == ["Contract", "forward"]


def test_other_machines_are_refused() -> None:
    plan = tnmoe.plan(tnmoe.Linear(4, 5), tokens=3)
    with pytest.raises(tnmoe.CostError, match="of 'slow machine', but this machine is"):
        tnmoe.measured(plan, by_hand())
    with pytest.raises(tnmoe.CostError, match=r"torch now uses .* threads: calibrate again"):
        tnmoe.measured(plan, replace(here(), source="calibrated by hand, 999 threads"))
    with pytest.raises(tnmoe.CostError, match="is a data sheet"):
        tnmoe.measured(plan, datasheet("h100"))
    with pytest.raises(tnmoe.CostError, match="has no dtype 'bfloat16'; it has float32"):
        tnmoe.measured(plan, here(), "bfloat16")
    with pytest.raises(tnmoe.CostError, match="rounds must be"):
        tnmoe.measured(plan, here(), rounds=0)


@pytest.mark.parametrize("gradients", [True, False])
def test_training_time_by_hand(gradients: bool) -> None:
    """x·W at 1 GFLOP/s: forward 2·32·16·8 FLOPs, backward as many for W, and for x if it needs a gradient."""
    plan = tnmoe.plan(tnmoe.Linear(16, 8, bias=False), tokens=32, input_gradients=gradients)
    found = predict_training(plan.bound, by_hand(), inputs=plan.input_gradients)
    assert found is not None
    product = 8192e-9 + OVERHEAD["matmul"]
    assert found.forward == tnmoe.predict(plan.bound, by_hand()).seconds
    assert found.backward == pytest.approx((1 + gradients) * product)
    assert found.graph == pytest.approx(2 * OVERHEAD["Add"])
    assert found.seconds == pytest.approx(found.forward + found.graph + found.backward)


def test_training_time_of_a_function_is_that_of_its_ops() -> None:
    """What is repeated counts: recomputing everything takes longer than keeping everything."""
    found = {}
    for memory in (None, "save", "recompute"):
        plan = tnmoe.plan(BLOCK, tokens=64, memory=memory)
        predicted = predict_training(plan.bound, datasheet("h100"), inputs=plan.input_gradients, adjoint=plan.adjoint)
        assert predicted is not None
        found[memory] = predicted.backward
        assert predicted.table().records()[-1]["nanoseconds"] == round(1e9 * predicted.seconds)
    assert found["recompute"] > found["save"] >= found[None] * 0.5


def test_command_line_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = tmp_path / "layer.toml"
    layer.write_text(
        '[layer]\nkind = "mumoe"\ninputs = 4\noutputs = 5\nexperts = 3\nfactorization = { kind = "cp", rank = 2 }\n'
    )
    profile = tmp_path / "here.json"
    profile.write_text(here().to_json())
    with pytest.raises(SystemExit) as stop:
        main(["cost", str(layer), "--tokens", "8", "--profile", str(profile), "--measure", "--format", "json"])
    assert stop.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["measured_nanoseconds"] > 0 for row in rows)
    with pytest.raises(SystemExit) as stop:
        main(["cost", str(layer), "--profile", str(profile), "--tokens", "8"])
    assert "one training pass" not in (text := capsys.readouterr().out)
    assert "backward of y" in text
    with pytest.raises(SystemExit) as stop:
        main(["cost", str(layer), "--measure"])
    assert stop.value.code == 2
    assert "--measure goes with --profile" in capsys.readouterr().err
    plan = tnmoe.plan(tnmoe.Linear(4, 5), tokens=3)
    assert "measured ns" in html_report([plan], profile=here())
    page = html_report([plan], profile=by_hand())
    assert "measured ns" not in page
    assert "backward of y" in page
