"""Layers that start from existing weights: one linear map for every expert, or a stack of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tnmoe.backends.torch.names import attribute
from tnmoe.emission.build import build
from tnmoe.errors import DeclarationError
from tnmoe.ir.layer import Contraction, Layer
from tnmoe.ir.value import Role
from tnmoe.layers.factorized import FactorizedLinear
from tnmoe.layers.gate import Gate
from tnmoe.layers.mumoe import MuMoE
from tnmoe.layers.parts import with_values
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import DEFAULT_TOKENS
from tnmoe.render.table import Table
from tnmoe.symbolic.dims import as_dim
from tnmoe.weights.least_squares import Array, Factorized, contract, factorize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Converted:
    """A layer made from existing weights.

    Attributes:
        spec: its declaration.
        plan: its orders.
        module: live, with the weights in place.
        errors: ‖Wₙ - Ŵₙ‖ / ‖Wₙ‖ of each expert (in Frobenius norm, the bias as one more row), before any spread.
        error: the same of all experts at once.
    """

    spec: MuMoE | FactorizedLinear
    plan: Plan
    module: torch.nn.Module = field(repr=False)
    errors: tuple[float, ...]
    error: float

    def table(self) -> Table:
        """One row for each expert."""
        rows = tuple((str(k), f"{error:.2e}") for k, error in enumerate(self.errors))
        note = f"All experts at once: {self.error:.2e}. Frobenius norm, the bias as one more row."
        return Table(f"Relative errors of {self.spec}", (("expert", "expert"), ("error", "error")), rows, (note,))

    def __str__(self) -> str:
        return str(self.table())


@dataclass(frozen=True)
class CurvePoint:
    """One rank of an error curve."""

    rank: int
    parameters: int
    error: float


def from_linear(
    linear: torch.nn.Linear,
    factorization: Any,
    *,
    experts: int | Sequence[int] | None = None,
    gate: Gate | None = None,
    spread: float = 0.0,
    sweeps: int = 100,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
) -> Converted:
    """A factorized layer of which every expert starts as `linear`: exact where the ranks allow it.

    Gates start with equal shares, and mixing equal experts is the map itself, so the layer computes what `linear`
    did (for gates whose shares sum to one). Equal experts also get equal gradients: pass a `spread` to train them.

    Args:
        linear: the map; its bias is kept if there is one.
        factorization: of the new weight.
        experts: their number, or one for each level; None for a `FactorizedLinear`.
        gate: by default `Gate()`.
        spread: relative standard deviation of noise on every factor that has an expert index.
        sweeps: at most so many of alternating least squares, where the SVD alone is not the answer.
        tokens: rows to plan for.
        seed: of the random starts.

    Raises:
        DeclarationError: no linear layer, or ranks that do not fit.
    """
    import torch

    if not isinstance(linear, torch.nn.Linear):
        raise DeclarationError(f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}")
    weight = _array(linear.weight)
    bias = None if linear.bias is None else _array(linear.bias)
    if experts is None:
        spec: MuMoE | FactorizedLinear = FactorizedLinear(
            linear.in_features, linear.out_features, factorization, bias is not None
        )
        levels: tuple[int, ...] = ()
    else:
        given = tuple(experts) if isinstance(experts, Sequence) else (experts,)
        spec = MuMoE(linear.in_features, linear.out_features, given, factorization, gate or Gate(), bias is not None)
        levels = tuple(int(as_dim(n, "experts")) for n in given)
    once = np.broadcast_to(weight, (*(1 for _ in levels), *weight.shape))
    offset = None if bias is None else np.broadcast_to(bias, (*(1 for _ in levels), *bias.shape))
    return _convert(spec, once, offset, linear.weight, sweeps, tokens, seed, spread)


def from_experts(
    weights: torch.Tensor | Sequence[torch.nn.Linear],
    factorization: Any,
    *,
    biases: torch.Tensor | None = None,
    gate: Gate | None = None,
    sweeps: int = 100,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
) -> Converted:
    """A factorized layer whose experts come as close to given ones as the ranks allow.

    Args:
        weights: (N, O, I), or (N1, …, NE, O, I) for a hierarchy; or a list of linear layers of one shape.
        factorization: of the new weight.
        biases: (N, O); those of the linear layers by default.
        gate, sweeps, tokens, seed: as in `from_linear`.

    Raises:
        DeclarationError: shapes that do not fit, or weights that are not finite.
    """
    import torch

    if not isinstance(weights, torch.Tensor):
        layers = list(weights)
        if not layers or not all(isinstance(m, torch.nn.Linear) for m in layers):
            raise DeclarationError("from_experts takes a tensor (N, O, I) or a list of torch.nn.Linear")
        if len({(m.weight.shape, m.bias is None) for m in layers}) > 1:
            raise DeclarationError("the experts differ in shape, or only some of them have a bias")
        if layers[0].bias is not None and biases is None:
            biases = torch.stack([m.bias for m in layers])
        weights = torch.stack([m.weight for m in layers])
    if weights.ndim < 3:
        raise DeclarationError(f"experts must be (N, O, I), got shape {tuple(weights.shape)}")
    if biases is not None and biases.shape != weights.shape[:-1]:
        raise DeclarationError(f"biases must be {tuple(weights.shape[:-1])}, got {tuple(biases.shape)}")
    *levels, outputs, inputs = weights.shape
    spec = MuMoE(inputs, outputs, tuple(levels), factorization, gate or Gate(), biases is not None)
    offset = None if biases is None else _array(biases)
    return _convert(spec, _array(weights), offset, weights, sweeps, tokens, seed, 0.0)


def error_curve(
    weights: torch.Tensor,
    factorization: Any,
    ranks: Sequence[int],
    *,
    sweeps: int = 100,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """Relative error against rank, for a matrix (O, I) or experts (N, O, I).

    Args:
        weights: of one map or of a stack of experts.
        factorization: with one open symbol, e.g. `CP("R")` or `TensorRing((4, 4, "R"))`.
        ranks: its values.

    Raises:
        DeclarationError: not exactly one open symbol.
    """
    symbols = sorted({str(s) for d in factorization.dims() for s in getattr(d, "free_symbols", ())})
    if len(symbols) != 1:
        raise DeclarationError(
            f'error_curve needs one open symbol, e.g. CP("R"); {factorization} has {symbols or "none"}'
        )
    array = _array(weights)
    *levels, outputs, inputs = array.shape
    points = []
    for rank in ranks:
        chosen = with_values(factorization, {symbols[0]: rank})
        if levels:
            spec: MuMoE | FactorizedLinear = MuMoE(inputs, outputs, tuple(levels), chosen, Gate(), False)
        else:
            spec = FactorizedLinear(inputs, outputs, chosen, False)
        layer = spec.layer()
        solved = _Target(layer, array, None).solve(sweeps, seed)
        node = solved[0]
        sizes = layer.bound_sizes({layer.token_symbol: 1})
        stored = sum(
            int(np.prod([sizes[i] for i in t.indices])) for t in node.network.leaves if t.role is not Role.DATA
        )
        points.append(CurvePoint(rank, stored, solved[1].error))
    return tuple(points)


class _Target:
    """The weight tensor that a layer's network has to become, in the network's own axes."""

    def __init__(self, layer: Layer, weights: Array, biases: Array | None) -> None:
        (self.node,) = [n for n in layer.contractions if n.expert_map is not None]
        assert self.node.expert_map is not None
        self.map = self.node.expert_map
        self.sizes = layer.bound_sizes({layer.token_symbol: 1})
        self.sizes |= dict(zip(self.map.experts, weights.shape, strict=False))
        whole = np.swapaxes(weights, -1, -2)  # experts…, i, o
        self.folded = self.node.network.bias
        if self.folded is not None and biases is not None:
            whole = np.concatenate([whole, biases[..., None, :]], -2)
            self.sizes[self.map.input] += 1
        self.plain = whole
        ends = [self.map.parts(i) for i in (self.map.input, self.map.output)]
        full = [int(np.prod([self.sizes[p] for p in parts])) for parts in ends]
        surplus = [n - m for n, m in zip(full, whole.shape[-2:], strict=True)]
        padded = np.pad(whole, [(0, 0)] * len(self.map.experts) + [(0, s) for s in surplus])
        self.axes = (*self.map.experts, *ends[0], *ends[1])
        self.full = full
        self.array: Array = np.ascontiguousarray(padded.reshape([self.sizes[i] for i in self.axes]))
        self.factors = [t for t in self.node.network.tensors if t.role is not Role.DATA]

    def solve(self, sweeps: int, seed: int) -> tuple[Contraction, Factorized]:
        return self.node, factorize(self.factors, self.sizes, self.array, self.axes, sweeps=sweeps, seed=seed)

    def errors(self, solved: Factorized) -> tuple[tuple[float, ...], float]:
        """Relative errors of each expert, and of all, over the entries that the layer keeps."""
        made = contract(self.factors, solved.factors, self.axes)
        rows, cols = self.plain.shape[-2:]
        made = made.reshape(*made.shape[: len(self.map.experts)], *self.full)[..., :rows, :cols]
        lost = np.linalg.norm((made - self.plain).reshape(-1, rows * cols), axis=1)
        norms = np.linalg.norm(self.plain.reshape(-1, rows * cols), axis=1)
        each = tuple(float(e / n) if n else float(e) for e, n in zip(lost, norms, strict=True))
        return each, float(np.linalg.norm(lost) / (np.linalg.norm(norms) or 1))


def _convert(
    spec: MuMoE | FactorizedLinear,
    weights: Array,
    biases: Array | None,
    like: torch.Tensor,
    sweeps: int,
    tokens: int,
    seed: int,
    spread: float,
) -> Converted:
    """The layer with the factors of `weights` (experts…, O, I); levels of size 1 are repeated for all experts."""
    import torch

    if not np.isfinite(weights).all() or (biases is not None and not np.isfinite(biases).all()):
        raise DeclarationError("the weights hold infinite or undefined numbers")
    planned = plan(spec, tokens=tokens)
    layer = planned.layer
    target = _Target(layer, weights, biases)
    _, solved = target.solve(sweeps, seed)
    each, error = target.errors(solved)
    sizes = layer.bound_sizes(planned.values)
    arrays: dict[str, tuple[Array, tuple[str, ...]]] = {}
    for tensor in target.factors:
        array = solved.factors[tensor.name]
        if target.folded is not None and tensor.name == target.folded.weight:
            axis = tensor.indices.index(target.folded.index)
            array, extra = np.split(array, [sizes[target.folded.index]], axis)
            arrays[target.folded.tensor.name] = (extra.squeeze(axis), target.folded.tensor.indices)
        arrays[tensor.name] = (array, tensor.indices)
    if biases is not None and target.folded is None:
        arrays["bias"] = (biases, (*target.map.experts, target.map.output))
    rng = np.random.default_rng(seed)
    module = build(planned, dtype=like.dtype, device=like.device)
    state = module.state_dict()
    stored = {p.name: p.indices for p in planned.program.parameters}
    for name, (array, indices) in arrays.items():
        whole = np.broadcast_to(array, [sizes[i] for i in indices])
        if spread and set(indices) & set(target.map.experts):
            whole = whole * (1 + spread * rng.standard_normal(whole.shape))
        ordered = whole.transpose([indices.index(i) for i in stored[name]])
        state[attribute(name)] = torch.from_numpy(ordered.copy()).to(like)
    module.load_state_dict(state)
    count = int(np.prod([sizes[n] for n in target.map.experts]))
    return Converted(spec, planned, module, each if len(each) == max(count, 1) else each * count, error)


def _array(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.detach().double().cpu().numpy())


def stack_experts(tensors: Mapping[str, torch.Tensor], pattern: str) -> torch.Tensor:
    """The experts of a checkpoint as one (N, O, I) tensor.

    Args:
        tensors: of a checkpoint, by name.
        pattern: the names, with `{}` for the expert's number, e.g. `"layers.0.moe.experts.{}.w1.weight"`.

    Raises:
        DeclarationError: no tensor of that name.
    """
    import torch

    experts: list[torch.Tensor] = []
    while (name := pattern.replace("{}", str(len(experts)))) in tensors and "{}" in pattern:
        experts.append(tensors[name])
    if not experts:
        shown = ", ".join(sorted(tensors)[:5])
        raise DeclarationError(f"no tensor {pattern.replace('{}', '0')!r}; there are {shown}, …")
    return torch.stack(experts)
