"""Sweeps against planning and costing each row by itself, fronts and constraints against brute force."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cases import case

import tnmoe
from tnmoe.analysis.frame import Frame
from tnmoe.reports.figures import FIGURES
from tnmoe.symbolic.columns import column

CP = tnmoe.MuMoE(768, 3072, 256, tnmoe.CP(556))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flops", "training"])
@pytest.mark.parametrize(
    ("spec", "make", "axes"),
    [
        (
            CP,
            lambda N, R, T: (tnmoe.MuMoE(768, 3072, N, tnmoe.CP(R)), T),
            {"N": [1, 7, 64, 4096], "R": [1, 30, 2000], "T": [1, 40, 5000]},
        ),
        (
            tnmoe.MuMoE(768, 1000, 4, tnmoe.TensorRing((4, 32, 64)), bias=False),
            lambda r1, r3, T: (tnmoe.MuMoE(768, 1000, 4, tnmoe.TensorRing((r1, 32, r3)), bias=False), T),
            {"r1": [1, 4, 90], "r3": [1, 8, 64, 700], "T": [1, 31, 32, 100_000]},
        ),
        (
            tnmoe.MuMoEBlock(40, 90, 30, (8, 3), tnmoe.TensorRing((4, 4, 4, 20))),
            lambda N1, H, T: (tnmoe.MuMoEBlock(40, H, 30, (N1, 3), tnmoe.TensorRing((4, 4, 4, 20))), T),
            {"N1": [1, 8, 1000], "H": [1, 90, 3000], "T": [1, 64, 4096]},
        ),
        (
            tnmoe.SparseMoE(12, 10, 8, 2, 16),  # rows padded to blocks, unless they are few
            lambda N, T: (tnmoe.SparseMoE(12, 10, N, 2, 16), T),
            {"N": [2, 7, 64, 65], "T": [1, 3, 31, 32, 33, 128, 5000]},
        ),
    ],
    ids=["CP", "TR", "two levels", "routed"],
)
def test_rows_are_what_planning_each_by_itself_gives(spec: Any, make: Any, axes: Any, objective: str) -> None:
    grid = tnmoe.sweep(spec, figures=FIGURES, objective=objective, **axes)
    assert len(grid) == np.prod([len(a) for a in axes.values()])
    rng = random.Random(3)
    for row in rng.sample(range(len(grid)), 18):
        declared, tokens = make(**{name: int(grid[name][row]) for name in axes})
        report = tnmoe.cost(tnmoe.plan(declared, tokens=tokens, objective=objective))
        price = "flops" if objective == "flops" else "training_flops"
        assert grid[price][row] == getattr(report, price)
        for figure in ("parameters", "active_parameters", "max_rank", "weight_bytes", "gradient_bytes"):
            assert grid[figure][row] == getattr(report, figure), figure
        assert grid["flops"][row] == sum(grid[f"{c}_flops"][row] for c in ("matmul", "elementwise", "special"))


def test_fields_of_the_declaration_are_axes_too() -> None:
    by_field = tnmoe.sweep(CP, figures="parameters", experts=[8, 64], rank=[3, 4], inputs=[5, 6])
    by_symbol = tnmoe.sweep(CP, figures="parameters", N=[8, 64], R=[3, 4], I=[5, 6])
    assert list(by_field.columns) == ["experts", "rank", "inputs", "parameters"]
    assert by_field["parameters"].tolist() == by_symbol["parameters"].tolist()
    n, r, i = (by_field[k] for k in ("experts", "rank", "inputs"))
    assert by_field["parameters"].tolist() == (r * (n + i + 3072) + r + i * n).tolist()  # R (N + I + O) + R + I N


def test_a_plan_keeps_its_order() -> None:
    spec = tnmoe.MuMoE(768, 1000, 4, tnmoe.TensorRing((4, 32, 64)), bias=False)
    plan = tnmoe.plan(spec, tokens=1)
    kept = tnmoe.sweep(plan, figures="flops", T=[1, 32, 4096])
    free = tnmoe.sweep(spec, figures="flops", T=[1, 32, 4096])
    assert kept["flops"].tolist() == [tnmoe.cost(plan, tokens=t).flops for t in (1, 32, 4096)]
    assert "order" not in kept.columns
    assert free["flops"][2] < kept["flops"][2]  # the README's example: another order above 31.7 tokens
    assert len(free.orders) > 1


def test_numbers_beyond_64_bits_stay_exact() -> None:
    big = 2**31 - 1
    spec = tnmoe.MuMoE(big, big, big, tnmoe.CP(big))
    grid = tnmoe.sweep(spec, figures=("parameters", "macs", "max_rank"), T=[1, 3, 2**33])
    expected = big * 3 * big + big + big * big
    assert grid["parameters"].tolist() == [expected] * 3
    assert [int(m) for m in grid["macs"]] == [t * (3 * big**2 + big**2 + big) for t in (1, 3, 2**33)]
    assert grid["macs"].dtype == object
    assert grid["max_rank"].dtype == np.int64
    assert len(grid.where("macs // 1024**2 > 1024**6")) == 1
    assert grid.sorted("-macs")["T"].tolist() == [2**33, 3, 1]


def test_ratios() -> None:
    grid = tnmoe.sweep(CP, figures=("parameters", "max_rank", "parameters_per_rank", "intensity"), R=[10, 20])
    assert grid["parameters_per_rank"] == pytest.approx(grid["parameters"] / grid["max_rank"])
    assert tnmoe.cost(CP).ratio("parameters_per_rank") == pytest.approx(2474540 / 556)
    single = tnmoe.sweep(CP, figures="intensity", tokens=64)
    assert single["intensity"][0] == pytest.approx(tnmoe.cost(CP, tokens=64).intensity)


# ---- filters -------------------------------------------------------------------------------------------------


def grid_of(rows: list[tuple[int, ...]]) -> Frame:
    return Frame("numbers", {f"c{k}": column(c) for k, c in enumerate(zip(*rows, strict=True))})


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_fronts_are_those_of_brute_force(dimension: int) -> None:
    for trial in range(60):
        with case(dimension, trial) as rng:
            rows = [tuple(rng.randint(0, 6) for _ in range(dimension)) for _ in range(rng.randint(1, 40))]
            signs = [rng.choice(("", "-")) for _ in range(dimension)]

            def value(row: tuple[int, ...], signs: list[str] = signs) -> tuple[int, ...]:
                return tuple(-v if s else v for v, s in zip(row, signs, strict=True))

            def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
                return a != b and all(x <= y for x, y in zip(a, b, strict=True))

            expected = [r for r in rows if not any(beats(value(o), value(r)) for o in rows)]
            front = grid_of(rows).pareto(*(f"{s}c{k}" for k, s in enumerate(signs)))
            assert [tuple(int(c[k]) for c in front.columns.values()) for k in range(len(front))] == expected


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("c0 <= 3", lambda a, b: a <= 3),
        ("2*c0 + 1 > c1**2", lambda a, b: 2 * a + 1 > b**2),
        ("1 < c0 <= c1 < 6", lambda a, b: 1 < a <= b < 6),
        ("c0 // 2 == c1", lambda a, b: a // 2 == b),
        ("(c0 - c1)*3 != 0", lambda a, b: a != b),
        ("c1 >= 2", lambda a, b: b >= 2),
    ],
)
def test_constraints_are_what_they_say(text: str, holds: Any) -> None:
    rows = [(a, b) for a in range(1, 8) for b in range(1, 8)]
    found = grid_of(rows).where(text)
    assert list(zip(found["c0"].tolist(), found["c1"].tolist(), strict=True)) == [r for r in rows if holds(*r)]


def test_constraints_while_sweeping_may_name_other_figures() -> None:
    grid = tnmoe.sweep(CP, figures="parameters", R=range(1, 600), where=["max_rank >= 128", "flops <= 4*10**9"])
    assert list(grid.columns) == ["R", "parameters"]
    ranks = grid["R"].tolist()
    costs = {
        r: tnmoe.cost(tnmoe.MuMoE(768, 3072, 256, tnmoe.CP(r))).flops for r in (ranks[0], ranks[-1], ranks[-1] + 1)
    }
    assert ranks[0] == 128
    assert costs[ranks[-1]] <= 4 * 10**9 < costs[ranks[-1] + 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tnmoe.sweep(CP, colour=[1]), "unknown size of CPMuMoE 'colour'.*I, N, O, R, T"),
        (lambda: tnmoe.sweep(CP, N=[0]), "axis N takes positive integers, got 0"),
        (lambda: tnmoe.sweep(CP, N="many"), "axis N takes positive integers, got 'm'"),
        (lambda: tnmoe.sweep(CP, N=[]), "these axes make 0"),
        (lambda: tnmoe.sweep(CP, N=range(1, 5000), R=range(1, 5000)), "these axes make 24,990,001"),
        (lambda: tnmoe.sweep(CP, figures="colour"), "unknown figure 'colour'"),
        (lambda: tnmoe.sweep(CP, objective="time"), "unknown objective of a sweep 'time'"),
        (lambda: tnmoe.sweep(CP, where="parameters"), "needs one of"),
        (lambda: tnmoe.sweep(CP, where="parameters = 3"), r"write == for equality\n  parameters = 3\n             \^"),
        (lambda: tnmoe.sweep(CP, where="__import__('os') > 3"), "starts with an underscore|unexpected|calls are not"),
        (lambda: tnmoe.sweep(CP, where="colour > 3"), "unknown figure 'colour'"),
        (lambda: tnmoe.sweep(CP, where="intensity > 3"), "intensity is a ratio"),
        (lambda: tnmoe.sweep(tnmoe.MuMoE(4, 4, (2, 3), tnmoe.CP(2)), experts=[2]), "no single size"),
        (lambda: grid_of([(1, 2)]).pareto(), "name the columns"),
        (lambda: grid_of([(1, 2)]).pareto("c7"), "unknown column 'c7'"),
        (lambda: grid_of([(1, 2)])["c7"], "unknown column 'c7'"),
    ],
)
def test_what_cannot_be_swept(call: Any, message: str) -> None:
    with pytest.raises(tnmoe.TnmoeError, match=message):
        call()


# ---- other forms ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_libraries_get_the_same_numbers(tmp_path: Path) -> None:
    import pandas
    import polars
    import pyarrow.parquet

    grid = tnmoe.sweep(CP, figures=("parameters", "macs", "intensity"), R=[10, 20], T=[5, 2**50])
    assert grid["macs"].dtype == object  # beyond 64 bits
    rows = list(zip(*(c.tolist() for c in grid.columns.values()), strict=True))
    frame = grid.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert [tuple(r) for r in frame.itertuples(index=False)] == rows
    assert grid.to_polars().rows() == rows
    assert isinstance(grid.to_polars(), polars.DataFrame)
    path = tmp_path / "grid.parquet"
    grid.to_parquet(str(path))
    read = pyarrow.parquet.read_table(path).to_pydict()
    assert [[float(v) if k == "intensity" else int(v) for v in c] for k, c in read.items()] == [
        c.tolist() for c in grid.columns.values()
    ]
    lines = list(csv.reader(io.StringIO(grid.to_csv())))
    assert lines[0] == list(grid.columns)
    assert [[float(v) if "." in v else int(v) for v in line] for line in lines[1:]] == [list(r) for r in rows]


def test_what_is_printed() -> None:
    grid = tnmoe.sweep(CP, figures="parameters", R=range(1, 101))
    text = str(grid)
    assert "The first 20 of 100 rows." in text
    assert "I = 768, N = 256, O = 3,072, T = 1,024." in text
    assert len(text.splitlines()) == 4 + 20 + 3
    assert "<table>" in grid._repr_html_()
