"""μMoE layers straight from the paper's formulas (arXiv 2402.12550), dense and slow, in differentiable torch.

Nothing is taken from the package but a plan's storage order. W̃ is formed whole, with the bias as one more row of
the input mode, and meets x̃ = (x, 1) in one einsum; gates, norms and GELU are written out.
"""

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass

import entmax
import torch
from torch import Tensor, nn

import tnmoe

EPSILON = 1e-5
MOMENTUM = 0.1

Axes = tuple[str, ...]
Spec = tnmoe.MuMoE | tnmoe.MuMoEBlock


@dataclass(frozen=True)
class Result:
    """The output, the coefficients of each level, and the buffers after the call."""

    y: Tensor
    coefficients: tuple[Tensor, ...]
    buffers: dict[str, Tensor]


def _levels(spec: Spec) -> list[tuple[str, str]]:
    """Suffix and expert index of each level."""
    count = len(spec.levels)
    return [("", "n")] if count == 1 else [(f"_{e + 1}", f"n{e + 1}") for e in range(count)]


def _maps(spec: Spec) -> list[tuple[str, str, str]]:
    """Prefix, input index and output index of each weight tensor."""
    return [("", "i", "o")] if isinstance(spec, tnmoe.MuMoE) else [("up_", "i", "h"), ("down_", "h", "o")]


KINDS = {
    c.kind: c
    for c in (
        tnmoe.BlockTerm,
        tnmoe.CP,
        tnmoe.Custom,
        tnmoe.Dense,
        tnmoe.HierarchicalTucker,
        tnmoe.Kronecker,
        tnmoe.LowRank,
        tnmoe.Monarch,
        tnmoe.TensorRing,
        tnmoe.TensorTrain,
        tnmoe.Tucker,
    )
}


def factor_axes(spec: Spec, prefix: str, i: str, o: str) -> dict[str, Axes]:
    """The axes of the factors of one weight tensor as the papers write them, by name without the prefix."""
    levels = _levels(spec)
    experts = tuple(n for _, n in levels)
    modes = {n: (f"expert_{{}}{s}", n) for s, n in levels} | {"i": ("input_{}", i), "o": ("output_{}", o)}
    f = spec.factorization
    ranks = {mode: f"r_{mode}" for mode in modes}
    i1, i2, o1, o2 = _parts(i, o)
    match f:
        case tnmoe.CP():
            return {stem.format("factor"): (axis, "r") for stem, axis in modes.values()}
        case tnmoe.TensorRing():
            order = f.order or list(modes)
            at = {mode: (f"r{k + 1}", f"r{(k + 1) % len(order) + 1}") for k, mode in enumerate(order)}
            return {stem.format("core"): (at[m][0], axis, at[m][1]) for m, (stem, axis) in modes.items()}
        case tnmoe.TensorTrain():
            order = f.order or list(modes)
            bonds = [(), *((f"r{k + 1}",) for k in range(len(order) - 1)), ()]
            at = {mode: (bonds[k], bonds[k + 1]) for k, mode in enumerate(order)}
            return {stem.format("core"): (*at[m][0], axis, *at[m][1]) for m, (stem, axis) in modes.items()}
        case tnmoe.Tucker():
            leaves = {stem.format("factor"): (axis, ranks[m]) for m, (stem, axis) in modes.items()}
            return leaves | {"core": tuple(ranks.values())}
        case tnmoe.BlockTerm():
            leaves = {stem.format("factor"): ("p", axis, ranks[m]) for m, (stem, axis) in modes.items()}
            return leaves | {"core": ("p", *ranks.values())}
        case tnmoe.HierarchicalTucker():
            found = {stem.format("factor"): (axis, ranks[m]) for m, (stem, axis) in modes.items()}

            def bond(tree: object, root: bool = False) -> str:
                if isinstance(tree, str):
                    return ranks[tree]
                left, right = (bond(child) for child in tree)
                inner = sum("transfer" in name for name in found) + 1
                found["root" if root else f"transfer_{inner}"] = (left, right, *(() if root else (f"t{inner}",)))
                return f"t{inner}"

            bond(f.tree, root=True)
            return found
        case tnmoe.LowRank():
            return {"input_factor": (*experts, i, "r"), "output_factor": (*experts, "r", o)}
        case tnmoe.Kronecker():
            return {"left": (*experts, "s", i1, o1), "right": (*experts, "s", i2, o2)}
        case tnmoe.Monarch():
            return {"left": (*experts, i1, i2, o1, "r"), "right": (*experts, i1, o1, "r", o2)}
        case tnmoe.Custom():
            left, right = f.expression.split("->")
            data = [t for t in left.split(",") if right[0] in t]
            name = dict(zip("".join(d[1] for d in data), (*experts, i))) | {right[1]: o}
            terms = [t for t in left.split(",") if right[0] not in t]
            return {f"w_{t}": tuple(name.get(c, f"{c}_" if c in "tihon" else c) for c in t) for t in terms}
        case _:
            return {"weight": (*experts, i, o)}


def _parts(i: str, o: str) -> tuple[str, ...]:
    """Input and output axes in two parts each; those of a hidden input differ from those of the hidden output."""
    again = "_" if i == "h" else ""
    return f"{i}1{again}", f"{i}2{again}", f"{o}1", f"{o}2"


def bias_axes(spec: Spec, prefix: str, i: str, o: str) -> tuple[str, Axes, str]:
    """Name and axes of a bias, and of the factor that it is one more slice of ("" if it is added by itself)."""
    factors = factor_axes(spec, prefix, i, o)
    holders = [name for name, axes in factors.items() if i in axes]
    if len(holders) != 1:
        return "bias", (*(n for _, n in _levels(spec)), o), ""
    axes = factors[holders[0]]
    return "bias" if o in axes else "input_bias", tuple(a for a in axes if a != i), holders[0]


def canonical_axes(spec: Spec) -> dict[str, Axes]:
    """The axes of every parameter as the papers write them, by name."""
    found: dict[str, Axes] = {f"gate_projection{s}": ("i", n) for s, n in _levels(spec)}
    if spec.input_norm:
        found |= {"norm_weight": ("i",), "norm_bias": ("i",)}
    for prefix, i, o in _maps(spec):
        found |= {prefix + name: axes for name, axes in factor_axes(spec, prefix, i, o).items()}
        if spec.bias:
            name, axes, _ = bias_axes(spec, prefix, i, o)
            found[prefix + name] = axes
    return found


def leaves(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters that take gradients of their own, in the module's layout."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def canonical(plan: tnmoe.Plan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored parameters as views with canonical axes."""
    wanted = canonical_axes(plan_spec(plan))
    layout = {p.name: p.indices for p in plan.program.parameters}
    assert set(layout) == set(wanted) == set(stored), "the module's parameters are not those of the declaration"
    return {name: stored[name].permute([layout[name].index(a) for a in axes]) for name, axes in wanted.items()}


def plan_spec(plan: tnmoe.Plan) -> Spec:
    """The declaration that a plan was made from."""
    d = dict(plan.layer.declaration)
    kind = {"mumoe": tnmoe.MuMoE, "mumoe_block": tnmoe.MuMoEBlock}[d.pop("kind")]
    factorization = dict(d.pop("factorization"))
    made = KINDS[factorization.pop("kind")]
    return kind(**d | {"factorization": made(**factorization), "gate": tnmoe.Gate(**d["gate"])})


def whole_weight(spec: Spec, weights: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """W̃[n1…nE, i, o]; with a bias the input mode has one more entry, the last."""
    ((_, i, o),) = [m for m in _maps(spec) if m[0] == prefix]
    experts = tuple(n for _, n in _levels(spec))
    factors = factor_axes(spec, prefix, i, o)
    bias, _, holder = bias_axes(spec, prefix, i, o)
    arrays = {name: weights[prefix + name] for name in factors}
    if spec.bias and holder:
        axis = factors[holder].index(i)
        arrays[holder] = torch.cat([arrays[holder], weights[prefix + bias].unsqueeze(axis)], axis)
    known = {a for axes in factors.values() for a in axes}
    ends = [i, o] if i in known else list(_parts(i, o))
    letter = {a: string.ascii_letters[k] for k, a in enumerate(sorted(known))}

    def term(axes: Axes) -> str:
        return "".join(letter[a] for a in axes)

    expression = ",".join(term(axes) for axes in factors.values()) + "->" + term((*experts, *ends))
    whole = torch.einsum(expression, *arrays.values())
    if len(ends) == 4:  # both in two parts, perhaps with more entries than the axis
        widths = dict(zip("iho" if hasattr(spec, "hidden") else "io", _widths(spec)))
        whole = whole.flatten(-2).flatten(-3, -2)[..., : widths[i], : widths[o]]
    if spec.bias and not holder:
        whole = torch.cat([whole, weights[prefix + bias].unsqueeze(-2)], -2)
    return whole


def _widths(spec: Spec) -> tuple[int, ...]:
    return tuple(getattr(spec, key) for key in ("inputs", "hidden", "outputs") if hasattr(spec, key))


def mixture(spec: Spec, weights: Mapping[str, Tensor], prefix: str, x: Tensor, a: tuple[Tensor, ...]) -> Tensor:
    """y_o = Σ a¹_{n1} … a^E_{nE} x̃_i W̃_{n1…nE,i,o}, in one einsum."""
    if spec.bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    n = "abcd"[: len(a)]
    terms = ",".join(["ti", *(f"t{letter}" for letter in n)])
    return torch.einsum(f"{terms},{n}io->to", x, *a, whole_weight(spec, weights, prefix))


def evaluate(
    spec: Spec, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, *, training: bool
) -> Result:
    """The layer on x of shape (..., inputs); `weights` have canonical axes.

    A batch of one row has no variance: the running statistics are used for it, and are left alone.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    after = dict(buffers)
    gates = []
    for suffix, _ in _levels(spec):
        z = rows @ weights[f"gate_projection{suffix}"]
        if spec.gate.norm == "layer":
            z = _standardised(z, *_moments(z, 1))
        elif spec.gate.norm == "batch":
            mean, var = (f"gate_running_{s}{suffix}" for s in ("mean", "var"))
            if training and len(rows) > 1:
                after[mean] = ((1 - MOMENTUM) * buffers[mean] + MOMENTUM * z.mean(0)).detach()
                after[var] = ((1 - MOMENTUM) * buffers[var] + MOMENTUM * z.var(0, unbiased=True)).detach()
                z = _standardised(z, *_moments(z, 0))
            else:
                z = _standardised(z, buffers[mean], buffers[var])
        gates.append(_activation(spec.gate.activation, z))
    a = tuple(gates)
    if spec.input_norm:  # the gates above have read the input before it
        rows = _standardised(rows, *_moments(rows, 1)) * weights["norm_weight"] + weights["norm_bias"]
    if isinstance(spec, tnmoe.MuMoE):
        y = mixture(spec, weights, "", rows, a)
    else:
        hidden = mixture(spec, weights, "up_", rows, a)
        active = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        y = mixture(spec, weights, "down_", active, a)
    lead = x.shape[:-1]
    return Result(y.reshape(*lead, y.shape[1]), tuple(g.reshape(*lead, g.shape[1]) for g in a), after)


def _moments(z: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    mean = z.mean(axis, keepdim=True)
    return mean, (z - mean).square().mean(axis, keepdim=True)


def _standardised(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (z - mean) / torch.sqrt(var + EPSILON)


def _activation(name: str, z: Tensor) -> Tensor:
    if z.numel() == 0:  # the entmax package does not take an empty batch
        return z
    match name:
        case "entmax15":
            return entmax.entmax15(z, dim=-1)
        case "sparsemax":
            return entmax.sparsemax(z, dim=-1)
        case "softmax":
            e = torch.exp(z - z.max(1, keepdim=True).values.detach())
            return e / e.sum(1, keepdim=True)
        case _:
            return 1 / (1 + torch.exp(-z))


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill in values that no symmetry of the initialisation hides: no zero gates, no equal experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) + (name == "norm_weight"))
        for name, b in module.named_buffers():
            drawn = torch.rand(b.shape, generator=generator, dtype=torch.float64) + 0.5
            b.copy_(drawn if "var" in name else drawn - 1)
    return module
