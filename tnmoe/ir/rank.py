"""The maximal rank of an expert's matrix, by minimal cuts.

With the expert indices fixed, the rank of the matrix between the input and the output index of a tensor network
is at most the product of the index sizes across any cut that separates the two, an index shared by several
tensors counting once; for generic weights the smallest such product is reached (with rare exceptions: sums of
Kronecker products, and axes split with padding). The same bound holds for a
mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import sympy

from tnmoe.errors import CostError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.layer import Contraction, ExpertMap, Layer
from tnmoe.ir.network import Network
from tnmoe.ir.routing_ops import Gather, GroupedContract
from tnmoe.ir.value import Role
from tnmoe.symbolic.dims import Dim

MAX_WEIGHTS = 20
"""Cuts are enumerated, 2ⁿ of them."""


def max_expert_rank(network: Network, expert_map: ExpertMap, sizes: Mapping[str, Dim]) -> Dim:
    """The largest rank that one expert's matrix can have (folded biases left aside).

    Args:
        network: data tensors are ignored.
        expert_map: the matrix's indices, and the expert indices that are fixed.
        sizes: integers give an integer; symbols give a `Min` of products.

    Raises:
        CostError: more than 20 weights.
    """
    weights = [t for t in network.tensors if t.role is not Role.DATA]
    return _smallest([t.indices for t in weights], expert_map, sizes)


def layer_rank(layer: Layer, sizes: Mapping[str, Dim]) -> Dim:
    """The smallest maximal expert rank among the linear maps of a layer; 0 if it has none."""
    stored = {p.name for p in layer.parameters}
    chosen = {n.out.name: n.x.indices for n in layer.nodes if isinstance(n, Gather) and n.x.name in stored}
    ranks: list[Dim] = []
    for node in layer.nodes:
        if isinstance(node, Contraction) and node.expert_map is not None:
            weights = [
                chosen.get(t.name, t.indices)
                for t in node.network.tensors
                if t.role is not Role.DATA or t.name in chosen
            ]
            ranks.append(_smallest(weights, node.expert_map, sizes))
        elif isinstance(node, GroupedContract):
            n, i, o = node.rhs.indices
            ranks.append(_smallest([node.rhs.indices], ExpertMap(i, o, (n,)), sizes))
    return _minimum(ranks) if ranks else 0


def _smallest(tensors: list[tuple[str, ...]], expert_map: ExpertMap, sizes: Mapping[str, Dim]) -> Dim:
    if len(tensors) > MAX_WEIGHTS:
        raise CostError(f"rank bounds enumerate cuts of up to {MAX_WEIGHTS} weights, this network has {len(tensors)}")
    open_indices = [frozenset(t) - frozenset(expert_map.experts) for t in tensors]
    cuts: set[frozenset[str]] = set()
    for side in range(1 << len(tensors)):
        near, far = (frozenset(expert_map.parts(i)) for i in (expert_map.input, expert_map.output))
        for k, indices in enumerate(open_indices):
            near, far = (near | indices, far) if side >> k & 1 else (near, far | indices)
        cuts.add(near & far)
    # Every size is at least 1, so a cut that contains another is never smaller.
    minimal = [c for c in cuts if not any(other < c for other in cuts)]
    padded = [sizes[s.index] for s in expert_map.splits if s.padded]  # the matrix is smaller than its parts
    return _minimum([elements(tuple(sorted(c)), sizes) for c in minimal] + padded)


def _minimum(candidates: list[Dim]) -> Dim:
    return min(candidates) if all(isinstance(c, int) for c in candidates) else sympy.Min(*candidates)


def excessive_ranks(layer: Layer, sizes: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each bond that is larger than useful.

    A bond joins tensors whose other axes have D1, D2, … entries (axes that all of them share left aside): the sum
    over it is a tensor of at most ΠD / max D terms, for two tensors min(D1, D2), the rank of a matrix.

    Args:
        layer: declared.
        sizes: an integer for every index.
    """
    for node in layer.contractions:
        if node.expert_map is not None:
            yield from _of_network(node, sizes)


def _of_network(node: Contraction, sizes: Mapping[str, int]) -> Iterator[str]:
    network, ends = node.network, node.expert_map
    assert ends is not None
    weights = [t for t in network.tensors if t.role is not Role.DATA]
    opened = {*ends.experts, *ends.parts(ends.input), *ends.parts(ends.output)}
    folded = None if network.bias is None else network.bias.index
    for bond in dict.fromkeys(i for t in weights for i in t.indices if i not in opened):
        holders = [t for t in weights if bond in t.indices]
        shared = set.intersection(*(set(t.indices) for t in holders))
        others = [prod(sizes[i] + (i == folded) for i in t.indices if i not in shared) for t in holders]
        useful = prod(others) // max(others)
        if sizes[bond] > useful:
            yield (
                f"bond {bond!r} of {node.out.name!r} has size {sizes[bond]}, but more than {useful} add parameters and "
                f"nothing else: it joins {', '.join(t.name for t in holders)}"
            )
