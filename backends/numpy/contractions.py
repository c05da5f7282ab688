"""What contractions, sums and changes of axes compute."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tnmoe.backends.numpy.arrays import Array, spread
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    ContractionOp,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    merged_order,
    split_order,
)
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim, evaluate


def run_contraction(op: ContractionOp, env: Mapping[str, Array], declared: Mapping[str, Dim]) -> Array:
    """The result of an op; `declared` gives the sizes that no operand tells: parts of an axis."""
    out = op.out
    match op:
        case Contract(_, lhs, rhs) | Multiply(_, lhs, rhs):
            return _einsum(env, out, lhs, rhs)
        case ContractAdd(_, lhs, rhs, bias):
            return _einsum(env, out, lhs, rhs) + spread(env, bias, out)
        case Add(_, lhs, rhs):
            return spread(env, lhs, out) + spread(env, rhs, out)
        case Reduce(_, x) | Permute(_, x):
            return _einsum(env, out, x)
        case Split(_, x, index, parts, padded):
            axis = x.indices.index(index)
            shape = [evaluate(declared[p], {}) for p in parts]
            surplus = math.prod(shape) - env[x.name].shape[axis] if padded else 0
            full = np.pad(env[x.name], [(0, surplus if k == axis else 0) for k in range(len(x.indices))])
            full = full.reshape(*full.shape[:axis], *shape, *full.shape[axis + 1 :])
            order = split_order(x.indices, op)
            return full.transpose([order.index(i) for i in out.indices])
        case Merge(_, x, index, parts, padded):
            order = split_order(merged_order(x.indices, op), op)
            axis = order.index(parts[0])
            full = env[x.name].transpose([x.indices.index(i) for i in order])
            full = full.reshape(
                *full.shape[:axis], math.prod(full.shape[axis : axis + len(parts)]), *full.shape[axis + len(parts) :]
            )
            full = full.take(range(evaluate(declared[index], {})), axis) if padded else full
            merged = merged_order(x.indices, op)
            return full.transpose([merged.index(i) for i in out.indices])
        case _:
            no_rule(op, "what it computes")


def _einsum(env: Mapping[str, Array], out: Value, *factors: Value) -> Array:
    letter = {i: k for k, i in enumerate(dict.fromkeys(i for v in factors for i in v.indices))}
    arguments = [a for v in factors for a in (env[v.name], [letter[i] for i in v.indices])]
    return np.asarray(np.einsum(*arguments, [letter[i] for i in out.indices]))
