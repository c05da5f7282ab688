"""Choice by measurement: who is timed, when, who wins, and what the cache makes of it. No test looks at real times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import tnmoe
from tnmoe import cli
from tnmoe.tune import Tuned

NETWORK = tnmoe.Network.parse("bn,nx,bi,iy,oz,xyt,tz->bo", weights="nx iy oz xyt tz")
SIZES = {"b": 3, "n": 4, "x": 3, "i": 5, "y": 4, "o": 6, "z": 2, "t": 3}
MODULE = sys.modules["tnmoe.tune"]  # the package's attribute of that name is the call


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path))
    return tmp_path


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]]) -> list[int]:
    """Let the measurement return `seconds`; the list that comes back grows by one at each measurement."""
    calls: list[int] = []

    def measure(runs: list[object], rounds: int) -> list[list[float]]:
        calls.append(len(runs))
        return [[s for s, _ in zip(row * rounds, range(rounds), strict=False)] for row in seconds]

    monkeypatch.setattr(MODULE, "_measure", measure)
    return calls


def test_the_cheapest_orders_are_measured_and_the_winner_is_a_plan() -> None:
    """Real measurements of a few orders: each candidate is another order of the same network, the cheapest first."""
    tuned = tnmoe.tune(NETWORK, sizes=SIZES, rounds=3, count=5)
    assert len({m.plan.orders["result"] for m in tuned.measured}) == 5
    flops = [m.plan.flops for m in tuned.measured]
    assert flops == sorted(flops)
    assert flops[0] == tnmoe.plan(NETWORK, sizes=SIZES).flops
    assert all(len(m.seconds) == 3 and min(m.seconds) > 0 for m in tuned.measured)
    module = tnmoe.build(tuned.plan, dtype=torch.float64)
    data = {t.name: torch.randn([SIZES[i] for i in t.indices], dtype=torch.float64) for t in NETWORK.tensors}
    with torch.no_grad():
        for p in tuned.plan.program.parameters:
            order = [NETWORK.tensor(p.name).indices.index(i) for i in p.indices]
            getattr(module, p.name).copy_(data[p.name].permute(order))
    want = torch.einsum("bn,nx,bi,iy,oz,xyt,tz->bo", *data.values())
    torch.testing.assert_close(module(data["bn"], data["bi"]), want)


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate once in each round, not always in the same order."""
    seen: list[int] = []
    monkeypatch.setattr(MODULE, "_seconds", lambda run, repeats: run() or 1.0)
    runs = [lambda k=k: seen.append(k) for k in range(4)]
    found = MODULE._measure(runs, 10)
    assert [len(row) for row in found] == [10] * 4
    rounds = [tuple(seen[k : k + 4]) for k in range(len(seen) - 40, len(seen), 4)]
    assert all(sorted(r) == [0, 1, 2, 3] for r in rounds)
    assert len(set(rounds)) > 3


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ([[2.0] * 4, [1.0] * 4, [3.0] * 4], 1),  # always faster
        ([[2.0] * 4, [1.0, 1.0, 3.0, 3.0], [2.0] * 4], 0),  # in half of the rounds: noise
        ([[2.0] * 4, [1.0, 1.0, 1.0, 9.0], [2.0] * 4], 1),  # three of four
        ([[3.0] * 4, [2.0] * 4, [1.0] * 4], 2),
        ([[1.0] * 4, [1.0] * 4, [1.0] * 4], 0),  # a tie is the cheapest's
    ],
)
def test_who_wins(monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]], winner: int) -> None:
    pretend(monkeypatch, seconds)
    tuned = tnmoe.tune(NETWORK, sizes=SIZES, rounds=4, count=3)
    assert tuned.chosen == winner
    assert tuned.plan is tuned.measured[winner].plan
    rows = json.loads(tuned.table().render("json"))
    assert [r["chosen"] for r in rows] == ["chosen" if k == winner else "" for k in range(3)]
    assert [r["flops"] for r in rows] == [m.plan.flops for m in tuned.measured]


def test_the_table_shows_medians_and_spread() -> None:
    plan = tnmoe.plan(NETWORK, sizes=SIZES)
    measured = (
        MODULE.Measured(plan, tuple(1e-6 * s for s in (4.0, 8.0, 5.0, 6.0, 7.0))),
        MODULE.Measured(plan, tuple(1e-6 * s for s in (2.0, 4.0, 2.0, 3.0, 3.0))),
    )
    rows = json.loads(Tuned(measured, 1, "here").table().render("json"))
    assert [(r["median"], r["first_quartile"], r["third_quartile"]) for r in rows] == [(6.0, 5.0, 7.0), (3.0, 2.0, 3.0)]
    assert [r["speed"] for r in rows] == [1.0, 2.0]  # of the paired ratios 2, 2, 2.5, 2, 2⅓


def test_what_was_measured_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question is answered from the cache; other sizes, settings and versions are other questions."""
    calls = pretend(monkeypatch, [[2.0], [1.0]])

    def run(**change: object) -> Tuned:
        return tnmoe.tune(NETWORK, sizes=SIZES, count=2, **{"rounds": 2, **change})

    first, again = run(), run()
    assert (first.cached, again.cached, len(calls)) == (False, True, 1)
    assert (again.chosen, again.measured) == (first.chosen, first.measured)
    assert "earlier run" in str(again)
    for change in ({"training": True}, {"dtype": "float64"}, {"rounds": 3}, {"fresh": True}):
        assert not run(**change).cached, change
    assert not tnmoe.tune(NETWORK, sizes={**SIZES, "b": 4}, count=2, rounds=2).cached
    for where, name, value in ((torch, "__version__", "9.9"), (torch, "get_num_threads", lambda: 77)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert not run().cached, name
    assert run().cached


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"null", b"\xff\xff", json.dumps({"seconds": [[1.0], [2.0]]}).encode()], ids=repr
)
def test_a_damaged_entry_is_measured_again(home: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    calls = pretend(monkeypatch, [[2.0], [1.0]])
    tnmoe.tune(NETWORK, sizes=SIZES, count=2, rounds=2)
    (entry,) = (p for p in home.rglob("tuned-*") if p.is_file())
    entry.write_bytes(damage)
    assert not tnmoe.tune(NETWORK, sizes=SIZES, count=2, rounds=2).cached
    assert tnmoe.tune(NETWORK, sizes=SIZES, count=2, rounds=2).cached
    assert len(calls) == 2


@pytest.mark.parametrize("kept", [None, [[1.0, 1.0]], [[1.0], [2.0]], [[1, "2"], [1.0, 2.0]], [[0.0, 1.0]] * 2])
def test_an_entry_of_another_form_is_a_miss(kept: object) -> None:
    assert MODULE._read({"seconds": kept}, 2, 2) is None
    assert MODULE._read({"seconds": [[1.0, 2.0], [3.0, 4.0]]}, 2, 2) == [[1.0, 2.0], [3.0, 4.0]]


def test_a_plan_takes_part_with_its_own_order_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = tnmoe.shortlist(NETWORK, sizes=SIZES, count=200)[-1].plan
    calls = pretend(monkeypatch, [[2.0], [1.0], [1.5]])
    tuned = tnmoe.tune(worst, count=2, rounds=1)
    assert calls == [3]
    assert tuned.measured[-1].plan is worst
    layer = tnmoe.MuMoE("d", "2*d", 4, tnmoe.CP("R"), tnmoe.Gate("softmax", "layer"))
    planned = tnmoe.plan(layer, tokens=6, sizes={"d": 8, "R": 3})
    pretend(monkeypatch, [[1.0]])
    assert tnmoe.tune(planned, count=1, rounds=1).plan.values == planned.values
    assert tnmoe.tune(planned, count=1, rounds=1, tokens=2).plan.values == {**planned.values, "T": 2}


def test_training_is_measured_where_gradients_are_needed() -> None:
    """Frozen inputs get none, and a layer without trained weights runs forward alone."""
    spec = tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), tnmoe.Gate("entmax15", "batch"))
    for gradients in (True, False):
        planned = tnmoe.plan(spec, tokens=7, input_gradients=gradients)
        assert tnmoe.tune(planned, training=True, count=1, rounds=1).plan.orders == planned.orders
    frozen = tnmoe.Network.parse("bn,nr->br", frozen="nr")
    tnmoe.tune(tnmoe.plan(frozen, sizes={"b": 2, "n": 3, "r": 4}, input_gradients=False), training=True, rounds=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "tpu"}, "cpu, cuda"),
        ({"dtype": "int8"}, "float32"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 2.0}, "rounds"),
        ({"count": 0}, "count"),
        ({"count": True}, "count"),
    ],
)
def test_bad_input(change: dict[str, object], words: str) -> None:
    with pytest.raises(tnmoe.PlanError, match=words):
        tnmoe.tune(NETWORK, sizes=SIZES, **change)


def test_a_sparse_mixture_is_measured_too() -> None:
    tuned = tnmoe.tune(tnmoe.SparseMoE(4, 3, 5, 2), tokens=2, rounds=1)
    assert tuned.plan.values["T"] == 2


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layer.toml"
    file.write_text(
        '[layer]\nkind = "mumoe"\ninputs = 6\noutputs = 5\nexperts = 4\nfactorization = { kind = "cp", rank = 3 }\n'
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["tune", str(file), "--tokens", "2", "--rounds", "1", "--count", "2", "-o", str(tmp_path / "plan.json")]
        )
    assert stop.value.code == 0
    assert "chosen" in capsys.readouterr().out
    assert tnmoe.Plan.from_json((tmp_path / "plan.json").read_text()).values["T"] == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "gpt2"])
    assert stop.value.code == 2
    assert "one layer" in capsys.readouterr().err
