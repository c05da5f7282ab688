"""The cost model against counts that do not share its code: literals, torch's counter, dispatched operations."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
from typing import Any

import pytest
import torch
from support.cases import seeds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.backends.runtime import activations
from tnmoe.costing.op_cost import op_cost
from tnmoe.ir.pointwise_ops import Entmax15, Sparsemax
from tnmoe.ir.value import Value
from tnmoe.presets.registry import PRESETS
from tnmoe.reports.figures import FIGURES

EMITTED = [name for name, preset in PRESETS.items() if preset.emitted]


@pytest.mark.parametrize("name", EMITTED)
def test_presets_agree_with_torch(name: str) -> None:
    """Parameters and matmul FLOPs of every emitted preset: equality with what torch counts."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=PRESETS[name].tokens)
    module = tnmoe.build(plan, device="meta").eval()
    report = tnmoe.cost(plan)
    width = plan.bound.sizes[plan.layer.inputs[0].indices[-1]]
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(PRESETS[name].tokens, int(width), device="meta"))
    assert report.matmul_flops == counter.get_total_flops()
    assert report.parameters == sum(p.numel() for p in module.parameters())
    assert report.weight_bytes == 4 * sum(t.numel() for t in module.state_dict().values())


@pytest.mark.parametrize(
    ("name", "parameters", "macs_per_token"),
    [
        # R (N + I + O) + R of the bias, plus the gate I·N; a MAC for each product, R Hadamard products included
        ("clip-128-cp", 354 * (128 + 768 + 1000) + 354 + 768 * 128, 354 * (128 + 768 + 1000) + 354 + 768 * 128),
        # N·4·4 + 4·I·95 + 4·95·O + 4·95 of the bias, plus the gate; r1·r2·r3 for the product of the two cores
        (
            "clip-128-tr",
            128 * 16 + 380 * 768 + 380 * 1000 + 380 + 768 * 128,
            128 * 16 + 380 * 768 + 380 * 1000 + 4 * 4 * 95 + 768 * 128,
        ),
        # I N + N (H (I + O) + H + O); every expert runs to its end, and N·O products mix the outputs
        (
            "mixer-token-dense",
            196 * 64 + 64 * (256 * 392 + 256 + 196),
            196 * 64 + 64 * 256 * 392 + 64 * 196,
        ),
        # I N + k H (I + O), and k products an output to combine
        ("mixer-token-sparse", 196 * 64 + 64 * (256 * 392 + 256 + 196), 196 * 64 + 2 * 256 * 392 + 2 * 196),
    ],
)
def test_hand_derived_figures(name: str, parameters: int, macs_per_token: int) -> None:
    preset = PRESETS[name]
    report = tnmoe.cost(preset.spec, tokens=10)
    assert report.parameters == parameters
    assert report.macs == 10 * macs_per_token


def random_declaration(rng: random.Random) -> Any:
    """A layer with integer sizes, and the same one with symbols."""
    levels = rng.randint(1, 3)
    sizes = {k: rng.randint(1, 60) for k in ["d_in", "d_hid", "d_out", "rank", *(f"e{k}" for k in range(levels))]}
    sizes |= {f"b{k}": rng.randint(1, 9) for k in range(levels + 2)}
    bias, norm = rng.random() < 0.7, rng.choice(["batch", "layer", "none"])
    gate = tnmoe.Gate(rng.choice(["entmax15", "softmax", "sparsemax", "sigmoid"]), norm)
    block, kind = rng.random() < 0.5, rng.choice(["cp", "tr", "dense"])

    def make(value: Any) -> Any:
        factorization = {
            "cp": lambda: tnmoe.CP(value("rank")),
            "tr": lambda: tnmoe.TensorRing([value(f"b{k}") for k in range(levels + 2)]),
            "dense": tnmoe.Dense,
        }[kind]()
        experts = [value(f"e{k}") for k in range(levels)]
        if block:
            widths = (value("d_in"), value("d_hid"), value("d_out"))
            return tnmoe.MuMoEBlock(*widths, experts, factorization, gate, bias, bias)
        return tnmoe.MuMoE(value("d_in"), value("d_out"), experts, factorization, gate, bias)

    return make(sizes.__getitem__), make(str), sizes


@pytest.mark.parametrize("seed", seeds(40, 3))
def test_formulas_equal_numbers(seed: int) -> None:
    """Each figure's formula, substituted, is the number: declared by integers or by symbols alike."""
    rng = random.Random(seed)
    numeric, symbolic, sizes = random_declaration(rng)
    plan = tnmoe.plan(numeric, tokens=rng.randint(1, 100))
    report = tnmoe.cost(plan)
    used = {k: v for k, v in sizes.items() if k in symbolic.layer().free_symbols}
    named = tnmoe.cost(tnmoe.plan(symbolic, tokens=plan.values["T"], sizes=used))
    for figure in FIGURES:
        number = getattr(report, figure)
        formula = report.formula(figure)
        assert formula.subs({tnmoe.symbol(k): v for k, v in plan.values.items()}) == number, (figure, formula)
        assert getattr(named, figure) == number
        values = {tnmoe.symbol(k): v for k, v in {**used, "T": plan.values["T"]}.items()}
        assert named.formula(figure).subs(values) == number


def test_formulas_read_like_the_paper() -> None:
    """Collected by the symbol that shortens them: compared as text, since the form is the point."""
    cp = tnmoe.cost(tnmoe.MuMoE(768, 3072, 256, tnmoe.CP(556)))
    assert str(cp.formula("parameters")) == "I*N + R*(I + N + O + 1)"
    assert str(cp.formula("matmul_flops")) == "2*T*(I*N + R*(I + N + O))"
    assert str(cp.formula("max_rank")) == "Min(I, O, R)"


class Elementwise(TorchDispatchMode):
    """Counts elements written by products, sums of two tensors and GELU, as torch dispatches them."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.additions = self.gelus = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        match func._overloadpacket.__name__:
            case "mul":
                self.products += out.numel()
            case "add" | "addmm":  # addmm adds one bias entry to each of its results
                self.additions += out.numel()
            case "gelu":
                self.gelus += out.numel()
        return out


@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr", "mixer-token-mlp", "clip-128-cp", "clip-512-tr"])
def test_elementwise_flops_agree_with_dispatch(name: str) -> None:
    """One FLOP per Hadamard product and per bias addition: what the module really dispatches."""
    preset = PRESETS[name]
    gate = tnmoe.Gate("softmax", "none")  # the gates' own arithmetic is in the special column
    spec = dataclasses.replace(preset.spec, gate=gate) if hasattr(preset.spec, "gate") else preset.spec
    plan = tnmoe.plan(spec, tokens=24)
    module = tnmoe.build(plan).eval()
    width = int(plan.bound.sizes["i"])
    x = torch.randn(24, width)
    with torch.no_grad(), Elementwise() as counted:
        module(x)
    assert counted.products + counted.additions == tnmoe.cost(plan).elementwise_flops
    assert counted.gelus == 24 * int(plan.bound.sizes.get("h", 0))


class Operations(TorchDispatchMode):
    """Counts operations on elements: each kernel that computes times its largest operand's size; a norm is two."""

    IDLE = frozenset({"view", "detach", "slice", "full_like", "alias", "_to_copy"})

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
        if func._overloadpacket.__name__ not in self.IDLE and max(sizes) >= self.least:
            self.count += max(sizes) * (2 if func._overloadpacket.__name__ == "linalg_vector_norm" else 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", ["entmax15", "sparsemax"])
@pytest.mark.parametrize("experts", [16, 40, 64, 256, 1000])
def test_flops_of_a_gate_agree_with_dispatch(gate: str, experts: int) -> None:
    """Its search for the threshold is counted step by step; work on one number a row (its τ) is not."""
    kind = {"entmax15": Entmax15, "sparsemax": Sparsemax}[gate]
    tokens = 8192 // experts + 1
    op = kind(Value("a", ("t", "n")), Value("z", ("t", "n")), "n")
    x = torch.randn(tokens, experts)
    with torch.no_grad(), Operations(x.numel()) as counted:
        getattr(activations, gate)(x)
    assert op_cost(op, {"t": tokens, "n": experts}).special_flops == counted.count


class Written(TorchDispatchMode):
    """Bytes of new storages that operations return (views return none)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        known |= {a.untyped_storage().data_ptr() for a in self.kept}
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() not in known:
            self.kept.append(first)
            self.seen[first.untyped_storage().data_ptr()] = first.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr", "mixer-token-cp", "mixer-channel-mlp", "clip-128-tr"])
def test_activation_bytes_are_what_the_module_writes(name: str) -> None:
    """Every intermediate is one new storage of the reported size; no copy of a weight or of the input."""
    preset = PRESETS[name]
    gate = tnmoe.Gate("softmax", "layer")  # gates that are one operation each
    spec = dataclasses.replace(preset.spec, gate=gate) if hasattr(preset.spec, "gate") else preset.spec
    plan = tnmoe.plan(spec, tokens=24)
    module = tnmoe.build(plan).eval()
    x = torch.randn(24, int(plan.bound.sizes["i"]))
    with torch.no_grad(), Written() as written:
        module(x)
    assert sum(written.seen.values()) == tnmoe.cost(plan).activation_bytes


def test_bytes_follow_the_dtype() -> None:
    spec = tnmoe.MuMoE(8, 9, 4, tnmoe.CP(3))
    assert tnmoe.cost(spec, dtype="bfloat16").weight_bytes * 2 == tnmoe.cost(spec).weight_bytes
    assert tnmoe.cost(spec, dtype="float64").activation_bytes == 2 * tnmoe.cost(spec).activation_bytes
    with pytest.raises(tnmoe.CostError, match="float33"):
        tnmoe.cost(spec, dtype="float33")


def test_buffers_weigh_but_are_no_parameters() -> None:
    with_stats = tnmoe.cost(tnmoe.MuMoE(8, 9, 4, tnmoe.CP(3), tnmoe.Gate(norm="batch")))
    without = tnmoe.cost(tnmoe.MuMoE(8, 9, 4, tnmoe.CP(3), tnmoe.Gate(norm="layer")))
    assert with_stats.parameters == without.parameters
    assert with_stats.weight_bytes == without.weight_bytes + 2 * 4 * 4


def test_tokens_scale_work_and_leave_parameters() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(8, 9, 4, tnmoe.CP(3)), tokens=10)
    assert tnmoe.cost(plan, tokens=30).flops == 3 * tnmoe.cost(plan).flops
    assert tnmoe.cost(plan, tokens=30).parameters == tnmoe.cost(plan).parameters


def test_an_op_without_a_formula_is_an_error() -> None:
    class Unknown:
        out = Value("y", ("t",))
        x = Value("x", ("t",))

    with pytest.raises(tnmoe.CostError, match="Unknown"):
        op_cost(Unknown(), {"t": 3})  # type: ignore[arg-type]


def test_parts_add_up_and_every_format_holds_the_same_numbers() -> None:
    report = tnmoe.cost(tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=1024))
    *parts, total = json.loads(report.to_json())
    assert total["part"] == "total"
    for key in ("parameters", "macs", "flops", "matmul_flops", "activation_bytes"):
        assert sum(p[key] for p in parts) == total[key] == getattr(report, key)
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [int(r["flops"]) for r in rows] == [p["flops"] for p in [*parts, total]]
    for text in (str(report), report.to_markdown()):
        assert f"{report.flops:,}" in text
    latex = report.to_latex()
    assert f"{report.flops:,}".replace(",", "{,}") in latex
    assert latex.count(r" \\") == len(parts) + 2
    assert sum(int(r["flops"]) for r in json.loads(report.steps().render("json"))) == report.flops
