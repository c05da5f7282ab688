"""Measured beside predicted times, and predicted times of training. The clock is made up: nothing waits for it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.device_by_hand import BACKWARD_OVERHEAD, FAST_OVERHEAD, GRAPH_OVERHEAD, OVERHEAD, by_hand, flat

import tnmoe
from tnmoe.backends.torch.steps import step_sources
from tnmoe.charts.html_report import html_report
from tnmoe.cli.main import main
from tnmoe.emission.build import loaded
from tnmoe.emission.emit import emit
from tnmoe.ir.ops import operands, results
from tnmoe.ir.pointwise_ops import BatchNorm, Gelu, Softmax
from tnmoe.measuring.calibrate import processor
from tnmoe.timing.datasheet import datasheet
from tnmoe.timing.device_profile import DeviceProfile
from tnmoe.timing.predict_training import predict_training

BLOCK = tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.TensorRing((2, 2, 3)), tnmoe.Gate("entmax15", "batch"), input_norm=True)


def here() -> DeviceProfile:
    """A profile that says it is of this machine."""
    return replace(by_hand(), name=processor(), source=f"calibrated by hand, {torch.get_num_threads()} threads")


def cached() -> DeviceProfile:
    """A machine whose memory is as fast as its caches, so that nothing waits to be fetched."""
    rates = by_hand().of("float32")
    return replace(by_hand(), rates={"float32": replace(rates, memory=flat(1, 1e12))})


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
def test_steps_one_after_the_other_are_the_module(spec: tnmoe.Spec) -> None:
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
    prediction = tnmoe.predict(plan.bound, here(), adjoint=plan.adjoint)
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
    found = predict_training(plan.bound, cached(), inputs=plan.input_gradients)
    assert found is not None
    product = 8192e-9 + OVERHEAD["matmul"]
    assert found.forward == tnmoe.predict(plan.bound, cached()).seconds
    assert found.backward == pytest.approx((1 + gradients) * product)
    graph = GRAPH_OVERHEAD["pass"] + GRAPH_OVERHEAD["node"] + (1 + gradients) * GRAPH_OVERHEAD["leaf"]
    assert found.graph == pytest.approx(graph)
    assert found.seconds == pytest.approx(found.forward + found.graph + found.backward)


def test_gradients_with_kernels_of_their_own_take_their_rates() -> None:
    """GELU reads two values an entry and writes one, at 1 GB/s; a softmax's rows run at 0.05 G elements/s."""
    plan = tnmoe.plan(tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.CP(3), tnmoe.Gate("softmax", "batch")), tokens=32)
    found = predict_training(plan.bound, cached(), inputs=plan.input_gradients)
    assert found is not None
    seconds = {type(op): found_ for op in plan.bound.ops for name, found_ in found.gradients if name == op.out.name}
    assert seconds[Gelu] == pytest.approx(3 * 4 * 32 * 9 / 1e9 + BACKWARD_OVERHEAD["Gelu"])
    assert seconds[Softmax] == pytest.approx(32 * 4 / 5e7 + BACKWARD_OVERHEAD["Softmax"])
    assert seconds[BatchNorm] == pytest.approx(32 * 4 / 5e7 + BACKWARD_OVERHEAD["BatchNorm"])
    # in training a batch norm takes its statistics first
    more = 32 * 4 / 5e7 + BACKWARD_OVERHEAD["BatchNormTraining"] - 32 * 4 / 1e8 - OVERHEAD["BatchNorm"]
    more *= sum(isinstance(op, BatchNorm) for op in plan.bound.ops)
    assert found.forward == pytest.approx(tnmoe.predict(plan.bound, cached()).seconds + more)


def test_views_are_nodes_and_functions_are_counted() -> None:
    """A tensor ring's views are recorded, too; a function of its own takes the nodes' place."""
    profile, spec = cached(), tnmoe.MuMoE(16, 8, 4, tnmoe.TensorRing((2, 2, 3)), tnmoe.Gate("softmax", "layer"))
    plan = tnmoe.plan(spec, tokens=32, input_gradients=False)
    found = predict_training(plan.bound, profile)
    assert found is not None
    module, x = tnmoe.build(plan), torch.randn(32, 16)
    nodes: set[object] = set()
    waiting = [module(x).grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes and "AccumulateGrad" not in node.name():
            nodes.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    leaves = len(list(module.parameters()))
    counted = (found.graph - GRAPH_OVERHEAD["pass"] - leaves * GRAPH_OVERHEAD["leaf"]) / GRAPH_OVERHEAD["node"]
    assert counted == pytest.approx(len(nodes) - 1)  # the last one gives the result the rows of the input
    own = tnmoe.plan(spec, tokens=32, input_gradients=False, memory="save")
    function = predict_training(own.bound, profile, adjoint=own.adjoint)
    assert function is not None
    assert function.forward - found.forward == pytest.approx(GRAPH_OVERHEAD["apply"])
    assert function.graph < found.graph + GRAPH_OVERHEAD["function"]


def test_a_fast_function_trains_at_its_rates() -> None:
    """x·W is 8192 FLOPs·2 forward and as many for W and for x: all three at 4 GFLOP/s."""
    plan = tnmoe.plan(tnmoe.Linear(16, 8, bias=False), tokens=32, memory="save", flavour="fast")
    kwargs = {"inputs": plan.input_gradients, "adjoint": plan.adjoint}
    found = predict_training(plan.bound, cached(), flavour="fast", **kwargs)
    assert found is not None
    assert found.backward == pytest.approx(2 * (8192e-9 / 4 + FAST_OVERHEAD))
    public = predict_training(plan.bound, cached(), **kwargs)
    assert public is not None
    assert public.backward == pytest.approx(2 * (8192e-9 + OVERHEAD["matmul"]))


def test_profiles_of_before_training_say_so() -> None:
    old = replace(by_hand(), rates={"float32": replace(by_hand().of("float32"), training=None)})
    plan = tnmoe.plan(tnmoe.Linear(4, 5), tokens=3)
    with pytest.raises(tnmoe.CostError, match="before training was measured: run `tnmoe calibrate` again"):
        predict_training(plan.bound, old)


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
