"""A layer evaluated straight from its declaration: no plan, no lowering, no passes. Slow, and that is the point.

Every network is one `numpy.einsum` over all its tensors. A folded bias is what its definition says: a column of
ones beside the data and one more slice of the weight. Where the whole weight tensor fits, it is formed first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tnmoe.backends.numpy.arrays import Array
from tnmoe.backends.numpy.execute import run_op
from tnmoe.ir.layer import Contraction, Layer
from tnmoe.ir.network import Network, Tensor
from tnmoe.ir.value import Role
from tnmoe.symbolic.dims import Dim, symbol_names
from tnmoe.symbolic.dims import evaluate as evaluate_dim

MAX_DENSE = 1 << 24
"""Elements of a weight tensor that is still formed (128 MiB in float64)."""


def evaluate(
    layer: Layer, env: Mapping[str, Array], *, training: bool = False, sizes: Mapping[str, Dim] | None = None
) -> tuple[Array, bool]:
    """The layer's output, with axes in the order of `layer.output`.

    Args:
        layer: before planning.
        env: float64 arrays of inputs, parameters and buffers, with axes in the canonical order of the layer.
        training: batch norms use the batch's statistics.
        sizes: integers by index, for what the declaration left open.

    Returns:
        The output, and whether every weight tensor was formed densely.
    """
    values = dict(env)
    dense = True
    for node in layer.nodes:
        if isinstance(node, Contraction):
            values[node.out.name], formed = _contract(node.network, values)
            dense = dense and formed
        else:
            run_op(node, values, sizes or _declared(layer), training)
    return values[layer.output.name], dense


def _declared(layer: Layer) -> dict[str, Dim]:
    """The sizes that the declaration fixes."""
    known = frozenset(layer.values)
    return {i: evaluate_dim(d, layer.values) for i, d in layer.sizes.items() if symbol_names([d]) <= known}


def _contract(network: Network, env: Mapping[str, Array]) -> tuple[Array, bool]:
    arrays = {t.name: env[t.name] for t in network.tensors}
    bias = network.bias
    if bias is not None:
        data, weight = network.tensor(bias.data), network.tensor(bias.weight)
        column = data.indices.index(bias.index)
        ones = np.ones([1 if k == column else n for k, n in enumerate(arrays[data.name].shape)])
        arrays[data.name] = np.concatenate([arrays[data.name], ones], column)
        row = weight.indices.index(bias.index)
        extra = np.expand_dims(env[bias.tensor.name], row)
        arrays[weight.name] = np.concatenate([arrays[weight.name], extra], row)

    weights = [t for t in network.tensors if t.role is not Role.DATA]
    others = [t for t in network.tensors if t.role is Role.DATA]
    needed = set(network.output).union(*(t.indices for t in others))
    open_indices = tuple(dict.fromkeys(i for t in weights for i in t.indices if i in needed))
    sizes = {i: n for t in network.tensors for i, n in zip(t.indices, arrays[t.name].shape, strict=True)}
    if weights and math.prod(sizes[i] for i in open_indices) <= MAX_DENSE:
        whole = _einsum(weights, open_indices, arrays)
        tensors = [*others, Tensor("whole", open_indices)]
        return _einsum(tensors, network.output, {**arrays, "whole": whole}), True
    return _einsum(network.tensors, network.output, arrays), False


def _einsum(tensors: list[Tensor] | tuple[Tensor, ...], output: tuple[str, ...], arrays: Mapping[str, Array]) -> Array:
    letter = {i: k for k, i in enumerate(dict.fromkeys(i for t in tensors for i in t.indices))}
    operands = [a for t in tensors for a in (arrays[t.name], [letter[i] for i in t.indices])]
    return np.asarray(np.einsum(*operands, [letter[i] for i in output], optimize="greedy"))
