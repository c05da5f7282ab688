"""Swap the linear layers and MLP blocks of a torch model for compiled layers, with a table of before and after."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from tnmoe.emission.build import build
from tnmoe.errors import DeclarationError, TnmoeError
from tnmoe.factorizations.kinds import AnyFactorization
from tnmoe.layers.factorized import FactorizedLinear
from tnmoe.layers.kinds import declare
from tnmoe.layers.linear import MLP, Linear
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import DEFAULT_TOKENS
from tnmoe.render.table import Cell, Table
from tnmoe.reports.calls import cost
from tnmoe.reports.cost_report import CostReport
from tnmoe.weights.from_weights import from_linear

if TYPE_CHECKING:
    import torch

FIGURES = ("parameters", "flops", "weight_bytes")


@dataclass(frozen=True)
class Swapped:
    """One module and what took its place: figures of each, for the tokens of the call."""

    name: str
    before: CostReport = field(repr=False)
    after: CostReport = field(repr=False)
    error: float | None = None


@dataclass(frozen=True)
class Replacement:
    """What `replace` returns.

    Attributes:
        model: the model that was given, changed in place.
        swapped: every module that was replaced.
        parameters: of the whole model, before and after (what is shared counts once).
        notes: what was left alone, and what changes besides the factorization.
    """

    model: torch.nn.Module = field(repr=False)
    swapped: tuple[Swapped, ...]
    parameters: tuple[int, int]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """One row for each replaced module, and their sum."""
        columns = [("module", "module"), ("layer", "replaced by")]
        for key, heading in zip(FIGURES, ("parameters", "FLOPs", "weight bytes"), strict=True):
            columns += [(f"{key}_before", f"{heading} before"), (key, "after")]
        rows: list[tuple[Cell, ...]] = []
        for s in self.swapped:
            figures = [getattr(r, key) for key in FIGURES for r in (s.before, s.after)]
            rows.append((s.name, s.after.layer.name, *figures))
        sums = [sum(int(row[k]) for row in rows) for k in range(2, 2 + 2 * len(FIGURES))]
        before, after = self.parameters
        whole = f"Whole model: {before:,} parameters before, {after:,} after ({after / before - 1:+.1%})."
        kept = [
            f"{s.name}: relative error {s.error:.2e} of the kept weights." for s in self.swapped if s.error is not None
        ]
        return Table("Replaced modules", tuple(columns), (*rows, ("all", "", *sums)), (whole, *kept, *self.notes))

    def __str__(self) -> str:
        return str(self.table())


@dataclass(frozen=True)
class _Match:
    """A module to replace: a linear layer, or an MLP with its two linear layers in order."""

    names: tuple[str, ...]
    module: torch.nn.Module
    linears: tuple[torch.nn.Linear, ...]

    @property
    def widths(self) -> dict[str, int]:
        first, last = self.linears[0], self.linears[-1]
        hidden = {"hidden": first.out_features} if len(self.linears) == 2 else {}
        return {"inputs": first.in_features, **hidden, "outputs": last.out_features}

    @property
    def bias(self) -> bool:
        return self.linears[0].bias is not None


def replace(
    model: torch.nn.Module,
    rules: Mapping[str, Any],
    *,
    keep_weights: bool = False,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
) -> Replacement:
    """Swap every module whose name matches a pattern for a compiled layer; the model is changed in place.

    Args:
        model: any torch model.
        rules: shell-style patterns of qualified names, e.g. `"layers.*.linear1"`, and what takes the module's place:
            a factorization (a `FactorizedLinear` for a linear layer), or a declaration as in a TOML file, with
            widths and bias left to the module: `{"kind": "mumoe_block", "experts": 8, "factorization": CP(64)}`.
            The first pattern that matches a module decides. A linear layer gives one map; a module with two linear
            layers and nothing else but GELU and dropout gives a block.
        keep_weights: start from the weights of the linear layers (`from_linear`); not for blocks.
        tokens: rows to plan for and to count FLOPs on.
        seed: of the random starts, if weights are kept.

    Raises:
        DeclarationError: a pattern that matches nothing that can be replaced, a block for a linear layer or the other
            way round, widths that differ. The model is then unchanged.
    """
    notes: list[str] = []
    before = _parameters(model)
    made: list[tuple[_Match, torch.nn.Module, Swapped]] = []
    taken: set[int] = set()
    for pattern, rule in rules.items():
        matches = _matches(model, pattern, taken, notes)
        for match in matches:
            taken |= {id(m) for m in match.module.modules()}
            made.append((match, *_made(match, rule, keep_weights, tokens, seed, notes)))
    for match, module, _ in made:
        for name in match.names:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, module)
    _leave_fast_paths(model, [n for match, _, _ in made for n in match.names], notes)
    return Replacement(model, tuple(s for _, _, s in made), (before, _parameters(model)), tuple(notes))


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _matches(model: torch.nn.Module, pattern: str, taken: set[int], notes: list[str]) -> list[_Match]:
    """What the pattern names, each module once with all its names; inner modules of a match are left alone."""
    import torch

    names: dict[int, list[str]] = {}
    modules: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and fnmatch.fnmatchcase(name, pattern):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    matches: list[_Match] = []
    refused: list[str] = []
    inside: set[int] = set()
    for key, module in modules.items():
        if key in taken or key in inside:
            continue
        name = names[key][0]
        linears = _linears(module)
        if isinstance(linears, str):
            refused.append(f"{name}: {linears}")
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, torch.nn.MultiheadAttention):
            refused.append(f"{name}: nn.MultiheadAttention reads its weight directly and never calls it")
            continue
        inside |= {id(m) for m in module.modules()}
        matches.append(_Match(tuple(names[key]), module, linears))
    if not matches:
        reason = "; ".join(refused[:3]) or "no module has such a name"
        known = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        shown = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
        raise DeclarationError(
            f"{pattern!r} matches nothing that can be replaced: {reason}; linear layers are {shown or 'none'}"
        )
    notes += [f"Left alone: {reason}." for reason in refused if "MultiheadAttention" in reason]
    return matches


def _linears(module: torch.nn.Module) -> tuple[torch.nn.Linear, ...] | str:
    """The linear layers of a linear layer or an MLP; or why it is neither."""
    import torch

    if isinstance(module, torch.nn.Linear):
        return (module,)
    leaves = [m for m in module.modules() if not any(True for _ in m.children())]
    linears = tuple(m for m in leaves if isinstance(m, torch.nn.Linear))
    if len(linears) != 2:
        return f"{type(module).__name__} has {len(linears)} linear layers, a block has 2"
    if linears[0].out_features != linears[1].in_features:
        return f"{type(module).__name__}: {linears[0]} does not lead to {linears[1]}"
    if (linears[0].bias is None) != (linears[1].bias is None):
        return "only one of its linear layers has a bias"
    other = [
        m for m in leaves if not isinstance(m, torch.nn.Linear | torch.nn.GELU | torch.nn.Dropout | torch.nn.Identity)
    ]
    if other:
        return f"{type(module).__name__} also has {type(other[0]).__name__}; a block is linear, GELU, linear"
    return linears


def _made(
    match: _Match, rule: Any, keep: bool, tokens: int, seed: int, notes: list[str]
) -> tuple[torch.nn.Module, Swapped]:
    """The compiled module for a match, and the figures of both."""
    name = match.names[0]
    weight = match.linears[0].weight
    error = None
    try:
        planned = plan(declare(_declaration(match, rule)), tokens=tokens)
        if keep:
            made = from_linear(match.linears[0], **_kept(match, rule), tokens=tokens, seed=seed)
            planned, module, error = made.plan, made.module, made.error
        else:
            module = build(planned, device=weight.device, dtype=weight.dtype)
    except TnmoeError as fault:
        raise DeclarationError(f"{name}: {fault}") from None
    module.train(match.module.training)
    notes += _changes(match)
    return module, Swapped(name, _original(match, tokens), cost(planned), error)


def _declaration(match: _Match, rule: Any) -> dict[str, Any]:
    """The rule as a whole declaration, widths and bias filled in from the module."""
    widths = match.widths
    if isinstance(rule, AnyFactorization):
        rule = {"kind": FactorizedLinear.kind, "factorization": rule}
    given = rule.declaration() if hasattr(rule, "declaration") else rule
    if not isinstance(given, Mapping) or "kind" not in given:
        raise DeclarationError(
            f'a rule is a factorization or a declaration such as {{"kind": "mumoe", "experts": 8, …}}, got {rule!r}'
        )
    whole = {k: v.declaration() if is_dataclass(v) and hasattr(v, "declaration") else v for k, v in given.items()}
    is_block = "block" in str(whole["kind"]) or whole["kind"] == MLP.kind
    if is_block != ("hidden" in widths):
        shown = "two linear layers with a GELU between" if is_block else "one linear layer"
        raise DeclarationError(
            f"kind {whole['kind']!r} takes the place of {shown}, this is {type(match.module).__name__}"
        )
    for key, value in widths.items():
        if whole.setdefault(key, value) != value:
            raise DeclarationError(f"{key} is {whole[key]} in the declaration and {value} in the module")
    return {"bias": match.bias, **whole}


def _kept(match: _Match, rule: Any) -> dict[str, Any]:
    """Arguments of `from_linear`."""
    if len(match.linears) != 1:
        raise DeclarationError("keep_weights goes with linear layers; a block has a nonlinearity between its weights")
    if isinstance(rule, AnyFactorization):
        return {"factorization": rule}
    if not isinstance(rule, Mapping) or not isinstance(rule.get("factorization"), AnyFactorization):
        raise DeclarationError(
            "keep_weights takes a factorization, or a mapping that has one as an object, e.g. CP(64)"
        )
    allowed = ("kind", "factorization", "experts", "gate")
    if other := [key for key in rule if key not in allowed]:
        raise DeclarationError(f"keep_weights leaves {other[0]!r} to the module; allowed: {', '.join(allowed)}")
    return {key: value for key, value in rule.items() if key != "kind"}


def _original(match: _Match, tokens: int) -> CostReport:
    """The cost of what stood there."""
    first, last = match.linears[0], match.linears[-1]
    if len(match.linears) == 2:
        return cost(MLP(first.in_features, first.out_features, last.out_features, match.bias), tokens=tokens)
    return cost(Linear(first.in_features, first.out_features, match.bias), tokens=tokens)


def _changes(match: _Match) -> list[str]:
    """What changes besides the factorization."""
    import torch

    changes = []
    for m in match.module.modules():
        if isinstance(m, torch.nn.Dropout) and m.p > 0:
            changes.append(f"{match.names[0]}: its dropout (p = {m.p}) is gone.")
        if isinstance(m, torch.nn.GELU) and m.approximate != "none":
            changes.append(f"{match.names[0]}: GELU by {m.approximate} became the exact one.")
    if len(match.names) > 1:
        changes.append(f"{match.names[0]} is shared: {', '.join(match.names[1:])} got the same module.")
    return changes


def _leave_fast_paths(model: torch.nn.Module, names: list[str], notes: list[str]) -> None:
    """Keep torch's encoders from reading `linear1.weight` themselves, which they do in evaluation.

    A layer asks `activation_relu_or_gelu` before it takes that path, its encoder `use_nested_tensor`.
    """
    import torch

    parents = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in ("linear1", "linear2")}
    layers = [m for m in map(model.get_submodule, sorted(parents)) if isinstance(m, torch.nn.TransformerEncoderLayer)]
    for layer in layers:
        layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, torch.nn.TransformerEncoder) and any(m in layers for m in encoder.layers):
            encoder.use_nested_tensor = False
    if layers:
        notes.append(f"{len(layers)} nn.TransformerEncoderLayer(s) no longer take the fused path, which reads weights.")
