"""What gates, GELU and norms compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnmoe.backends.numpy.arrays import Array, spread
from tnmoe.errors import no_rule
from tnmoe.ir.pointwise_ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    GeluBackward,
    LayerNorm,
    PointwiseOp,
    Sigmoid,
    Softmax,
    Sparsemax,
)

_EPSILON = 1e-5  # torch's default for its norms
_erf = np.vectorize(math.erf, otypes=[float])


def run_pointwise(op: PointwiseOp, env: Mapping[str, Array], *, training: bool) -> Array:
    """The result of an op; in training batch norms use the batch's statistics."""
    x = env[op.x.name]
    match op:
        case Softmax(_, _, index):
            z = x - x.max(op.x.indices.index(index), keepdims=True)
            return np.asarray(np.exp(z) / np.exp(z).sum(op.x.indices.index(index), keepdims=True))
        case Entmax15(_, _, index):
            return _along(_entmax15, x, op.x.indices.index(index))
        case Sparsemax(_, _, index):
            return _along(_sparsemax, x, op.x.indices.index(index))
        case Sigmoid():
            return np.asarray(1 / (1 + np.exp(-x)))
        case Gelu():
            return np.asarray(x * 0.5 * (1 + _erf(x / math.sqrt(2))))
        case GeluBackward(_, grad):
            density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
            return np.asarray(env[grad.name] * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density))
        case LayerNorm(_, _, index, weight, shift):
            axis = op.x.indices.index(index)
            mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
            normal = (x - mean) / np.sqrt(var + _EPSILON)
            normal = normal * spread(env, weight, op.out) if weight else normal
            return np.asarray(normal + spread(env, shift, op.out) if shift else normal)
        case BatchNorm(_, _, index, mean_value, var_value):
            axes = tuple(k for k, i in enumerate(op.x.indices) if i != index)
            mean, var = spread(env, mean_value, op.out), spread(env, var_value, op.out)
            if training and x.size > x.shape[op.x.indices.index(index)]:
                mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            return np.asarray((x - mean) / np.sqrt(var + _EPSILON))
        case _:
            no_rule(op, "what it computes")


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
