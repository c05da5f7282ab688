"""Device profiles that come with the package: figures against arithmetic on the chips, the roofline by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.device_by_hand import by_hand

import tnmoe
from tnmoe.cli.main import main
from tnmoe.ir.contractions import Contract, Merge, Multiply
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.value import Value
from tnmoe.timing.datasheet import Datasheet, Peak, datasheet_names
from tnmoe.timing.device import Device
from tnmoe.timing.predict import op_seconds, predict

DEVICES = ("a100", "b200", "cpu", "h100", "h200", "l40s", "mi300x")


def test_the_devices() -> None:
    assert datasheet_names() == DEVICES


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_source_and_sparse_is_twice_dense(name: str) -> None:
    sheet = tnmoe.datasheet(name)
    assert len(sheet.source) > 60
    assert sheet.overhead > 0
    for dtype, peak in sheet.peaks.items():
        if peak.sparse is not None:
            assert peak.sparse == pytest.approx(2 * peak.dense, rel=0.02), dtype
    assert list(sheet.peaks.values()) == sorted(sheet.peaks.values(), key=lambda p: p.dense)  # narrower is no slower


@pytest.mark.parametrize(
    ("name", "units", "flops_a_clock", "clock"),
    [
        # Multiprocessors or compute units × dense bfloat16 FLOPs of one in a clock × boost clock
        ("a100", 108, 2048, 1.41e9),
        ("h100", 132, 4096, 1.83e9),
        ("h200", 132, 4096, 1.83e9),
        ("b200", 148, 8192, 1.86e9),
        ("l40s", 142, 1024, 2.52e9),
        ("mi300x", 304, 2048, 2.1e9),
    ],
)
def test_peaks_are_what_the_chips_can_do(name: str, units: int, flops_a_clock: int, clock: float) -> None:
    sheet = tnmoe.datasheet(name)
    for dtype in ("bfloat16", "float16"):
        assert sheet.of(dtype).dense == pytest.approx(units * flops_a_clock * clock, rel=0.02)


@pytest.mark.parametrize(
    ("name", "units", "clock", "flops_a_clock"),
    [
        # FLOPs of a unit in a clock, by dtype: the fused multiply-adds of its lanes, or of its matrix cores
        ("b200", 148, 1.965e9, {"float64": 128, "float32": 256}),
        ("b200", 148, 1.86e9, {"tf32": 4096, "float8": 16384, "int8": 16384}),
        ("l40s", 142, 2.52e9, {"float32": 256, "tf32": 512, "float8": 2048, "int8": 2048}),
        ("mi300x", 304, 2.1e9, {"float64": 256, "float32": 256, "tf32": 1024, "float8": 4096, "int8": 4096}),
    ],
)
def test_other_peaks_by_arithmetic(name: str, units: int, clock: float, flops_a_clock: dict[str, int]) -> None:
    sheet = tnmoe.datasheet(name)
    for dtype, each in flops_a_clock.items():
        assert sheet.of(dtype).dense == pytest.approx(units * each * clock, rel=0.01), dtype
    assert sheet.vector == sheet.of("float32").dense


@pytest.mark.parametrize(
    ("name", "bandwidth", "gigabytes"),
    [
        ("a100", 2.039e12, 80),
        ("h100", 3.35e12, 80),
        ("h200", 4.8e12, 141),
        ("b200", 8e12, 180),
        ("l40s", 864e9, 48),
        ("mi300x", 5.3e12, 192),
    ],
)
def test_memory(name: str, bandwidth: float, gigabytes: int) -> None:
    assert (tnmoe.datasheet(name).bandwidth, tnmoe.datasheet(name).memory) == (bandwidth, gigabytes * 10**9)


SHEET = Datasheet("toy", "by hand", "cpu", {"float32": Peak(1e9)}, 1e8, 1e9, 10**9, 1e-6)
MERGE = Merge(Value("z", ("t", "a")), Value("x", ("t", "i", "o")), "a", ("i", "o"))
X, W, Y = Value("x", ("t", "i")), Value("w", ("i", "o")), Value("y", ("t", "o"))


@pytest.mark.parametrize(
    ("op", "sizes", "seconds"),
    [
        # compute-bound: 2·32·16·8 FLOPs at 1 GFLOP/s; 4·(512 + 128 + 256) bytes take less
        (Contract(Y, X, W), {"t": 32, "i": 16, "o": 8}, 8192e-9 + 1e-6),
        # memory-bound: one row, 4·(16 + 128 + 8) bytes at 1 GB/s against 256 FLOPs
        (Contract(Y, X, W), {"t": 1, "i": 16, "o": 8}, 608e-9 + 1e-6),
        # products of elements go at the vector rate: 512 at 0.1 GFLOP/s, or 3·2048 bytes
        (Multiply(Value("z", ("t", "i")), X, Value("v", ("t", "i"))), {"t": 32, "i": 16}, 6144e-9 + 1e-6),
        (Gelu(Value("z", ("t", "i")), X), {"t": 32, "i": 16}, 5 * 512e-8 + 1e-6),
        # a view
        (
            Merge(Value("z", ("t", "a")), Value("x", ("t", "i", "o")), "a", ("i", "o")),
            dict.fromkeys("tioa", 4),
            0.0,
        ),
    ],
)
def test_roofline_by_hand(op: Any, sizes: dict[str, int], seconds: float) -> None:
    assert op_seconds(op, sizes, SHEET, "float32") == pytest.approx(seconds, rel=1e-12)


def test_predictions_state_their_profile_and_add_up() -> None:
    plan = tnmoe.plan(tnmoe.MuMoEBlock(768, 3072, 768, 256, tnmoe.TensorRing((4, 4, 149))), tokens=4096)
    sheet = tnmoe.datasheet("h100")
    prediction = predict(plan.bound, sheet, "bfloat16")
    assert prediction.seconds == pytest.approx(sum(prediction.per_op))
    assert prediction.seconds >= tnmoe.cost(plan).matmul_flops / sheet.of("bfloat16").dense
    assert sheet.name in str(prediction.table())
    assert "NVIDIA H100 Tensor Core GPU datasheet" in str(prediction.table())
    slower = predict(plan.bound, tnmoe.datasheet("a100"), "bfloat16")
    assert slower.seconds > prediction.seconds


def test_a_missing_dtype_lists_those_there_are() -> None:
    plan = tnmoe.plan(tnmoe.Linear(64, 48), tokens=4)
    with pytest.raises(tnmoe.CostError, match=r"A100 SXM4 80 GB' has no dtype 'float8'; it has float64, float32, tf32"):
        predict(plan.bound, tnmoe.datasheet("a100"), "float8")
    with pytest.raises(tnmoe.CostError, match=r"unknown device 'h1000'; did you mean 'h100'"):
        tnmoe.datasheet("h1000")


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        return done.value.code, *capsys.readouterr()  # type: ignore[return-value]

    code, out, _ = run("cost", "gpt2-cp", "--profile", "h100", "--dtype", "bfloat16")
    assert code == 0
    assert "Profile: NVIDIA H100 SXM5 80 GB" in out
    code, out, _ = run("cost", "gpt2-sparse", "--profile", "mi300x", "--format", "json")
    assert code == 0
    assert json.loads(out)[-1]["share"] == "100.0%"
    code, _, err = run("cost", "gpt2-cp", "--profile", "h1000")
    assert code == 2
    assert "a100, b200, cpu, h100, h200, l40s, mi300x" in err
    code, _, err = run("cost", "gpt2-cp", "--profile", "l40s", "--dtype", "float64")
    assert code == 2
    assert "it has float32, tf32, bfloat16" in err


GOOD = json.loads((Path(tnmoe.__file__).parent / "profiles" / "h100.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, '"format": "tnmoe-datasheet-1"'),
        ({"colour": "red"}, "a data sheet: unknown key 'colour'"),
        ({"source": " "}, "source of a data sheet must be text"),
        ({"peaks": {}}, "peaks of a data sheet"),
        ({"peaks": {"float31": {"dense": 1.0}}}, "peaks of a data sheet"),
        ({"peaks": {"float32": {"sparse": 1.0}}}, "peaks.float32 of a data sheet lacks 'dense'"),
        ({"peaks": {"float32": {"dense": -1.0}}}, "peaks.float32.dense of a data sheet must be a positive number"),
        ({"bandwidth": True}, "bandwidth of a data sheet must be a positive number"),
    ],
)
def test_faulty_sheets(change: dict[str, Any], message: str) -> None:
    with pytest.raises(tnmoe.DeclarationError, match=message):
        Datasheet.from_json(json.dumps(GOOD | change))
    lacking = {k: v for k, v in GOOD.items() if k != "memory"}
    with pytest.raises(tnmoe.DeclarationError, match="a data sheet lacks 'memory'"):
        Datasheet.from_json(json.dumps(lacking))
    with pytest.raises(tnmoe.DeclarationError, match="must be JSON"):
        Datasheet.from_json("{")


def test_both_makers_of_devices_serve_alike() -> None:
    """A data sheet is a device as a calibration is: for predictions, and to plan by."""
    sheet = tnmoe.datasheet("h100")
    for device in (sheet, by_hand()):
        assert isinstance(device, Device)
        assert set(device.dtypes) >= {"float32"}
        assert device.dtypes[0] == "float32"
    layer = tnmoe.MuMoE(64, 48, 8, tnmoe.TensorRing((4, 4, 8)))
    plan = tnmoe.plan(layer, tokens=64, objective="time", profile=sheet)
    assert plan.shortlist is not None
    assert sheet.name in plan.shortlist.source
    seconds = predict(plan.executed, sheet, "float32").seconds
    assert all(seconds <= predict(other.executed, sheet).seconds for other in (tnmoe.plan(layer, tokens=64),))


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(tnmoe.TnmoeError, match="profile 3 cannot be read"):
        tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3)), tokens=8, objective="time", profile=3)  # type: ignore[arg-type]
