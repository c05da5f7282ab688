"""The reference semantics: what every op computes, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
import sympy
from numpy.typing import NDArray

from tnmoe.backends.numpy.routing import run_routing
from tnmoe.errors import ProgramError
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    merged_order,
    split_order,
)
from tnmoe.ir.fused_ops import FusedOp, unfused
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim, evaluate

Array = NDArray[Any]

_EPSILON = 1e-5  # torch's default for its norms
_erf = np.vectorize(math.erf, otypes=[float])


def execute(program: Program, env: Mapping[str, Array], *, training: bool = False) -> dict[str, Array]:
    """Run a program.

    Args:
        program: any verified program; sizes are taken from the arrays (numbers of slots from the program).
        env: an array for every input, parameter and buffer, with axes in the order of its indices.
        training: batch norms use the batch's statistics (running statistics are never updated here).

    Returns:
        Every value by name, the output among them.

    Raises:
        ProgramError: if an array is missing, or two axes of one index differ in size.
    """
    sizes: dict[str, tuple[int, str]] = {}
    values: dict[str, Array] = {}
    for leaf in program.leaves:
        if leaf.name not in env:
            raise ProgramError(f"no array for {leaf.name!r} with axes {leaf.indices}")
        array = np.asarray(env[leaf.name])
        if array.ndim != len(leaf.indices):
            raise ProgramError(f"{leaf.name!r} has {array.ndim} axes, expected {leaf.indices}")
        for index, size in zip(leaf.indices, array.shape, strict=True):
            known, holder = sizes.setdefault(index, (size, leaf.name))
            if size != known:
                raise ProgramError(f"axis {index!r} has size {known} in {holder} but {size} in {leaf.name}")
        values[leaf.name] = array
    declared = _declared(program, {index: size for index, (size, _) in sizes.items()})
    for op in program.ops + program.diagnostics:
        run_op(op, values, declared, training)
    return values


def _declared(program: Program, known: Mapping[str, int]) -> dict[str, Dim]:
    """The size of each index, at the sizes of the arrays."""
    data = {
        s: sympy.Integer(known[i])
        for i, d in program.lengths.items()
        if i in known and isinstance(s := d, sympy.Symbol)
    }
    lengths = {i: sympy.sympify(d).xreplace(data) for i, d in program.lengths.items()}
    whole = {i: int(d) for i, d in lengths.items() if d.is_Integer}
    return {**program.sizes, **whole, **known}


def run_op(op: Op, env: dict[str, Array], declared: Mapping[str, Dim], training: bool) -> None:
    """Add what `op` computes to `env`; `declared` gives the sizes that no operand tells: slots, parts of an axis."""
    out = op.out

    def get(value: Value) -> Array:
        return env[value.name]

    def einsum(*factors: Value, to: tuple[str, ...] = out.indices) -> Array:
        letter = {i: k for k, i in enumerate(dict.fromkeys(i for v in factors for i in v.indices))}
        operands = [a for v in factors for a in (get(v), [letter[i] for i in v.indices])]
        return np.asarray(np.einsum(*operands, [letter[i] for i in to]))

    def spread(value: Value) -> Array:
        """`value` with an axis (of size 1 where it lacks it) for each index of the result."""
        array = np.transpose(get(value), [value.indices.index(i) for i in out.indices if i in value.indices])
        return array[tuple(slice(None) if i in value.indices else None for i in out.indices)]

    match op:
        case Contract(_, lhs, rhs) | Multiply(_, lhs, rhs):
            env[out.name] = einsum(lhs, rhs)
        case ContractAdd(_, lhs, rhs, bias):
            env[out.name] = einsum(lhs, rhs) + spread(bias)
        case Add(_, lhs, rhs):
            env[out.name] = spread(lhs) + spread(rhs)
        case Reduce(_, x) | Permute(_, x):
            env[out.name] = einsum(x)
        case Split(_, x, index, parts, padded):
            axis = x.indices.index(index)
            shape = [evaluate(declared[p], {}) for p in parts]
            surplus = math.prod(shape) - get(x).shape[axis] if padded else 0
            full = np.pad(get(x), [(0, surplus if k == axis else 0) for k in range(len(x.indices))])
            full = full.reshape(*full.shape[:axis], *shape, *full.shape[axis + 1 :])
            found = split_order(x.indices, op)
            env[out.name] = full.transpose([found.index(i) for i in out.indices])
        case Merge(_, x, index, parts, padded):
            found = split_order(merged_order(x.indices, op), op)
            axis = found.index(parts[0])
            full = get(x).transpose([x.indices.index(i) for i in found])
            full = full.reshape(
                *full.shape[:axis], math.prod(full.shape[axis : axis + len(parts)]), *full.shape[axis + len(parts) :]
            )
            full = full.take(range(evaluate(declared[index], {})), axis) if padded else full
            merged = merged_order(x.indices, op)
            env[out.name] = full.transpose([merged.index(i) for i in out.indices])
        case Softmax(_, x, index):
            z = get(x) - get(x).max(x.indices.index(index), keepdims=True)
            env[out.name] = np.exp(z) / np.exp(z).sum(x.indices.index(index), keepdims=True)
        case Entmax15(_, x, index):
            env[out.name] = _along(_entmax15, get(x), x.indices.index(index))
        case Sparsemax(_, x, index):
            env[out.name] = _along(_sparsemax, get(x), x.indices.index(index))
        case Sigmoid(_, x):
            env[out.name] = 1 / (1 + np.exp(-get(x)))
        case Gelu(_, x):
            env[out.name] = get(x) * 0.5 * (1 + _erf(get(x) / math.sqrt(2)))
        case GeluBackward(_, grad, x):
            density = np.exp(-(get(x) ** 2) / 2) / math.sqrt(2 * math.pi)
            env[out.name] = get(grad) * (0.5 * (1 + _erf(get(x) / math.sqrt(2))) + get(x) * density)
        case LayerNorm(_, x, index, weight, shift):
            axis = x.indices.index(index)
            mean, var = get(x).mean(axis, keepdims=True), get(x).var(axis, keepdims=True)
            normal = (get(x) - mean) / np.sqrt(var + _EPSILON)
            normal = normal * spread(weight) if weight else normal
            env[out.name] = normal + spread(shift) if shift else normal
        case BatchNorm(_, x, index, mean_value, var_value):
            axes = tuple(k for k, i in enumerate(x.indices) if i != index)
            mean, var = spread(mean_value), spread(var_value)
            if training and get(x).size > get(x).shape[x.indices.index(index)]:
                mean, var = get(x).mean(axes, keepdims=True), get(x).var(axes, keepdims=True)
            env[out.name] = (get(x) - mean) / np.sqrt(var + _EPSILON)
        case _ if isinstance(op, FusedOp):
            inside = {v.name: get(v) for v in operands(op)}
            for part in unfused(op):
                run_op(part, inside, declared, training)
            env[out.name] = inside[out.name]
        case _ if isinstance(op, RoutingOp):
            run_routing(op, env, declared, training)
        case _:
            assert_never(op)


def _along(function: Any, array: Array, axis: int) -> Array:
    """Apply a function of rows along `axis`."""
    if array.size == 0:
        return array
    return np.asarray(np.apply_along_axis(function, axis, array))


def _entmax15(x: Array) -> Array:
    """max(x/2 - τ, 0)², Σ = 1, by trying every size of the support (arXiv 1905.05702, algorithm 2)."""
    z = (x - x.max()) / 2
    ordered = np.sort(z)[::-1]
    best = None
    for k in range(1, len(z) + 1):
        mean, square = ordered[:k].mean(), (ordered[:k] ** 2).mean()
        tau = mean - math.sqrt(max(0.0, (1 - k * (square - mean**2)) / k))
        if tau <= ordered[k - 1]:
            best = tau
    return np.full_like(z, np.nan) if best is None else np.maximum(z - best, 0) ** 2


def _sparsemax(x: Array) -> Array:
    """max(x - τ, 0), Σ = 1, by trying every size of the support (arXiv 1602.02068, algorithm 1)."""
    z = x - x.max()
    ordered = np.sort(z)[::-1]
    best = None
    for k in range(1, len(z) + 1):
        tau = (ordered[:k].sum() - 1) / k
        if ordered[k - 1] > tau:
            best = tau
    return np.full_like(z, np.nan) if best is None else np.maximum(z - best, 0)
