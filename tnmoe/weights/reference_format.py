"""State dicts of the μMoE reference implementation (`james-oldfield/muMoE`), converted to and from ours.

The reference keeps every factor in one canonical layout, with the bias as the last row of the input factor:
CP `N_e × R`, `(I+1) × R`, `O × R`; tensor ring `r_e × N_e × r_{e+1}`, `r × (I+1) × r'`, `r' × O × r_1`. Ours stores
factors as the matrix products want them and the bias by itself. Values are copied, never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnmoe.backends.torch.names import attribute
from tnmoe.errors import DeclarationError
from tnmoe.ir.layer import Contraction, Layer
from tnmoe.ir.network import FoldedBias
from tnmoe.ir.program import Program
from tnmoe.ir.value import Role
from tnmoe.planning.plan import Plan
from tnmoe.symbolic.dims import Dim

KINDS = ("mumoe", "mumoe_block")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the reference and the stored value (with its bias) that it holds."""

    key: str
    name: str
    bias: FoldedBias | None = None


def _entries(layer: Layer) -> list[_Entry]:
    declaration = layer.declaration
    kind, factorization = declaration.get("kind"), declaration.get("factorization", {}).get("kind")
    if declaration.get("factorization", {}).get("order"):
        raise DeclarationError("the reference has its rings in the order experts, input, output alone")
    if kind not in KINDS or factorization not in ("cp", "tensor_ring"):
        raise DeclarationError(f"the reference has CP and tensor-ring μMoE layers, not {kind!r} with {factorization!r}")
    levels = len(layer.coefficients)
    suffix = [""] if levels == 1 else [f"_{e + 1}" for e in range(levels)]
    entries = [_Entry(f"projs.{e}", f"gate_projection{s}") for e, s in enumerate(suffix)]
    if declaration["gate"]["norm"] == "batch":
        for e, s in enumerate(suffix):
            entries += [_Entry(f"bn.{e}.running_{stat}", f"gate_running_{stat}{s}") for stat in ("mean", "var")]
    if declaration.get("input_norm"):
        entries += [_Entry(f"input_ln.{k}", f"norm_{k}") for k in ("weight", "bias")]
    experts = [n for n in layer.nodes if isinstance(n, Contraction) and n.expert_map is not None]
    for prefix, node in zip(("MuMoE", "MuMoE2"), experts, strict=False):
        bias = node.network.bias
        weights = [t for t in node.network.tensors if t.role is not Role.DATA]
        for k, t in enumerate(weights):
            folded = bias if bias is not None and bias.weight == t.name else None
            entries.append(_Entry(f"{prefix}.factors.{k}", t.name, folded))
    return entries


def from_reference(planned: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `build(planned)` from one of the μMoE reference implementation.

    Args:
        planned: the plan that the module was emitted from.
        state: `reference_module.state_dict()`.

    Raises:
        DeclarationError: a missing or unknown key, or a shape that does not fit, with the axis named.
    """
    layer, program, sizes = planned.layer, planned.program, planned.bound.sizes
    entries = _entries(layer)
    ignored = {f"bn.{e}.num_batches_tracked" for e in range(len(layer.coefficients))}
    _check_keys("reference state dict", state, {e.key for e in entries}, ignored)
    canonical, stored = _orders(layer, program)
    result: dict[str, Tensor] = {}
    for entry in entries:
        tensor, indices = state[entry.key], canonical[entry.name]
        _check_shape(entry.key, tensor, indices, sizes, entry.bias)
        if entry.bias is not None:
            axis = indices.index(entry.bias.index)
            size = tensor.shape[axis] - 1
            name = entry.bias.tensor.name
            extra = tensor.select(axis, size)
            result[attribute(name)] = _ordered(extra, entry.bias.tensor.indices, stored[name])
            tensor = tensor.narrow(axis, 0, size)
        result[attribute(entry.name)] = _ordered(tensor, indices, stored[entry.name])
    return result


def to_reference(planned: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for the μMoE reference implementation from one of `build(planned)`; the inverse of `from_reference`.

    Raises:
        DeclarationError: a missing or unknown key, or a shape that does not fit, with the axis named.
    """
    layer, program, sizes = planned.layer, planned.program, planned.bound.sizes
    entries = _entries(layer)
    names = [n for e in entries for n in (e.name, *([e.bias.tensor.name] if e.bias else []))]
    _check_keys("state dict", state, {attribute(n) for n in names}, set())
    canonical, stored = _orders(layer, program)
    result: dict[str, Tensor] = {}
    for entry in entries:
        tensor, indices = state[attribute(entry.name)], canonical[entry.name]
        _check_shape(attribute(entry.name), tensor, stored[entry.name], sizes)
        tensor = _ordered(tensor, stored[entry.name], indices)
        if entry.bias is not None:
            axis = indices.index(entry.bias.index)
            name = entry.bias.tensor.name
            extra = state[attribute(name)]
            _check_shape(attribute(name), extra, stored[name], sizes)
            extra = _ordered(extra, stored[name], entry.bias.tensor.indices)
            tensor = torch.cat([tensor, extra.unsqueeze(axis)], axis)
        result[entry.key] = tensor
    if layer.declaration["gate"]["norm"] == "batch":
        for e in range(len(layer.coefficients)):
            result[f"bn.{e}.num_batches_tracked"] = torch.tensor(0)
    return result


def _orders(layer: Layer, program: Program) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Index orders by name: as declared (the reference's), and as stored."""
    canonical = {p.name: p.indices for p in layer.parameters + layer.buffers}
    return canonical, {p.name: p.indices for p in program.parameters + program.buffers}


def _check_keys(what: str, state: Mapping[str, Tensor], expected: set[str], ignored: set[str]) -> None:
    remedy = "check bias, levels, layers, gate.norm and input_norm against how the module was made"
    for key in sorted(set(state) - expected - ignored):
        raise DeclarationError(f"the {what} has {key!r}, which this layer lacks; {remedy}")
    for key in sorted(expected - set(state)):
        raise DeclarationError(f"the {what} lacks {key!r}; {remedy}")


def _ordered(tensor: Tensor, given: tuple[str, ...], wanted: tuple[str, ...]) -> Tensor:
    return tensor.permute([given.index(i) for i in wanted]).clone(memory_format=torch.contiguous_format)


def _check_shape(
    key: str, tensor: Tensor, indices: tuple[str, ...], sizes: Mapping[str, Dim], bias: FoldedBias | None = None
) -> None:
    expected = tuple(int(sizes[i]) + (bias is not None and bias.index == i) for i in indices)
    if tuple(tensor.shape) == expected:
        return
    where = f"{key} has shape {tuple(tensor.shape)}, expected {expected} with axes ({', '.join(indices)})"
    if tensor.ndim == len(expected):
        axis = next(k for k, (a, b) in enumerate(zip(tensor.shape, expected, strict=True)) if a != b)
        got, want = tensor.shape[axis], expected[axis]
        where += f": axis {indices[axis]!r} has size {got}, not {want}"
        if bias is not None and indices[axis] == bias.index and got == want - 1:
            where += "; this layer folds its bias into one more row: declare bias=False if the reference has none"
        elif indices[axis] in ("i", "h") and "factors" in key and bias is None and got == want + 1:
            where += "; the reference folds a bias into one more row: declare bias=True"
    raise DeclarationError(where)
