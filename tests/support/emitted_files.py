"""Emitted files of every kind, and the linter that reads them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest

import tnmoe
from tnmoe.presets.registry import PRESETS

RECORDED = {
    "cp_layer": tnmoe.MuMoE(16, 24, 8, tnmoe.CP(12), tnmoe.Gate("entmax15", "layer")),
    "tr_block": tnmoe.MuMoEBlock(
        16, 64, 16, 8, tnmoe.TensorRing((4, 4, 6)), tnmoe.Gate("entmax15", "batch"), input_norm=True
    ),
    "two_level_cp": tnmoe.MuMoE(16, 24, (8, 4), tnmoe.CP(12), tnmoe.Gate("sparsemax", "layer")),
    "mlp": tnmoe.MLP(16, 64, 16, input_norm=True),
}

EMITTED_PRESETS = [p for p in PRESETS.values() if p.emitted]


def variety() -> Iterator[tuple[str, str]]:
    """File names and sources: every factorization, depth, norm and kind of layer, at sizes that make long lines."""
    for name, spec in RECORDED.items():
        yield name, tnmoe.emit(tnmoe.plan(spec, tokens=64))
    for preset in EMITTED_PRESETS:
        yield preset.name.replace("-", "_"), tnmoe.emit(tnmoe.plan(preset.spec, tokens=preset.tokens))
    yield "gpt2", tnmoe.emit([tnmoe.plan(p.spec, tokens=p.tokens) for p in EMITTED_PRESETS if "gpt2" in p.name])
    activations = itertools.cycle(("entmax15", "softmax", "sparsemax", "sigmoid"))
    for levels, norm, bias, block in itertools.product((1, 2, 3), ("batch", "layer", "none"), (True, False), (0, 1)):
        rings = tnmoe.TensorRing((14, 16, 12, 18, 11)[: levels + 2])
        for factorization in (tnmoe.CP(556), rings, tnmoe.Dense()):
            widths = (768, 3072, 768) if block else (768, 3072)
            kind = tnmoe.MuMoEBlock if block else tnmoe.MuMoE
            gate = tnmoe.Gate(next(activations), norm)
            spec = kind(*widths, (256, 128, 64)[:levels], factorization, gate, bias)
            name = f"{spec.kind}_{levels}_{factorization.kind}_{norm}_{bias}"
            yield name, tnmoe.emit(tnmoe.plan(spec, tokens=4096, planner="greedy" if levels > 2 else "auto"))
    shared = {
        "train": tnmoe.TensorTrain((14, 18), ("i", "n", "o")),
        "tucker": tnmoe.Tucker((14, 188, 190)),
        "block_term": tnmoe.BlockTerm(12, (14, 88, 90)),
        "hierarchical": tnmoe.HierarchicalTucker(("n", ("i", "o")), (14, 188, 190, 256)),
        "low_rank": tnmoe.LowRank(64),
        "kronecker": tnmoe.Kronecker((16, 48), 12),
        "monarch": tnmoe.Monarch((100, 500), 12, pad=True),
        "custom": tnmoe.Custom("bn,bi,nrs,irt,sto->bo", {"r": 14, "s": 188, "t": 190}),
    }
    for name, factorization in shared.items():
        spec = tnmoe.MuMoEBlock(768, 3072, 768, 256, factorization, tnmoe.Gate("entmax15", "layer"), input_norm=True)
        yield f"shared_{name}", tnmoe.emit(tnmoe.plan(spec, tokens=4096))
        if name not in ("train", "tucker", "hierarchical", "block_term", "custom"):
            yield f"linear_{name}", tnmoe.emit(tnmoe.plan(tnmoe.FactorizedLinear(768, 3072, factorization)))
    networks = {
        "contracted": tnmoe.Network.parse("bn,nr,bi,ir,ro->bo", weights="nr ir ro"),
        "words": tnmoe.Network.parse("half,fz,F->zhF", weights="half", frozen="F"),
        "frozen": tnmoe.Network.parse(",ab->b", weights="scalar", frozen="ab"),
        "data": tnmoe.Network.parse("abi,cdi,ei->dacbe"),
    }
    for name, network in networks.items():
        yield name, tnmoe.emit(tnmoe.plan(network, sizes=dict.fromkeys(network.indices, 1024)))
    tucker = tnmoe.MuMoEBlock(768, 3072, 768, (256, 128), tnmoe.Tucker((8, 8, 256, 256)), input_norm=True)
    yield "frozen_tucker", tnmoe.emit(tnmoe.plan(tucker, tokens=1), freeze=True)
    yield (
        "frozen_network",
        tnmoe.emit(tnmoe.plan(networks["words"], sizes=dict.fromkeys(networks["words"].indices, 9)), freeze=True),
    )
    yield "dense_moe", tnmoe.emit(tnmoe.plan(tnmoe.DenseMoE(768, 3072, 768, 256, input_norm=True)))


# ---- style ---------------------------------------------------------------------------------------------------


def ruff(*arguments: str) -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--isolated", "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stdout.splitlines()
        pytest.fail("\n".join([*lines[:40], f"… {len(lines)} lines", done.stderr]), pytrace=False)
