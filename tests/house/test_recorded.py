"""What a change of layout must not change: emitted bytes, states, plans, tables and predicted figures, on record.

`--update-golden` rewrites `golden/recorded/`; the difference is then for the changelog to explain.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tnmoe
from tnmoe.cli.main import main
from tnmoe.layers.kinds import KINDS
from tnmoe.presets.registry import FAMILIES, PRESETS

RECORDED = Path(__file__).parents[1] / "golden" / "recorded"

WAYS: dict[str, dict[str, Any]] = {
    "autograd": {},
    "portable": {"memory": "save"},
    "recompute": {"memory": "recompute"},
    "fast": {"flavour": "fast"},
    "triton": {"flavour": "triton"},
    "chunks": {"memory": "recompute", "flavour": "fast", "chunk": 64},
    "columns": {"layout": "columns"},
}

ROWS = {row.name: row for _, rows in FAMILIES.values() for row in rows}

# Kinds that no preset has, so that every kind is here.
OTHERS: dict[str, tnmoe.Spec] = {
    "factorized_linear": tnmoe.FactorizedLinear(64, 96, tnmoe.LowRank(8)),
    "switch": tnmoe.SparseMoE(32, 32, 8, 1, 64, capacity=125),
    "shared": tnmoe.SparseMoE(32, 32, 8, 2, 48, shared=24),
    "hierarchical": tnmoe.MuMoE(48, 40, (8, 4), tnmoe.CP(12), tnmoe.Gate("sparsemax", "layer")),
    "tucker": tnmoe.MuMoE(48, 40, 8, tnmoe.Tucker((4, 6, 8))),
    "train": tnmoe.MuMoE(48, 40, 8, tnmoe.TensorTrain((4, 6))),
}

PLANS: dict[str, Callable[[], tnmoe.Plan]] = {
    "flops": lambda: tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=1024),
    "macs-greedy": lambda: tnmoe.plan(PRESETS["gpt2-tr"].spec, tokens=1024, objective="macs", planner="greedy"),
    "training": lambda: tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=256, objective="training"),
    "saved-then-flops": lambda: tnmoe.plan(PRESETS["clip-128-tr"].spec, objective=("saved", "flops")),
    "weighted": lambda: tnmoe.plan(PRESETS["clip-128-tr"].spec, objective={"training": 1, "saved": 0.5}),
    "inference": lambda: tnmoe.plan(PRESETS["clip-512-tr"].spec, tokens=64, objective="inference", calls=100),
    "traffic": lambda: tnmoe.plan(PRESETS["mixer-token-tr"].spec, objective="traffic"),
    "layout": lambda: tnmoe.plan(PRESETS["clip-512-tr"].spec, tokens=256, objective="layout"),
    "peak": lambda: tnmoe.plan(PRESETS["clip-128-tr"].spec, tokens=256, objective="peak"),
    "saved-limit": lambda: tnmoe.plan(PRESETS["clip-128-tr"].spec, tokens=256, saved_limit=400_000),
    "memory-limit": lambda: tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=256, memory_limit=10_000_000),
    "budget": lambda: tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=64, memory=2_000_000),
    "chunks": lambda: tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=1024, **WAYS["chunks"]),
    "triton": lambda: tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=1024, **WAYS["triton"]),
    "columns": lambda: tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=1024, **WAYS["columns"]),
    "no-input-gradient": lambda: tnmoe.plan(PRESETS["mixer-channel-cp"].spec, input_gradients=False),
    "sparse": lambda: tnmoe.plan(PRESETS["gpt2-sparse"].spec, tokens=128),
    "network": lambda: tnmoe.plan(
        tnmoe.Network.parse("bn,nr,bi,ir,ro->bo", weights="nr ir ro"),
        sizes={"b": 64, "n": 16, "r": 24, "i": 48, "o": 32},
    ),
}


def digest(source: str) -> str:
    """SHA-256 of an emitted file, whatever version of tnmoe wrote it."""
    return hashlib.sha256(source.replace(f"tnmoe {tnmoe.__version__}.", "tnmoe.").encode()).hexdigest()


def sources(name: str) -> dict[str, str]:
    """Digests of a preset's files, every way with and without an inference form."""
    preset = PRESETS[name]
    plans = {way: tnmoe.plan(preset.spec, tokens=preset.tokens, **options) for way, options in WAYS.items()}
    return {
        way + suffix: digest(tnmoe.emit(plan, freeze=freeze))
        for way, plan in plans.items()
        for suffix, freeze in (("", False), (", freeze", True))
    }


def family(name: str) -> dict[str, Any]:
    """The file and the state of a layer of any family: nothing is stored, for many are large."""
    row = ROWS.get(name)
    plan = tnmoe.plan(row.spec, tokens=row.tokens) if row else tnmoe.plan(OTHERS[name], tokens=64)
    module = tnmoe.build(plan, device="meta")
    state = {key: f"{list(value.shape)} {value.dtype}" for key, value in module.state_dict().items()}
    return {"source": digest(tnmoe.emit(plan)), "state": state}


def figures(name: str) -> dict[str, Any]:
    """What a preset's reports predict, every way."""
    preset = PRESETS[name]
    result = {}
    for way, options in WAYS.items():
        plan = tnmoe.plan(preset.spec, tokens=preset.tokens, **options)
        report, memory = tnmoe.cost(plan, dtype="bfloat16"), tnmoe.memory(plan, dtype="bfloat16")
        result[way] = {
            "training": str(report.training_flops),
            "saved": report.saved_bytes,
            "gradient": report.gradient_bytes,
            "training_peak": memory.training_peak,
            "inference_peak": memory.inference_peak,
            "memory_saved": memory.saved_bytes,
            "frozen_peak": tnmoe.memory(plan, inference=True).inference_peak,
        }
    return result


def printed(*arguments: str) -> str:
    """What the command line prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return out.getvalue()


def same(path: str, text: str, update: bool) -> None:
    file = RECORDED / path
    if update:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{path} has changed"


def as_text(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"


EMITTED = [name for name, preset in PRESETS.items() if preset.emitted]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMITTED)
def test_emitted_presets(name: str, update_golden: bool) -> None:
    same(f"sources/{name}.json", as_text(sources(name)), update_golden)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMITTED)
def test_figures_of_presets(name: str, update_golden: bool) -> None:
    same(f"figures/{name}.json", as_text(figures(name)), update_golden)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(n for n in ROWS if n not in EMITTED), *OTHERS])
def test_families(name: str, update_golden: bool) -> None:
    same(f"families/{name}.json", as_text(family(name)), update_golden)


def test_every_kind_is_on_record() -> None:
    specs = [*(row.spec for row in ROWS.values()), *OTHERS.values()]
    assert {spec.kind for spec in specs} == set(KINDS)


@pytest.mark.parametrize("kind", PLANS)
def test_plans(kind: str, update_golden: bool) -> None:
    """Planned anew they are those on record, and read from the record they emit the same file."""
    plan = PLANS[kind]()
    same(f"plans/{kind}.json", plan.to_json(), update_golden)
    read = tnmoe.Plan.from_json((RECORDED / f"plans/{kind}.json").read_text(encoding="utf-8"))
    assert tnmoe.emit(read) == tnmoe.emit(plan)


TABLES = ("gpt2", "mixer", "clip", "moe", "moe-published")


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, update_golden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    same(f"tables/{name}.txt", printed("table", name), update_golden)
    same(f"tables/{name}.jsonl", rows(printed("table", name, "--format", "json")), update_golden)


def rows(text: str) -> str:
    """One row a line, so that a difference shows the row."""
    return "".join(json.dumps(row) + "\n" for row in json.loads(text))


def test_atlas_of_the_documentation(update_golden: bool) -> None:
    net = tnmoe.Network.parse("bn,anc,bi,cid,doa->bo", weights="anc cid doa")
    fixed = {"n": 4, "a": 4, "c": 32, "d": 64, "i": 768, "o": 1000}
    same("atlas.json", tnmoe.atlas(net, bounds={"b": (1, 65536), **fixed}).to_json(), update_golden)
