"""Bytes moved, single gradients, and what optimizers keep: against torch's dispatch, its optimizers and literals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tnmoe
from tnmoe.ir.contractions import Contract, ContractAdd, Multiply
from tnmoe.layers.kinds import KINDS
from tnmoe.presets.registry import PRESETS
from tnmoe.render.table import Table
from tnmoe.reports.cost_report import comparison
from tnmoe.reports.figures import FIGURES
from tnmoe.reports.training_state import OPTIMIZERS, PRECISIONS, training_state
from tnmoe.symbolic.dims import symbol


class Read(TorchDispatchMode):
    """Elements of the distinct tensors that each operation reads, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        given = {id(a): a for a in args if isinstance(a, torch.Tensor)}
        storages = [a.untyped_storage().data_ptr() for a in given.values()]
        if isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() not in storages:
            self.elements += sum(a.numel() for a in given.values())
        return out


@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr", "mixer-token-cp", "mixer-channel-mlp", "clip-128-tr"])
def test_bytes_read_are_what_the_module_reads(name: str) -> None:
    preset = PRESETS[name]
    gate = tnmoe.Gate("softmax", "layer")  # gates that are one operation each
    spec = dataclasses.replace(preset.spec, gate=gate) if hasattr(preset.spec, "gate") else preset.spec
    plan = tnmoe.plan(spec, tokens=24)
    module = tnmoe.build(plan).eval()
    with torch.no_grad(), Read() as read:
        module(torch.randn(24, int(plan.bound.sizes["i"])))
    report = tnmoe.cost(plan)
    assert report.read_bytes == 4 * read.elements
    rows = report.steps().records()
    assert sum(int(r["read_bytes"]) for r in rows) == report.read_bytes
    assert sum(int(r["written_bytes"]) for r in rows) == report.activation_bytes
    assert report.intensity == pytest.approx(report.flops / (4 * read.elements + report.activation_bytes))


def test_gradients_by_hand() -> None:
    """y = x W + b, with 5 tokens: each gradient is one matrix product, that of the bias a sum."""
    report = tnmoe.cost(tnmoe.plan(tnmoe.Linear(7, 3), tokens=5))
    rows = {str(r["operand"]).partition("[")[0]: r for r in report.backward().records()}
    x, weight, bias = (rows[k] for k in ("x", "weight", "bias"))
    assert [r["flops"] for r in (x, weight, bias)] == [2 * 5 * 7 * 3, 2 * 5 * 7 * 3, 5 * 3]
    assert [r["read_bytes"] for r in (x, weight, bias)] == [4 * (15 + 21), 4 * (15 + 35), 4 * 15]
    assert [r["written_bytes"] for r in (x, weight, bias)] == [4 * 35, 4 * 21, 4 * 3]
    frozen = tnmoe.cost(tnmoe.plan(tnmoe.Linear(7, 3), tokens=5, input_gradients=False))
    assert len(frozen.backward().rows) == 2
    assert frozen.backward_flops == 2 * 5 * 7 * 3 + 5 * 3


@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr", "mixer-token-mlp", "clip-512-tr"])
def test_gradients_add_up_to_the_backward_pass(name: str) -> None:
    for gradients in (True, False):
        report = tnmoe.cost(tnmoe.plan(PRESETS[name].spec, tokens=64, input_gradients=gradients))
        rows = report.backward().records()
        assert sum(int(r["flops"]) for r in rows) == report.backward_flops
        assert sum(int(r["matmul_flops"]) for r in rows) == report.training_matmul_flops - report.matmul_flops


def test_routed_layers_touch_what_they_choose() -> None:
    """Top-2 of 256 MLP experts: I·N of the gate, the norm's 2·I, and (I + O)·H + H + O for each expert."""
    expert, rest = 2 * 768 * 3072 + 3072 + 768, 768 * 256 + 2 * 768
    for tokens, experts in ((1, 2), (3, 6), (1024, 256)):
        report = tnmoe.cost(tnmoe.plan(PRESETS["gpt2-sparse"].spec, tokens=tokens))
        assert report.active_parameters == 2 * expert + rest
        assert report.touched_parameters == experts * expert + rest
        assert report.parameters == 256 * expert + rest
    values = {tnmoe.symbol(k): v for k, v in report.values.items()}
    assert report.formula("touched_parameters").subs(values) == report.touched_parameters
    dense = tnmoe.cost(PRESETS["gpt2-cp"].spec)
    assert dense.active_parameters == dense.touched_parameters == dense.trained_parameters == dense.parameters


def test_frozen_weights_are_stored_but_not_trained() -> None:
    net = tnmoe.Network.parse("bi,ir,ro->bo", weights="ir", frozen="ro")
    report = tnmoe.cost(tnmoe.plan(net, sizes={"b": 2, "i": 7, "r": 3, "o": 5}))
    assert (report.parameters, report.trained_parameters, report.gradient_bytes) == (36, 21, 4 * 21)
    state = report.training_state("adam", "mixed")
    assert (state.weight_bytes, state.gradient_bytes, state.master_bytes, state.state_bytes) == (72, 42, 84, 168)


# ---- optimizers ----------------------------------------------------------------------------------------------

TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
}

FLOPS_OF = {"lerp_": 3, "mul_": 1, "addcmul_": 3, "sqrt": 1, "div": 1, "addcdiv_": 3}
"""Arithmetic for each element; of `add_` it depends on the factor."""


class StepFlops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.numel() > 1 and name not in ("zeros_like", "clone", "detach"):
            scaled = name == "add_" and (kwargs or {}).get("alpha", 1) != 1
            self.flops += out.numel() * (1 + scaled if name == "add_" else FLOPS_OF[name])
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", TORCH)
def test_optimizers_keep_and_do_what_torch_does(optimizer: str, precision: str) -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), tnmoe.Gate("softmax", "none")))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    module = tnmoe.build(plan, dtype=dtype)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    rule = TORCH[optimizer](module.parameters())
    rule.step()
    kept = [t for s in rule.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.ndim]
    state = tnmoe.cost(plan).training_state(optimizer, precision)
    assert state.state_bytes == sum(t.nbytes for t in kept)
    assert state.weight_bytes == sum(p.nbytes for p in module.parameters())
    assert state.gradient_bytes == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert state.master_bytes == 0
    with StepFlops() as counted:
        rule.step()
    assert state.step_flops == counted.flops


def linear(weights: int) -> tnmoe.Plan:
    return tnmoe.plan(tnmoe.Linear(weights, 1, bias=False))


@pytest.mark.parametrize(
    ("optimizer", "precision", "weights", "bytes_"),
    [
        ("adam", "mixed", 1000, 16_000),  # ZeRO (arXiv 1910.02054), section 3.1: 16 bytes a weight
        ("adamw", "fp8", 1000, 7_000),  # FP8-LM (arXiv 2310.18313), section 2.2: 6 bytes, and the 1 of the cast weight
        ("adamw_8bit", "mixed", 4096, 4096 * 8 + 2 * (4096 + 16 * 4)),  # a scale for every 256 of 4,096
        ("adamw_8bit", "mixed", 4097, 4097 * 8 + 2 * (4097 + 17 * 4)),
        ("adamw_8bit", "mixed", 4095, 4095 * 8 + 2 * 4 * 4095),  # too small: float32 moments
        ("adamw", "int8", 10, 10 * (1 + 2 + 4 + 8)),
    ],
)
def test_training_state_by_hand(optimizer: str, precision: str, weights: int, bytes_: int) -> None:
    report = tnmoe.cost(linear(weights))
    assert report.training_state(optimizer, precision).total_bytes == bytes_
    row = next(r for r in report.training(precision).records() if r["optimizer"] == optimizer)
    assert row["total_bytes"] == bytes_


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_state_has_formulas(optimizer: str, precision: str) -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(70, 65, 64, tnmoe.CP(63)))
    values = {tnmoe.symbol(k): v for k, v in plan.values.items()}
    number, formula = (training_state(p, optimizer, precision) for p in (plan.bound, plan.program))
    for name in ("weight_bytes", "gradient_bytes", "master_bytes", "state_bytes", "total_bytes", "step_flops"):
        found: Any = getattr(formula, name)
        assert found == getattr(number, name) or found.subs(values) == getattr(number, name), name


def test_unknown_optimizers_and_precisions_list_what_there_is() -> None:
    report = tnmoe.cost(linear(3))
    with pytest.raises(tnmoe.CostError, match=r"unknown optimizer 'adamx'; did you mean 'adam'"):
        report.training_state("adamx")
    with pytest.raises(tnmoe.CostError, match=r"unknown precision 'fp4'.*fp32, bf16, fp16, mixed, fp8, int8"):
        report.training("fp4")
    with pytest.raises(tnmoe.CostError, match="unknown figure 'colour'; there are parameters"):
        report.number("colour")


# ---- tables --------------------------------------------------------------------------------------------------

TABLE = Table(
    "a < b & c",
    (("name", "name"), ("count", "count"), ("ratio", "ratio")),
    (("x", 12_345_678, 0.5), ("y", 2_000, 1234.567), ("z", 0, 3.0)),
    ("one <note>",),
)


def test_html_escapes_and_aligns() -> None:
    html = TABLE._repr_html_()
    assert ">a &lt; b &amp; c</caption>" in html
    assert '12,345,678</td><td style="text-align:right;white-space:nowrap">0.50</td>' in html
    assert "one &lt;note&gt;" in html
    assert html == TABLE.render("html")


def test_decimals_align_and_si_keeps_one_prefix_a_column() -> None:
    assert [line.split()[-1] for line in TABLE.render("text").splitlines()[4:7]] == ["0.50", "1,234.57", "3.00"]
    si = TABLE.si()
    assert si.columns[1] == ("count", "count (k)")
    assert [row[1] for row in si.rows] == [12_345.68, 2.0, 0.0]
    assert si.columns[2] == ("ratio", "ratio")
    assert math.isclose(float(str(si.rows[1][2])), 1234.567)


def test_rows_sort_by_a_column() -> None:
    assert [row[0] for row in TABLE.sorted("count").rows] == ["z", "y", "x"]
    assert [row[0] for row in TABLE.sorted("-ratio").rows] == ["y", "z", "x"]
    with pytest.raises(tnmoe.TnmoeError, match=r"unknown column 'size'.*name, count, ratio"):
        TABLE.sorted("-size")


# ---- ideal and executed --------------------------------------------------------------------------------------


def test_what_is_computed_in_vain_stands_beside_the_ideal() -> None:
    """All 64 experts run, 2 are chosen: I·H + H·O products of each, and the gate's; T·N·O products mix the outputs."""
    sizes = {"inputs": 24, "outputs": 20, "experts": 64, "active": 2, "hidden": 48, "bias": False}
    masked = tnmoe.cost(tnmoe.SparseMoE(**sizes, lowering="masked"), tokens=10)
    gathered = tnmoe.cost(tnmoe.SparseMoE(**sizes), tokens=10)
    expert = 24 * 48 + 48 * 20
    assert gathered.ideal is None
    assert masked.ideal is not None
    assert masked.ideal.macs == gathered.macs == 10 * (24 * 64 + 2 * expert + 2 * 20)
    assert masked.macs == 10 * (24 * 64 + 64 * expert + 64 * 20)
    assert masked.value("ideal_flops") == gathered.flops
    assert gathered.value("ideal_flops") == gathered.flops
    assert f"{masked.macs:,} MACs" in str(masked)
    assert f"{gathered.macs:,} MACs" in str(masked)
    table = comparison({"masked": masked, "gathered": gathered}, "both")
    rows = table.records()
    assert [r["macs"] for r in rows] == [masked.macs, gathered.macs]
    assert [r["ideal_macs"] for r in rows] == [gathered.macs] * 2
    assert "ideal_macs" not in comparison({"gathered": gathered}, "one").records()[0]


def test_slots_beyond_the_choices_are_in_vain() -> None:
    """A capacity of 200 % makes twice as many slots as choices."""
    sizes = {"inputs": 24, "outputs": 20, "experts": 8, "active": 2, "hidden": 48, "bias": False}
    report = tnmoe.cost(tnmoe.SparseMoE(**sizes, capacity=200), tokens=64)
    assert report.ideal is not None
    expert, slots = 24 * 48 + 48 * 20, 8 * (200 * 2 * 64 // (100 * 8))
    assert slots == 2 * 2 * 64
    combined = 2 * 64 * 2 * 20  # gathered, the k results of a token are mixed by a product; slots scatter-add theirs
    assert report.matmul_flops - report.ideal.matmul_flops == 2 * (slots - 2 * 64) * expert - combined


@pytest.mark.parametrize("factorization", [tnmoe.Kronecker((4, 5), 2, True), tnmoe.Monarch((4, 5), 3, True)], ids=str)
@pytest.mark.parametrize("experts", [0, 3])
def test_padded_axes_are_in_vain(factorization: tnmoe.Kronecker | tnmoe.Monarch, experts: int) -> None:
    """13 inputs as 4 × 4, 17 outputs as 5 × 4: counted one by one, the products in which both entries exist."""
    if experts:
        spec: tnmoe.Spec = tnmoe.MuMoE(13, 17, experts, factorization, gate=tnmoe.Gate("softmax", "none"))
    else:
        spec = tnmoe.FactorizedLinear(13, 17, factorization)
    plan = tnmoe.plan(spec, tokens=2)
    report = tnmoe.cost(plan)
    sizes, real = plan.bound.sizes, {"i": 13, "o": 17}
    macs = every = 0
    for op in plan.bound.ops:
        if isinstance(op, Contract | ContractAdd | Multiply):
            names = list(dict.fromkeys(op.lhs.indices + op.rhs.indices))
            for entry in itertools.product(*(range(sizes[i]) for i in names)):
                at = dict(zip(names, entry, strict=True))
                pairs = [(a, b) for a, b in (("i1", "i2"), ("o1", "o2")) if a in at and b in at]
                macs += all(at[a] * sizes[b] + at[b] < real[a[0]] for a, b in pairs)
                every += 1
    assert report.ideal is not None
    assert (report.macs, report.ideal.macs) == (every, macs)
    assert report.value("ideal_macs") == report.ideal.formula("macs").subs(
        {symbol(name): value for name, value in report.values.items()}
    )
    assert report.flops - report.ideal.flops >= report.macs - report.ideal.macs > 0
    exact = tnmoe.plan(tnmoe.FactorizedLinear(16, 20, dataclasses.replace(factorization, pad=False)), tokens=2)
    assert tnmoe.cost(exact).ideal is None


def test_views_move_nothing() -> None:
    """Axes split in two are views: no bytes, and an intensity of 0."""
    report = tnmoe.cost(tnmoe.plan(tnmoe.FactorizedLinear(6, 6, tnmoe.Kronecker((2, 3)))), tokens=4)
    views = [r for r in report.steps().records() if r["op"] in ("Split", "Merge")]
    assert len(views) == 2
    assert {(r["read_bytes"], r["written_bytes"], r["intensity"]) for r in views} == {(0, 0, 0.0)}
    assert all(r["read_bytes"] for r in report.backward().records() if r["op"] == "Contract")


SIZES = {"inputs": 8, "outputs": 8, "hidden": 12, "experts": 4, "active": 2, "slots": 2, "heads": 2}
ROUTED = (
    "sparse_moe",
    "dense_moe",
    "expert_choice",
    "soft_moe",
    "mixture_of_tokens",
    "mixture_of_depths",
    "multi_head_moe",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTED)
def test_every_family_has_every_figure_as_a_formula_and_every_table(kind: str) -> None:
    declaration = KINDS[kind]
    required = [
        f.name for f in dataclasses.fields(declaration) if f.default is f.default_factory is dataclasses.MISSING
    ]
    given: dict[str, Any] = {name: SIZES.get(name, 4) for name in required}
    plan = tnmoe.plan(declaration(**given), tokens=16)
    report = tnmoe.cost(plan)
    values = {tnmoe.symbol(k): v for k, v in plan.values.items()}
    for figure in FIGURES:
        assert report.formula(figure).subs(values) == report.number(figure), figure
    for table in (report.parts(), report.steps(), report.backward(), report.symbolic(), report.training()):
        assert len(table.rows) > 1
    assert report.active_parameters <= report.touched_parameters <= report.parameters
    assert sum(int(r["flops"]) for r in report.steps().records()) == report.flops
