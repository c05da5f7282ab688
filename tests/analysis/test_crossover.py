"""Formulas against numbers at random sizes, and crossovers against literals and against substitution."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import sympy

import tnmoe
from tnmoe.reports.figures import FIGURES
from tnmoe.symbolic.columns import Columns, column

CP, TR, MuMoE = tnmoe.CP, tnmoe.TensorRing, tnmoe.MuMoE

SPECS = {
    "CP": MuMoE(5, 4, 3, CP(2)),
    "CP, two levels": MuMoE(5, 4, (3, 2), CP(2), tnmoe.Gate("softmax", "layer")),
    "TR": MuMoE(5, 4, 3, TR((2, 2, 2)), tnmoe.Gate("sparsemax", "none"), bias=False),
    "TR block": tnmoe.MuMoEBlock(5, 6, 4, 3, TR((2, 2, 2)), tnmoe.Gate("entmax15", "layer"), True, True),
    "dense": MuMoE(5, 4, 3, tnmoe.Dense(), tnmoe.Gate("sigmoid", "batch")),
    "expression": MuMoE("d", "4*d", "n", CP("d//2 + 1")),
    "MLP": tnmoe.MLP(5, 6, 4, True, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_formulas_equal_numbers_at_random_sizes(name: str) -> None:
    """1,050 assignments over the seven layers: every figure's simplified formula is the number counted in integers."""
    spec = SPECS[name]
    symbols = sorted(spec.layer().free_symbols | set(spec.layer().values))
    plan = tnmoe.plan(spec, tokens=3, sizes={k: 4 for k in spec.layer().free_symbols if k != "T"})
    report = tnmoe.cost(plan)
    rng = random.Random(name)
    rows = [{s: rng.choice((1, 2, 3, rng.randint(1, 50), rng.randint(1, 10**6))) for s in symbols} for _ in range(150)]
    rows = [row | {"T": max(2, row["T"])} for row in rows]  # the formula of what is saved is for more than one token
    columns = Columns({s: column(r[s] for r in rows) for s in symbols})
    formulas = {figure: columns.evaluate(report.formula(figure)) for figure in FIGURES}
    for k, row in enumerate(rows):
        there = dataclasses.replace(report, values=row)
        for figure, values in formulas.items():
            assert there.number(figure) == values[k], (figure, row)


@pytest.mark.parametrize(
    ("spec", "figure", "formula"),
    [
        # mathematics of the paper, table 1: parameters and MACs of the weights without the gate
        (MuMoE("I", "O", "N", CP("R"), bias=False), "parameters", "R*(I + N + O)"),
        (MuMoE("I", "O", "N", TR(("r1", "r2", "r3")), bias=False), "parameters", "I*r2*r3 + r1*(N*r2 + O*r3)"),
        (MuMoE("I", "O", "N", tnmoe.Dense(), bias=False), "parameters", "I*N*O"),
        (MuMoE("I", "O", ("N", "M"), CP("R"), bias=False), "parameters", "R*(I + M + N + O)"),
        (MuMoE("I", "O", "N", CP("R"), bias=False), "macs", "R*T*(I + N + O + 1)"),
    ],
)
def test_formulas_of_a_part_read_like_the_papers_table(spec: Any, figure: str, formula: str) -> None:
    sizes = {k: 16 for k in spec.layer().free_symbols if k != "T"}
    report = tnmoe.cost(tnmoe.plan(spec, sizes=sizes))
    assert str(report.formula(figure, part="")) == formula
    gate = report.formula(figure, part="gate")
    assert sympy.expand(gate + report.formula(figure, part="") - report.formula(figure)) == 0
    with pytest.raises(tnmoe.CostError, match=r"no part 'up' of .*'', 'gate'"):
        report.formula(figure, part="up")
    with pytest.raises(tnmoe.CostError, match="no part 'gate' of max_rank"):
        report.formula("max_rank", part="gate")


# ---- crossovers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "figure", "symbol", "options", "ranges"),
    [
        # R (N + I + O) + R + I N < I O + O: 4,097 R < 2,165,760, so R ≤ 528
        (MuMoE(768, 3072, 256, CP(1)), tnmoe.Linear(768, 3072), "parameters", "R", {}, ((1, 528),)),
        (MuMoE(768, 3072, 256, CP(1)), tnmoe.Linear(768, 3072), "parameters", "rank", {}, ((1, 528),)),
        # without biases and gate: ranks of the paper's table, 64 R < 1024 · 0 … see the literal below
        (
            tnmoe.Network.parse("bi,ir,ro->bo", weights="ir ro"),
            tnmoe.Network.parse("bi,io->bo", weights="io"),
            "parameters",
            "r",
            {"sizes": {"i": 30, "o": 70}},
            ((1, 20),),  # 100 r < 2,100; equal at 21
        ),
        # k of N experts run, or all: N - k > 0
        (tnmoe.SparseMoE(8, 8, 4, 3, 16, block=1), tnmoe.DenseMoE(8, 16, 8, 4), "matmul_flops", "N", {}, ((4, None),)),
        # d² < d · d never
        (tnmoe.Linear("d", "d"), tnmoe.Linear("d", "d"), "parameters", "d", {}, ()),
        # always: one row fewer
        (tnmoe.Linear("d", "d", bias=False), tnmoe.Linear("d", "d"), "parameters", "d", {}, ((1, None),)),
    ],
)
def test_integer_thresholds(a: Any, b: Any, figure: str, symbol: str, options: Any, ranges: Any) -> None:
    found = tnmoe.crossover(a, b, figure, symbol, tokens=1, **options)
    assert found.ranges == ranges
    for low, high in ranges:  # the ends, by substitution
        for at, less in ((low - 1, False), (low, True), (high, True), (high and high + 1, False)):
            if at:
                assert (found.difference.subs(found.symbol, at) < 0) == less


def test_two_ranges_and_equality() -> None:
    """(s - 3)(s - 8) by hand: I·O of one map is s², of the other two 11 s - 24."""
    a = tnmoe.Network.parse("bi,io->bo", weights="io")
    square = tnmoe.plan(a, sizes={"b": 1, "i": 5, "o": 5})
    layer = dataclasses.replace(
        square.layer, sizes={**square.layer.sizes, "i": tnmoe.symbol("s"), "o": tnmoe.symbol("s")}
    )
    line = dataclasses.replace(
        square.layer, sizes={**square.layer.sizes, "i": 11 * tnmoe.symbol("s") - 24, "o": sympy.Integer(1)}
    )
    found = tnmoe.crossover(layer, line, "parameters", "s", sizes={"b": 1})
    assert found.ranges == ((4, 7),)
    assert found.equal == ((3, 3), (8, 8))
    assert str(found).endswith("iff 4 ≤ s ≤ 7; as many iff s = 3 or s = 8")
    assert found.to_latex() == r"4 \leq s \leq 7"
    back = tnmoe.crossover(line, layer, "parameters", "s", sizes={"b": 1})
    assert back.ranges == ((1, 2), (9, None))


CP_RING = MuMoE("I", "O", "N", CP("q*s")), MuMoE("I", "O", "N", TR(("q", "q", "s")))


@pytest.mark.parametrize(
    ("a", "b", "figure", "symbol", "condition"),
    [
        # At equal maximal rank ρ = q s: TR wins on parameters iff q² < ρ …
        (CP_RING[1], CP_RING[0], "parameters", "q", "q < s"),
        # … and on FLOPs iff N (ρ - q²) > q ρ; here for products, CP's Hadamard among them: + q s on the left
        (CP_RING[1], CP_RING[0], "macs", "N", "q*(N + s) < s*(N + 1)"),
        (
            MuMoE("I", "O", "N", CP("R")),
            tnmoe.Linear("I", "O"),
            "parameters",
            "R",
            "R < (I*(-N + O) + O)/(I + N + O + 1)",
        ),
        (
            tnmoe.Linear("I", "O"),
            MuMoE("I", "O", "N", CP("R")),
            "parameters",
            "N",
            "N > (I*O + O - R*(I + O + 1))/(I + R)",
        ),
    ],
)
def test_conditions_in_several_symbols(a: Any, b: Any, figure: str, symbol: str, condition: str) -> None:
    found = tnmoe.crossover(a, b, figure, symbol)
    names = {str(s): s for s in found.difference.free_symbols}
    expected = sympy.sympify(condition, locals=names | {s: tnmoe.symbol(s) for s in "IONRTqs"})
    rng = random.Random(7)
    sides = {True: 0, False: 0}
    symbols = [tnmoe.symbol(s) for s in "IONRTqs"]
    claim = sympy.lambdify(symbols, [found.condition, found.difference < 0, expected], "math")
    for _ in range(300):
        sizes = [rng.randint(1, 40) for _ in symbols]
        less, by_figures, by_hand = claim(*sizes)
        assert less == by_figures == by_hand, sizes
        sides[less] += 1
    assert min(sides.values()) > 10
    assert f"iff {found.condition}" in str(found)
    assert found.ranges is None


def test_quadratic_conditions() -> None:
    """4 d² against R d + …: the one positive root, checked by substitution on both sides."""
    found = tnmoe.crossover(
        tnmoe.MLP("d", "4*d", "d"), tnmoe.MuMoEBlock("d", "4*d", "d", "N", CP("R")), "parameters", "d"
    )
    assert isinstance(found.condition, sympy.StrictLessThan)
    assert found.condition.lhs == tnmoe.symbol("d")
    rng = random.Random(2)
    claim = sympy.lambdify([tnmoe.symbol(s) for s in "dNR"], [found.condition, found.difference < 0], "math")
    sides = []
    for _ in range(300):
        sizes = [rng.randint(1, 60) for _ in "dNR"]
        less, by_figures = claim(*sizes)
        assert less == by_figures, sizes
        sides.append(less)
    assert 30 < sum(sides) < 270


SPARSE, SOFT = tnmoe.SparseMoE(8, 8, "N", 2, 16), tnmoe.DenseMoE(8, 16, 8, "N")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("a", "b", "figure", "symbol", "tokens", "sizes", "ranges"),
    [
        # rows padded to blocks of 4: 4 N + 128 - 4 ⌈N/4⌉ of them for 64 tokens, against 64 N; from N = 64 on 128
        (SPARSE, SOFT, "matmul_flops", "N", 64, {}, ((3, None),)),
        (SPARSE, tnmoe.SparseMoE(8, 8, "N", 2, 16, block=1), "matmul_flops", "N", 64, {}, ()),
        # tokens: rows in blocks of 4 of 100 experts, or all 100 experts on each token
        (SPARSE, SOFT, "flops", "T", None, {"N": 100}, None),
        # entmax takes 3 + ⌊½ ⌈log2 N⌉⌋ steps, more with every second power of two
        (MuMoE("I", "O", "N", CP(8)), tnmoe.Linear("I", "O"), "flops", "N", 64, {"I": 768, "O": 1000}, ((1, 940),)),
        (MuMoE(64, 64, "M", CP(8)), tnmoe.SparseMoE(64, 64, 16, 2), "flops", "M", 32, {}, None),
    ],
)
def test_padded_rows_and_logarithms(
    a: Any, b: Any, figure: str, symbol: str, tokens: Any, sizes: Any, ranges: Any
) -> None:
    """Against each integer by itself, and the layers planned with it."""
    found = tnmoe.crossover(a, b, figure, symbol, tokens=tokens, sizes=sizes)
    assert ranges is None or found.ranges == ranges
    assert found.ranges is not None
    assert found.equal is not None
    columns = Columns({symbol: column(range(1, 1500))})
    for at, value in enumerate(columns.evaluate(found.difference), start=1):
        for kind, holds in ((found.ranges, value < 0), (found.equal, value == 0)):
            assert any(low <= at and (high is None or at <= high) for low, high in kind) == holds, at
    for at in (4, 9, 64, 101):
        values = {**sizes, symbol: at, "T": at if symbol == "T" else tokens}
        costs = []
        for spec in (a, b):
            free = {k: v for k, v in values.items() if k in spec.layer().free_symbols and k != "T"}
            costs.append(tnmoe.cost(tnmoe.plan(spec, tokens=values["T"], sizes=free)).number(figure))
        assert found.difference.subs(found.symbol, at) == costs[0] - costs[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tnmoe.crossover(*CP_RING, "parameters", "Z"), "unknown size to solve for 'Z'"),
        (lambda: tnmoe.crossover(*CP_RING, "colour", "N"), "unknown figure 'colour'"),
        (
            lambda: tnmoe.crossover(CP_RING[0], tnmoe.Linear("I", "O"), "flops", "N"),
            r"flops is no polynomial in N: .*; give I, O, T, q, s a value each",
        ),
    ],
)
def test_what_cannot_be_solved(call: Any, message: str) -> None:
    with pytest.raises(tnmoe.TnmoeError, match=message):
        call()
