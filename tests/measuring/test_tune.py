"""Choice by measurement: who is timed, when, who wins, and what the cache makes of it. No test looks at real times."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tnmoe
from tnmoe.cli.main import main
from tnmoe.io import cache
from tnmoe.ir.ops import operands
from tnmoe.measuring import harness, race, timer
from tnmoe.measuring import tune as tune_module
from tnmoe.measuring.race import Race, Runner
from tnmoe.measuring.timer import Timer
from tnmoe.measuring.tuned import Measured, Tuned, winner
from tnmoe.measuring.variants import PLANNED, Variant, choices

NETWORK = tnmoe.Network.parse("bn,nx,bi,iy,oz,xyt,tz->bo", weights="nx iy oz xyt tz")
SIZES = {"b": 3, "n": 4, "x": 3, "i": 5, "y": 4, "o": 6, "z": 2, "t": 3}
BLOCK = tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.CP(3), tnmoe.Gate("entmax15", "layer"))

Price = Callable[[tnmoe.Plan], float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Real passes are tiny, and threads that wait for each other on a shared machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path))
    return tmp_path


def pretend(monkeypatch: pytest.MonkeyPatch, price: Price) -> list[tnmoe.Plan]:
    """Let every pass of a plan's module take `price` seconds; the list that comes back has the plan of each pass."""
    passes: list[tnmoe.Plan] = []

    def seconds(runner: Runner) -> float:
        passes.append(runner.run)
        return price(runner.run)

    monkeypatch.setattr(race, "seconds", seconds)
    monkeypatch.setattr(harness.Bench, "runner", lambda self, plan: Runner(plan))
    return passes


def emitted(plan: tnmoe.Plan) -> tuple[str, int | None, bool]:
    """Flavour, chunk, and whether the backward pass is autograd's."""
    f = plan.function
    return ("portable", None, True) if f is None else (f.flavour, f.chunk, False)


# ---- what is measured ------------------------------------------------------------------------------------------


def test_the_cheapest_orders_are_measured_and_the_winner_is_a_plan() -> None:
    """Real measurements of a few orders: each is another order of the same network, the cheapest first."""
    tuned = tnmoe.tune(NETWORK, sizes=SIZES, rounds=3, count=5)
    first = {m.order: m for m in reversed(tuned.measured)}
    assert len({m.plan.orders["result"] for m in first.values()}) == 5
    flops = [first[k].plan.flops for k in range(5)]
    assert flops == sorted(flops)
    assert flops[0] == tnmoe.plan(NETWORK, sizes=SIZES).flops
    assert all(min(m.seconds) > 0 and {*m.rounds} <= {*tuned.measured[0].rounds} for m in tuned.measured)
    module = tnmoe.build(tuned.plan, dtype=torch.float64)
    data = {t.name: torch.randn([SIZES[i] for i in t.indices], dtype=torch.float64) for t in NETWORK.tensors}
    with torch.no_grad():
        for p in tuned.plan.program.parameters:
            order = [NETWORK.tensor(p.name).indices.index(i) for i in p.indices]
            getattr(module, p.name).copy_(data[p.name].permute(order))
    want = torch.einsum("bn,nx,bi,iy,oz,xyt,tz->bo", *data.values())
    torch.testing.assert_close(module(data["bn"], data["bi"]), want)


def moved(plan: tnmoe.Plan) -> int:
    """Elements that the steps of a forward pass read and write."""
    values = [v for op in plan.bound.ops for v in (*operands(op), op.out)]
    return sum(math.prod(int(plan.bound.sizes[i]) for i in v.indices) for v in values)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_orders_that_move_little_are_measured_too(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Of a Tucker layer over tiny modes the fewest FLOPs multiply mode by mode, and move the tokens each time."""
    network = tnmoe.Network.parse("befg,hijklm,ah,ci,dj,ek,fl,gm->bacd", weights="hijklm ah ci dj ek fl gm")
    sizes = dict(zip("abcdefghijklm", (4, 512, 12, 16, 4, 12, 16, 3, 8, 11, 3, 8, 11), strict=True))
    monkeypatch.setattr(tune_module, "Bench", lambda *_: types.SimpleNamespace(runner=Runner))
    pretend(monkeypatch, moved)
    tuned = tnmoe.tune(network, sizes=sizes, training=training, rounds=1, layouts=["auto"], flavours=["portable"])
    first = tuned.measured[0].plan
    assert first.orders == tnmoe.plan(network, sizes=sizes, objective="training" if training else "flops").orders
    assert tuned.plan.flops > first.flops
    assert 3 * moved(tuned.plan) < 2 * moved(first)
    assert "(ek · fl)" in tuned.plan.orders["result"]
    assert len({m.order for m in tuned.measured}) == 4


@pytest.mark.slow
def test_orders_first_then_variants_then_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of 2 × 2 × 2 × 2 × 3 candidates is found among far fewer; hopeless ones run once."""
    second = tnmoe.shortlist(BLOCK, count=2, tokens=600, objective="training")[1].plan.orders

    def price(plan: tnmoe.Plan) -> float:
        flavour, chunk, autograd = emitted(plan)
        found = 0.5 if plan.orders == second else 1.0
        found *= 0.8 if plan.turned == plan.turnable else 1.0
        found *= 1.0 if autograd else 0.9
        return found * (0.7 if flavour == "fast" else 1) * {None: 1.0, 256: 0.9, 512: 0.8}[chunk]

    passes = pretend(monkeypatch, price)
    tuned = tnmoe.tune(BLOCK, tokens=600, training=True, count=2, rounds=7)
    best = tuned.measured[tuned.chosen]
    assert best.plan.orders == second
    assert (best.variant.layout, best.variant.flavour, best.variant.chunk) == ("columns", "fast", 512)
    assert len(tuned.measured) <= 2 * 2 * 2 * 2 * 3 / 2
    assert price(tuned.plan) == min(price(m.plan) for m in tuned.measured)
    runs = Counter(map(id, passes))
    assert runs[id(tuned.measured[0].plan)] == len(tuned.measured[0].rounds) == max(runs.values())
    assert min(runs.values()) == 1  # the first and slowest of all, twice as slow as the leader, has to stay
    assert [len(m.seconds) for m in tuned.measured] == [runs[id(m.plan)] for m in tuned.measured]


@pytest.mark.slow
def test_every_candidate_emits_something_else() -> None:
    """And what was measured is what a plan emits: for it, for its JSON, for the winner."""
    tuned = tnmoe.tune(BLOCK, tokens=300, training=True, count=2, rounds=1)
    sources = [tnmoe.emit(m.plan) for m in tuned.measured]
    assert len({*sources}) == len(sources) > 6
    assert [tnmoe.emit(tnmoe.Plan.from_json(m.plan.to_json())) for m in tuned.measured] == sources
    assert {m.variant.layout for m in tuned.measured} == {"auto", "columns"}  # small weights: by rows already
    assert {emitted(m.plan) for m in tuned.measured} >= {
        ("portable", None, True),
        ("portable", None, False),
        ("fast", None, False),
    }
    assert any(m.plan.function is not None and m.plan.function.chunk == 256 for m in tuned.measured)


@pytest.mark.slow
def test_the_same_weights_and_results_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate with other results, or other gradients, is an error and not a winner."""
    build = harness.build

    class Wrong(torch.nn.Module):
        def __init__(self, module: torch.nn.Module, forward: bool) -> None:
            super().__init__()
            self.inner, self.forward_too = module, forward

        def load_state_dict(self, state, assign):
            return self.inner.load_state_dict(state, assign=assign)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            y = y * 1.01 if self.forward_too else y
            if y.requires_grad and not self.forward_too:
                y.register_hook(lambda g: g * 1.01)
            return y

    def rows_are_wrong(plan: tnmoe.Plan, *, device: str, forward: bool) -> torch.nn.Module:
        module = build(plan, device=device)
        return Wrong(module, forward) if plan.turned == () else module

    for training, forward in ((False, True), (True, True), (True, False)):
        with monkeypatch.context() as patch:
            patch.setattr(harness, "build", lambda p, device, f=forward: rows_are_wrong(p, device=device, forward=f))
            patch.setenv("TNMOE_CACHE", "off")
            with pytest.raises(tnmoe.EmitError, match="differs from the first one"):
                tnmoe.tune(BLOCK, tokens=5, training=training, rounds=1, layouts=["columns", "rows"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.MuMoEBlock(16, 24, 12, 8, tnmoe.TensorRing((2, 3, 4)), tnmoe.Gate("sparsemax", "batch"), input_norm=True),
        tnmoe.MuMoE(16, 12, (4, 3), tnmoe.CP(5), tnmoe.Gate("softmax", "layer")),
        tnmoe.SparseMoE(16, 12, 4, 2, hidden=24, noise=True),
        tnmoe.FactorizedLinear(16, 12, tnmoe.TensorTrain((3,))),
    ],
    ids=["ring", "cp", "sparse", "train"],
)
def test_candidates_agree_in_every_dtype(spec: object, dtype: str, training: bool) -> None:
    """None of them is taken for a fault; flavours that change nothing in a dtype are not tried."""
    tuned = tnmoe.tune(spec, tokens=300, training=training, dtype=dtype, rounds=1, count=2)
    assert ("fast" in {m.variant.flavour for m in tuned.measured}) <= (dtype == "float32")


def test_what_is_named_is_all_that_is_measured() -> None:
    def run(**change: object) -> Tuned:
        return tnmoe.tune(BLOCK, tokens=600, rounds=1, count=1, **change)

    only = run(flavours=["portable"], chunks=[None], memory=[None], layouts=["columns"], training=True)
    assert [m.variant for m in only.measured] == [Variant("columns")]
    assert only.plan.function is None
    assert only.plan.turned == only.plan.turnable
    fast = run(flavours=("fast",), chunks=(64,), memory=("save", "recompute"), layouts=[["up_input_factor"]])
    assert {m.variant.memory for m in fast.measured} == {"save", "recompute"}
    assert {(m.plan.turned, *emitted(m.plan)) for m in fast.measured} == {(("up_input_factor",), "fast", 64, False)}
    narrow = run(layouts=["rows"])
    assert {m.variant.flavour for m in narrow.measured} == {"portable", "fast"}


def test_a_plan_takes_part_with_its_own_order_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = tnmoe.shortlist(NETWORK, sizes=SIZES, count=200)[-1].plan
    pretend(monkeypatch, lambda plan: 1.0 if plan.orders == worst.orders else 2.0)
    tuned = tnmoe.tune(worst, count=2, rounds=1)
    assert tuned.plan.orders == worst.orders
    assert {m.order for m in tuned.measured} == {0, 1, 2}
    layer = tnmoe.MuMoE("d", "2*d", 4, tnmoe.CP("R"), tnmoe.Gate("softmax", "layer"))
    planned = tnmoe.plan(layer, tokens=6, sizes={"d": 8, "R": 3})
    pretend(monkeypatch, lambda plan: 1.0)
    assert tnmoe.tune(planned, count=1, rounds=1).plan.values == planned.values
    assert tnmoe.tune(planned, count=1, rounds=1, tokens=2).plan.values == {**planned.values, "T": 2}


@pytest.mark.slow
def test_a_plan_s_own_setting_comes_first_and_its_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps for its backward pass stays; no other order keeps more."""
    pretend(monkeypatch, lambda plan: 1.0)
    given = tnmoe.plan(
        BLOCK, tokens=600, memory="recompute", flavour="fast", chunk=100, layout=["up_input_factor", "up_output_factor"]
    )
    tuned = tnmoe.tune(given, training=True, count=3, rounds=1)
    assert tuned.plan == given  # a tie is the first one's
    assert all(m.plan.function is not None and m.plan.saved <= given.saved for m in tuned.measured)
    assert {m.variant.memory for m in tuned.measured} == {"planned"}
    assert {m.variant.layout for m in tuned.measured} == {given.turned, "auto", "columns"}
    assert {m.variant.chunk for m in tuned.measured} == {100, None, 256, 512}
    own = next(m for m in tuned.measured if m.order == 0 and m.variant.layout == "columns")
    assert own.plan.function.kept == given.function.kept


def test_chunks_keep_no_more_than_was_planned() -> None:
    """In chunks, what weights alone make stays with autograd: it must not add to what the plan keeps."""
    network = tnmoe.Network.parse("ti,ir,ro->to", weights="ir ro")
    merged = tnmoe.shortlist(network, sizes={"t": 600, "i": 6, "r": 9, "o": 5}, count=2)[0].plan
    assert merged.orders == {"result": "ti · (ir · ro)"}
    repeated = Variant(memory=0).of(merged)
    assert Variant("auto", "fast", None, PLANNED).of(repeated).saved == repeated.saved == 0
    with pytest.raises(tnmoe.PlanError, match="bytes"):
        Variant("auto", "fast", 100, PLANNED).of(repeated)


def test_what_a_layer_cannot_do_is_left_out_or_refused() -> None:
    """Group-wise gates sum over tokens: no chunks. A layer that ends in its gate has no backward pass of its own."""
    no_tokens = tnmoe.tune(NETWORK, sizes=SIZES, rounds=1, count=1)
    assert {m.variant.chunk for m in no_tokens.measured} == {None}
    soft = tnmoe.tune(tnmoe.SoftMoE(6, 5, 3, slots=2), tokens=300, rounds=1, count=1)
    assert {m.variant.chunk for m in soft.measured} == {None}
    assert any("chunk" in note for note in soft.notes)
    with pytest.raises(tnmoe.PlanError, match="chunk"):
        tnmoe.tune(tnmoe.SoftMoE(6, 5, 3, slots=2), tokens=300, rounds=1, chunks=[64])


def test_training_is_measured_where_gradients_are_needed() -> None:
    """Frozen inputs get none, and a layer without trained weights runs forward alone."""
    spec = tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), tnmoe.Gate("entmax15", "batch"))
    for gradients in (True, False):
        planned = tnmoe.plan(spec, tokens=7, input_gradients=gradients)
        assert tnmoe.tune(planned, training=True, count=1, rounds=1).plan.orders == planned.orders
    frozen = tnmoe.Network.parse("bn,nr->br", frozen="nr")
    tnmoe.tune(tnmoe.plan(frozen, sizes={"b": 2, "n": 3, "r": 4}, input_gradients=False), training=True, rounds=1)


# ---- the race --------------------------------------------------------------------------------------------------


def test_candidates_take_turns() -> None:
    """Every candidate once in each round, not always in the same order."""
    seen: list[int] = []
    seconds = iter(range(10**9))
    timer = Timer(lambda: float(next(seconds)))
    runners = [Runner(lambda k=k: seen.append(k), timer) for k in range(4)]
    left = Race().stage(runners, 10, keep=None, share=1)
    assert left == runners
    assert [len(r.seconds) for r in runners] == [10] * 4
    rounds = [tuple(seen[k : k + 4]) for k in range(0, 40, 4)]
    assert all(sorted(r) == [0, 1, 2, 3] for r in rounds)
    assert len(set(rounds)) > 3


def test_short_passes_are_repeated() -> None:
    clock = iter(range(10**9))
    timer = Timer(lambda: 1e-4 * next(clock))  # a tick at each look
    short = Runner(lambda: None, timer)
    assert race.seconds(short) == pytest.approx(1e-4 / 10)  # 10 passes between two looks
    assert short.repeats == 10
    long = Runner(lambda: [next(clock) for _ in range(20)], timer)
    assert race.seconds(long) == pytest.approx(21e-4)
    assert long.repeats == 1


def test_the_clearly_slower_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as slow: after one round; 30 %: after two; 10 %: after three; noise and the first one stay."""
    prices = {"first": 9.0, "leader": 1.0, "double": 2.1, "third": 1.3, "tenth": 1.1, "close": 1.04}
    monkeypatch.setattr(race, "seconds", lambda runner: prices[runner.run])
    runners = {name: Runner(name) for name in prices}
    left = Race().stage(list(runners.values()), 5, keep=2, share=1)
    assert [r.run for r in left] == ["first", "leader", "close"]
    assert {name: len(r.seconds) for name, r in runners.items()} == {
        "first": 5,
        "leader": 5,
        "double": 1,
        "third": 2,
        "tenth": 3,
        "close": 5,
    }
    noisy = iter([1.0, 9.0, 1.0, 9.0, 1.0] * 2)
    monkeypatch.setattr(race, "seconds", lambda runner: next(noisy) if runner.run == "double" else prices[runner.run])
    again = [Runner("leader"), Runner("double"), Runner("close")]
    assert len(Race().stage(again, 5, keep=2, share=1)) == 3  # it won some rounds


def test_the_budget_ends_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has one round at least; what the budget left out is said."""
    now = [0.0]
    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])

    def price(plan: tnmoe.Plan) -> float:
        now[0] += 1.0
        return 1.0

    pretend(monkeypatch, price)
    short = tnmoe.tune(BLOCK, tokens=600, count=2, rounds=50, budget=10.0)
    assert any("budget of 10 s" in note for note in short.notes)
    assert len(short.measured[0].rounds) < 10
    now[0] = 0.0
    unlimited = tnmoe.tune(BLOCK, tokens=600, count=2, rounds=50, budget=None)
    assert not any("budget" in note for note in unlimited.notes)
    assert len(unlimited.measured[0].rounds) == 5 + 5 + 5 + 50


@pytest.mark.parametrize(
    ("seconds", "place"),
    [
        ([[2.0] * 4, [1.0] * 4, [3.0] * 4], 1),  # always faster
        ([[2.0] * 4, [1.0, 1.0, 3.0, 3.0], [2.0] * 4], 0),  # in half of the rounds: noise
        ([[2.0] * 4, [1.0, 1.0, 1.0, 9.0], [2.0] * 4], 1),  # three of four
        ([[3.0] * 4, [2.0] * 4, [1.0] * 4], 2),
        ([[1.0] * 4, [1.0] * 4, [1.0] * 4], 0),  # a tie is the cheapest's
    ],
)
def test_who_wins(seconds: list[list[float]], place: int) -> None:
    plan = tnmoe.plan(NETWORK, sizes=SIZES)
    measured = [
        Measured(plan, k, Variant(), (0, 5, 6, 7, 8), (9.0 - k, *row)) for k, row in enumerate(seconds)
    ]  # what happened before the last stage is no matter
    assert winner(measured, 5) == place
    left = [measured[0], Measured(plan, 1, Variant(), (0,), (0.1,))]  # not in the last stage
    assert winner(left, 5) == 0
    rows = json.loads(Tuned(tuple(measured), place, "here").table().render("json"))
    assert [r["chosen"] for r in rows] == ["chosen" if k == place else "" for k in range(3)]


def test_the_table_shows_medians_and_spread() -> None:
    plan = tnmoe.plan(BLOCK, tokens=600, memory="recompute", flavour="fast", chunk=64)
    measured = (
        Measured(tnmoe.plan(BLOCK, tokens=600), 0, Variant(), tuple(range(5)), (4e-6, 8e-6, 5e-6, 6e-6, 7e-6)),
        Measured(plan, 1, Variant("rows", "fast", 64, "recompute"), tuple(range(5)), (2e-6, 4e-6, 2e-6, 3e-6, 3e-6)),
        Measured(plan, 1, Variant("rows", "fast", 64, "save"), (1, 9), (2e-6, 1.0)),
    )
    rows = json.loads(Tuned(measured, 1, "here").table().render("json"))
    assert [(r["median"], r["first_quartile"], r["third_quartile"]) for r in rows[:2]] == [
        (6.0, 5.0, 7.0),
        (3.0, 2.0, 3.0),
    ]
    assert [r["speed"] for r in rows] == [1.0, 2.0, 4.0]  # of the paired ratios 2, 2, 2.5, 2, 2⅓; of round 1 alone
    shown = [(r["order"], r["layout"], r["flavour"], r["chunk"], r["memory"]) for r in rows]
    assert shown[:2] == [(1, "auto", "portable", "all", "autograd"), (2, "rows", "fast", 64, "recompute")]
    assert "Order 2: " in str(Tuned(measured, 1, "here"))


# ---- the cache -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_measured_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question is answered from the cache; other sizes, settings and versions are other questions."""
    passes = pretend(monkeypatch, lambda plan: 1.0 if plan.turned is None else 0.5)

    def run(**change: object) -> Tuned:
        return tnmoe.tune(BLOCK, **{"tokens": 300, "count": 2, "rounds": 2, **change})

    first = run()
    count = len(passes)
    again = run()
    assert (first.cached, again.cached, len(passes)) == (False, True, count)
    assert again.measured[again.chosen].variant.layout == "columns"
    assert (again.chosen, again.measured, again.notes) == (first.chosen, first.measured, first.notes)
    assert tnmoe.emit(again.plan) == tnmoe.emit(first.plan)
    assert "earlier run" in str(again)
    for change in (
        {"training": True},
        {"dtype": "float64"},
        {"rounds": 3},
        {"budget": None},
        {"tokens": 301},
        {"layouts": ["rows"]},
        {"flavours": ["portable"]},
        {"chunks": [7]},
        {"memory": ["save"]},
        {"fresh": True},
    ):
        assert not run(**change).cached, change
    for where, name, value in (
        (torch, "__version__", "9.9"),
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert not run().cached, name
    assert run().cached


def change(edit: Callable[[dict], object]) -> Callable[[bytes], dict]:
    """An entry's value with a change."""

    def changed(content: bytes) -> dict:
        value = json.loads(content.partition(b"\n")[2])
        edit(value)
        return value

    return changed


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"\xff\xff", json.dumps({"measured": []}).encode()], ids=repr)
def test_a_damaged_entry_is_measured_again(home: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    pretend(monkeypatch, lambda plan: 1.0)
    tnmoe.tune(NETWORK, sizes=SIZES, count=2, rounds=2)
    (entry,) = (p for p in home.rglob("tuned-*") if p.is_file())
    entry.write_bytes(damage)
    assert not tnmoe.tune(NETWORK, sizes=SIZES, count=2, rounds=2).cached
    assert tnmoe.tune(NETWORK, sizes=SIZES, count=2, rounds=2).cached


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v.pop("measured"),
        lambda v: v.update(measured=[]),
        lambda v: v.update(measured="all"),
        lambda v: v.update(decided="1"),
        lambda v: v.update(decided=99),
        lambda v: v.update(notes=[1]),
        lambda v: v["measured"][0].pop("seconds"),
        lambda v: v["measured"][0].update(seconds=[]),
        lambda v: v["measured"][0]["seconds"].append(1.0),
        lambda v: v["measured"][1].update(rounds=[99], seconds=[1.0]),
        lambda v: v["measured"][1]["seconds"].__setitem__(0, -1.0),
        lambda v: v["measured"][1]["seconds"].__setitem__(0, "1"),
        lambda v: v["measured"][1].update(order=7),
        lambda v: v["measured"][1].update(order="0"),
        lambda v: v["measured"][1].update(layout="diagonal"),
        lambda v: v["measured"][1].update(layout=["nothing"]),
        lambda v: v["measured"][1].update(layout=[[]]),
        lambda v: v["measured"][1].update(flavour="slow"),
        lambda v: v["measured"][1].update(chunk=0),
        lambda v: v["measured"][1].update(memory="all"),
        lambda v: v["measured"].append(3),
    ],
)
def test_an_entry_of_another_form_is_a_miss(
    home: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[dict], object]
) -> None:
    """What another program, or another version, may have left under the key: it is measured again, and written anew."""
    pretend(monkeypatch, lambda plan: 1.0)

    def run() -> Tuned:
        return tnmoe.tune(BLOCK, tokens=300, count=2, rounds=2)

    first = run()
    (entry,) = (p for p in home.rglob("tuned-*") if p.is_file())
    assert cache.put(entry.stem, change(edit)(entry.read_bytes()))
    again = run()
    assert not again.cached
    assert again.measured == first.measured
    assert run().cached


@pytest.mark.slow
def test_processes_at_once_share_an_entry(home: Path) -> None:
    """Each comes to an end, and what is left is whole: the next one reads it."""
    code = (
        "import tnmoe; net = tnmoe.Network.parse('bi,ir,ro->bo', weights='ir ro');"
        "print(*(tnmoe.tune(net, sizes=dict(b=4, i=5, r=3, o=6), rounds=2, fresh=f, budget=5).cached for f in {}))"
    )
    environment = {**os.environ, "TNMOE_CACHE": str(home), "PYTHONPATH": str(Path(tnmoe.__file__).parent.parent)}
    environment["OMP_NUM_THREADS"] = "1"

    def start(fresh: tuple[bool, ...]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code.format(fresh)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    together = [start((True,) * 2) for _ in range(2)]
    assert [p.communicate(timeout=300)[0].split() for p in together] == [["False"] * 2] * 2
    assert start((False,)).communicate(timeout=300)[0].strip() == "True"
    assert len([p for p in home.rglob("*") if p.is_file()]) == len({p.name for p in home.rglob("tuned-*.json")}) == 1


# ---- bad input, the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "tpu"}, "cpu, cuda"),
        ({"dtype": "int8"}, "float32"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 2.0}, "rounds"),
        ({"count": 0}, "count"),
        ({"count": True}, "count"),
        ({"budget": 0}, "budget"),
        ({"budget": "long"}, "budget"),
        ({"layouts": ["diagonal"]}, "layout 'diagonal'"),
        ({"layouts": "rows"}, "layouts must be several"),
        ({"layouts": [["nothing"]]}, "nothing"),
        ({"layouts": []}, "layouts names nothing"),
        ({"flavours": ["slow"]}, "flavour 'slow'"),
        ({"flavours": 3}, "flavours must be several"),
        ({"chunks": [0]}, "chunk"),
        ({"chunks": [True]}, "chunk"),
        ({"memory": ["all"]}, "memory"),
        ({"memory": [-1]}, "memory"),
    ],
)
def test_bad_input(change: dict[str, object], words: str) -> None:
    with pytest.raises(tnmoe.PlanError, match=words):
        tnmoe.tune(NETWORK, sizes=SIZES, **change)


def test_defaults_follow_the_device_and_the_tokens() -> None:
    def found(**change: object) -> object:
        setting = {"tokens": 4096, "device": "cpu", "dtype": "float32", "training": False}
        return choices(Variant(), **{**setting, **change})

    assert found().chunks == (None, 256, 512, 1024, 2048)
    assert found(tokens=512).chunks == (None, 256)
    assert found(tokens=None).chunks == found(tokens=1).chunks == (None,)
    assert found(device="cuda", dtype="float64").flavours == found(dtype="float64").flavours == ("portable",)
    assert found(device="cuda").flavours == ("portable", "triton")
    assert found().flavours == ("portable", "fast")
    assert (found().memory, found(training=True).memory) == ((None,), (None, "save"))


def test_a_sparse_mixture_is_measured_too() -> None:
    tuned = tnmoe.tune(tnmoe.SparseMoE(4, 3, 5, 2), tokens=2, rounds=1)
    assert tuned.plan.values["T"] == 2


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layer.toml"
    file.write_text(
        '[layer]\nkind = "mumoe"\ninputs = 6\noutputs = 5\nexperts = 4\nfactorization = { kind = "cp", rank = 3 }\n'
    )
    kept = tmp_path / "plan.json"

    def run(*options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["tune", str(file), "--tokens", "2", "--rounds", "1", "--count", "2", "-o", str(kept), *options])
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert "chosen" in run("--seconds", "5")
    assert tnmoe.Plan.from_json(kept.read_text()).values["T"] == 2
    rows = run("--layout", "input_factor,output_factor", "--flavour", "fast", "--chunk", "1", "--format", "json")
    found = json.loads(rows[: rows.rindex("]") + 1])
    assert {(r["layout"], r["flavour"], r["chunk"]) for r in found} == {("input_factor output_factor", "fast", 1)}
    plan = tnmoe.Plan.from_json(kept.read_text())
    assert (plan.turned, emitted(plan)) == (("input_factor", "output_factor"), ("fast", 1, False))
    with pytest.raises(SystemExit) as stop:
        main(["tune", "gpt2"])
    assert stop.value.code == 2
    assert "one layer" in capsys.readouterr().err


def test_an_order_that_moves_far_more_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4096 tokens the runner-up of a GPT-2 block has 1.5 % more FLOPs, but 2.3 GB of (token, expert, rank)."""
    spec = tnmoe.MuMoEBlock(768, 3072, 768, 256, tnmoe.CP(556), tnmoe.Gate("entmax15", "layer"))
    given = tnmoe.shortlist(spec, count=2, tokens=4096)[1].plan
    biggest = [max(math.prod(int(p.bound.sizes[i]) for i in op.out.indices) for op in p.bound.ops) for p in (given,)]
    assert biggest == [4096 * 256 * 556]
    passes = pretend(monkeypatch, lambda plan: 1.0)
    monkeypatch.setattr(tune_module, "Bench", lambda *_: types.SimpleNamespace(runner=Runner))
    tuned = tnmoe.tune(spec, tokens=4096, count=2, rounds=1, layouts=["auto"])
    assert {m.order for m in tuned.measured} == {0}
    assert any("times as many elements" in note for note in tuned.notes)
    assert given.orders not in [p.orders for p in passes]
    own = tnmoe.tune(given, count=2, rounds=1, layouts=["auto"])  # who asks for it gets it
    assert given.orders in [m.plan.orders for m in own.measured]
