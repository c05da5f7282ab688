"""μMoE layers straight from the paper's formulas (arXiv 2402.12550), dense and slow, in differentiable torch.

Nothing is taken from the package but a plan's storage order. W̃ is formed whole, with the bias as one more row of
the input mode, and meets x̃ = (x, 1) in one einsum; gates, norms and GELU are written out.
"""

import math
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


def canonical_axes(spec: Spec) -> dict[str, Axes]:
    """The axes of every parameter as the papers write them, by name."""
    levels = _levels(spec)
    experts = tuple(n for _, n in levels)
    found: dict[str, Axes] = {f"gate_projection{s}": ("i", n) for s, n in levels}
    if spec.input_norm:
        found |= {"norm_weight": ("i",), "norm_bias": ("i",)}
    for prefix, i, o in _maps(spec):
        bias: tuple[str, Axes]
        match spec.factorization:
            case tnmoe.CP():
                own = {f"expert_factor{s}": (n, "r") for s, n in levels}
                own |= {"input_factor": (i, "r"), "output_factor": (o, "r")}
                bias = "input_bias", ("r",)
            case tnmoe.TensorRing():
                r = [f"r{k + 1}" for k in range(len(levels) + 2)]
                own = {f"expert_core{s}": (r[e], n, r[e + 1]) for e, (s, n) in enumerate(levels)}
                own |= {"input_core": (r[-2], i, r[-1]), "output_core": (r[-1], o, r[0])}
                bias = "input_bias", (r[-2], r[-1])
            case _:
                own = {"weight": (*experts, i, o)}
                bias = "bias", (*experts, o)
        found |= {prefix + name: axes for name, axes in own.items()}
        if spec.bias:
            found[prefix + bias[0]] = bias[1]
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
    made = {"cp": tnmoe.CP, "tensor_ring": tnmoe.TensorRing, "dense": tnmoe.Dense}[factorization.pop("kind")]
    return kind(**d | {"factorization": made(**factorization), "gate": tnmoe.Gate(**d["gate"])})


def whole_weight(spec: Spec, weights: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """W̃[n1…nE, i, o]; with a bias the input mode has one more entry, the last."""
    levels = _levels(spec)
    n = "abcd"[: len(levels)]

    def with_bias(factor: Tensor, axis: int, bias: str) -> Tensor:
        return torch.cat([factor, weights[prefix + bias].unsqueeze(axis)], axis) if spec.bias else factor

    match spec.factorization:
        case tnmoe.CP():
            factors = [weights[f"{prefix}expert_factor{s}"] for s, _ in levels]
            factors.append(with_bias(weights[prefix + "input_factor"], 0, "input_bias"))
            factors.append(weights[prefix + "output_factor"])
            terms = [f"{mode}r" for mode in n + "io"]
        case tnmoe.TensorRing():
            factors = [weights[f"{prefix}expert_core{s}"] for s, _ in levels]
            factors.append(with_bias(weights[prefix + "input_core"], 1, "input_bias"))
            factors.append(weights[prefix + "output_core"])
            bonds = "uvwxyz"[: len(levels) + 2]
            terms = [f"{bonds[k]}{mode}{bonds[(k + 1) % len(bonds)]}" for k, mode in enumerate(n + "io")]
        case _:
            return with_bias(weights[prefix + "weight"], len(levels), "bias")
    return torch.einsum(f"{','.join(terms)}->{n}io", *factors)


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
