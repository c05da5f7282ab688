"""The paper's layers (arXiv 2402.12550, section 4 and appendix): sizes, ranks and experts as published.

Each family compares a layer with its μMoE replacements at matched parameters, and with the dense and the sparse
(top-2) mixture of as many experts with full matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.cp import CP
from tnmoe.factorizations.dense import Dense
from tnmoe.factorizations.tensor_ring import TensorRing
from tnmoe.layers.dense_moe import DenseMoE
from tnmoe.layers.gate import Gate
from tnmoe.layers.kinds import Spec
from tnmoe.layers.linear import MLP, Linear
from tnmoe.layers.mumoe import MuMoE, MuMoEBlock
from tnmoe.layers.sparse_moe import SparseMoE
from tnmoe.presets.moe import EQUAL_MACS, EQUAL_PARAMETERS, TOKENS
from tnmoe.presets.published import PUBLISHED

ACTIVE = 2
"""Experts that a token runs through in the sparse rows."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named layer with the tokens it is usually costed for.

    `emitted` is false for rows that are there to be compared with, not built: many hold gigabytes of full matrices.
    """

    name: str
    label: str
    spec: Spec
    tokens: int
    emitted: bool = True


def _block(
    family: str,
    label: str,
    widths: tuple[int, int, int],
    cp: int,
    tr: tuple[int, int, int],
    *,
    experts: int,
    tokens: int,
    gpt: bool,
) -> tuple[Preset, ...]:
    inputs, hidden, outputs = widths
    gate = Gate("entmax15", "layer" if gpt else "batch")

    def mumoe(factorization: CP | TensorRing) -> MuMoEBlock:
        return MuMoEBlock(inputs, hidden, outputs, experts, factorization, gate, True, gpt)

    return (
        Preset(f"{family}-mlp", f"{label}, MLP", MLP(inputs, hidden, outputs, True, gpt), tokens),
        Preset(f"{family}-cp", f"{label}, CP μMoE (R = {cp})", mumoe(CP(cp)), tokens),
        Preset(f"{family}-tr", f"{label}, TR μMoE (r = {', '.join(map(str, tr))})", mumoe(TensorRing(tr)), tokens),
        Preset(
            f"{family}-dense",
            f"{label}, dense MoE ({experts} MLPs)",
            DenseMoE(inputs, hidden, outputs, experts, True, gpt),
            tokens,
            False,
        ),
        Preset(
            f"{family}-sparse",
            f"{label}, sparse MoE (top-{ACTIVE} of {experts})",
            SparseMoE(inputs, outputs, experts, ACTIVE, hidden, True, gpt, block=1),
            tokens,
            False,
        ),
    )


def _head(experts: int, cp: int, tr: tuple[int, int, int]) -> tuple[Preset, ...]:
    label, gate = f"head 768→1000, N = {experts}", Gate("entmax15", "batch")
    name = f"clip-{experts}"
    return (
        Preset(f"{name}-cp", f"{label}, CP μMoE (R = {cp})", MuMoE(768, 1000, experts, CP(cp), gate), 256),
        Preset(
            f"{name}-tr",
            f"{label}, TR μMoE (r = {', '.join(map(str, tr))})",
            MuMoE(768, 1000, experts, TensorRing(tr), gate),
            256,
        ),
        Preset(
            f"{name}-dense",
            f"{label}, dense MoE",
            MuMoE(768, 1000, experts, Dense(), Gate("softmax", "none")),
            256,
            False,
        ),
        Preset(
            f"{name}-sparse",
            f"{label}, sparse MoE (top-{ACTIVE})",
            SparseMoE(768, 1000, experts, ACTIVE, block=1),
            256,
            False,
        ),
    )


FAMILIES: dict[str, tuple[str, tuple[Preset, ...]]] = {
    "gpt2": (
        "GPT-2 124M block 768→3072→768 with its LayerNorm, N = 256",
        _block("gpt2", "GPT-2 block", (768, 3072, 768), 556, (4, 4, 149), experts=256, tokens=1024, gpt=True),
    ),
    "mixer": (
        "MLP-Mixer S-16 token block 196→256→196 (512 rows) and channel block 512→2048→512 (196 rows), N = 64",
        _block("mixer-token", "token block", (196, 256, 196), 147, (4, 4, 37), experts=64, tokens=512, gpt=False)
        + _block(
            "mixer-channel", "channel block", (512, 2048, 512), 384, (4, 4, 97), experts=64, tokens=196, gpt=False
        ),
    ),
    "clip": (
        "CLIP ViT-B-32 classification head 768→1000",
        (
            Preset("clip-linear", "head 768→1000, linear", Linear(768, 1000), 256),
            *_head(128, 354, (4, 4, 95)),
            *_head(512, 165, (4, 4, 52)),
        ),
    ),
}
"""Family name: title and rows, in the order of the table."""

PRESETS: dict[str, Preset] = {p.name: p for _, rows in FAMILIES.values() for p in rows}
"""Every row by its own name, e.g. `gpt2-cp`."""

FAMILIES |= {
    f"moe-{what}": (
        f"Mixtures at the size of a GPT-2 block 768→3072→768: equal {title}",
        tuple(Preset(f"moe-{what}-{k}", label, spec, TOKENS, False) for k, (label, spec) in enumerate(rows.items())),
    )
    for what, title, rows in (
        ("parameters", "parameters", EQUAL_PARAMETERS),
        ("flops", "MACs a token", EQUAL_MACS),
    )
} | {
    "moe-published": (
        "Mixtures at sizes that were published",
        tuple(
            Preset(f"moe-published-{k}", label, preset.spec, TOKENS, False)
            for k, (label, preset) in enumerate(PUBLISHED.items())
        ),
    )
}

GROUPS = {"moe": ("moe-parameters", "moe-flops")}
"""Names that stand for several families."""


def find(name: str) -> tuple[str, tuple[Preset, ...]]:
    """The title and rows of a family, or of a single row.

    Raises:
        DeclarationError: with the names there are.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if name in PRESETS:
        return PRESETS[name].label, (PRESETS[name],)
    raise DeclarationError(
        f"{name!r} is neither a preset nor a file; presets: {', '.join(FAMILIES)} (or one row: {', '.join(PRESETS)})"
    )
