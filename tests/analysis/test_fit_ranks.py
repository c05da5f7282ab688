"""Ranks from a budget: against brute force, the paper's ranks, and faults."""

import itertools
import json

import numpy as np
import pytest

import tnmoe
from tnmoe.cli.main import main
from tnmoe.presets.registry import PRESETS

FREE = tnmoe.Gate("softmax", "none")

# Open declarations, and their parameters by hand (I = 12, O = 10, N = 6, without gate and bias).
OPEN = {
    "cp": (tnmoe.CP("R"), lambda R: R * 28),
    "ring": (tnmoe.TensorRing(("a", "a", "R")), lambda R, a: a * 6 * a + a * 12 * R + R * 10 * a),
    "train": (tnmoe.TensorTrain(("a", "b")), lambda a, b: 6 * a + a * 12 * b + b * 10),
    "tucker": (tnmoe.Tucker(("a", "b", "c")), lambda a, b, c: 6 * a + 12 * b + 10 * c + a * b * c),
    "monarch": (tnmoe.Monarch((3, 5), "R"), lambda R: 6 * R * 15 * (4 + 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("name", OPEN)
def test_nothing_comes_closer(name, nearest):
    """Every point of a box that holds all that could fit, one by one."""
    factorization, formula = OPEN[name]
    spec = tnmoe.MuMoE(12, 10, 6, factorization, FREE, bias=False)
    symbols = sorted(spec.layer().free_symbols - {"T"})
    gate = 12 * 6
    for target in (333, 600, 1001, 1500):
        floors = dict.fromkeys(symbols, 1)
        if gate + formula(**floors) > target and not nearest:
            with pytest.raises(tnmoe.CostError, match="are the least there are"):
                tnmoe.fit_ranks(spec, parameters=target, at_least=floors)
            continue
        fitted = tnmoe.fit_ranks(
            spec, parameters=target, at_least=floors, at_most=dict.fromkeys(symbols, 60), nearest=nearest
        )
        box = itertools.product(range(1, 61), repeat=len(symbols))
        costs = np.array([formula(**dict(zip(symbols, point))) + gate for point in box])
        distance = np.abs(costs - target)[(costs <= target) | nearest].min()
        assert abs(fitted.reached - target) == distance
        assert fitted.reached == formula(**fitted.values) + gate
        assert tnmoe.cost(fitted.spec).parameters == fitted.reached
        assert fitted.error == (fitted.reached - target) / target


def test_floors_and_ceilings_hold():
    spec = tnmoe.MuMoE(12, 10, 6, tnmoe.Tucker(("a", "b", "c")), FREE, bias=False)
    free = tnmoe.fit_ranks(spec, parameters=900)
    assert free.values["a"] >= 2, "by default the expert mode does not collapse"
    assert free.values["a"] <= 6
    assert free.values["b"] <= 12
    assert free.values["c"] <= 10, "a rank above its mode adds parameters and nothing else"
    held = tnmoe.fit_ranks(spec, parameters=900, at_least={"a": 5}, at_most={"b": 7})
    assert held.values["a"] >= 5
    assert held.values["b"] <= 7


@pytest.mark.parametrize("objective", ["flops", "bytes"])
def test_other_budgets(objective):
    """One more rank exceeds the limit; the figure is the report's."""
    spec = tnmoe.MuMoE(64, 48, 8, tnmoe.CP("R"), bias=True)
    target = {"flops": 400_000, "bytes": 50_000}[objective]
    fitted = tnmoe.fit_ranks(spec, **{objective: target}, tokens=32)

    def figure(rank):
        report = tnmoe.cost(tnmoe.plan(tnmoe.MuMoE(64, 48, 8, tnmoe.CP(rank)), tokens=32))
        return report.flops if objective == "flops" else report.weight_bytes

    assert figure(fitted.values["R"]) == fitted.reached <= target < figure(fitted.values["R"] + 1)


# The row that has the budget, and the published rank (arXiv 2402.12550)
PAPER = {
    "clip-128-cp": ("clip-linear", 354),
    "clip-128-tr": ("clip-linear", 95),
    "clip-512-cp": ("clip-linear", 165),
    "clip-512-tr": ("clip-linear", 52),
}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("nearest", [False, True])
def test_clip_heads_get_the_papers_ranks(name, nearest):
    spec = PRESETS[name].spec
    opened = tnmoe.CP("R") if name.endswith("cp") else tnmoe.TensorRing((4, 4, "R"))
    fitted = tnmoe.fit_ranks(
        tnmoe.MuMoE(768, 1000, spec.experts, opened, spec.gate), parameters=769_000, nearest=nearest
    )
    assert abs(fitted.values["R"] - PAPER[name][1]) <= 1
    assert nearest or fitted.reached <= 769_000


def test_command_line(capsys, tmp_path):
    """Presets beside the published ranks; a file with symbols; what is printed is what the call returns."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "gpt2", "mixer", "clip", "--format", "json"])
    assert stop.value.code == 0
    rows = {row["layer"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 10
    assert all(row["reached"] <= row["target"] for row in rows.values())
    # Gate 196·64 and R(64 + 197 + 256 + 64 + 257 + 196) for the token block: (100,804 - 12,544) / 1,034 = 85.4
    assert [row["rank"] for row in rows.values()][:4] == [552, 147, 85, 23]
    assert [row["published"] for row in rows.values()][:4] == [556, 149, 147, 37]
    file = tmp_path / "layer.toml"
    file.write_text(
        '[layer]\nkind = "mumoe"\ninputs = 12\noutputs = 10\nexperts = 6\nfactorization = { kind = "tucker", '
        'ranks = ["a", "b", "c"] }\ngate = { activation = "softmax", norm = "none" }\nbias = false\n'
    )
    with pytest.raises(SystemExit) as stop:
        main(["fit", str(file), "--parameters", "900", "--at-least", "a=5", "--at-most", "b=7"])
    assert stop.value.code == 0
    spec = tnmoe.MuMoE(12, 10, 6, tnmoe.Tucker(("a", "b", "c")), FREE, bias=False)
    expected = tnmoe.fit_ranks(spec, parameters=900, at_least={"a": 5}, at_most={"b": 7})
    assert str(expected) in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["fit", str(file)])
    assert stop.value.code == 2
    assert "pass one budget" in capsys.readouterr().err


FAULTS = {
    "no budget": (lambda s: tnmoe.fit_ranks(s), "pass one budget"),
    "two budgets": (lambda s: tnmoe.fit_ranks(s, parameters=9, flops=9), "pass one budget"),
    "nothing open": (lambda s: tnmoe.fit_ranks(tnmoe.Linear(3, 4), parameters=9), "has no open rank"),
    "too small": (lambda s: tnmoe.fit_ranks(s, parameters=9), "130 parameters are the least there are (with R = 2)"),
    "unknown floor": (lambda s: tnmoe.fit_ranks(s, parameters=900, at_least={"r": 2}), "unknown symbol 'r'"),
    "no integer": (lambda s: tnmoe.fit_ranks(s, parameters=1.5), "parameters must be a positive integer"),
    "no floor": (lambda s: tnmoe.fit_ranks(s, parameters=900, at_least={"R": 0}), "at_least['R'] must be"),
}


@pytest.mark.parametrize(("call", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(call, words):
    spec = tnmoe.MuMoE(12, 10, 6, tnmoe.CP("R"), FREE)
    with pytest.raises(tnmoe.TnmoeError) as caught:
        call(spec)
    assert words in str(caught.value)
