"""The maximal rank of an expert's matrix, by minimal cuts.

With the expert indices fixed, the rank of the matrix between the input and the output index of a tensor network
is at most the product of the index sizes across any cut that separates the two, an index shared by several
tensors counting once; for generic weights the smallest such product is reached (with rare exceptions: sums of
Kronecker products, and axes split with padding). The same bound holds for a
mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from tnmoe.cost import elements
from tnmoe.dims import Dim
from tnmoe.errors import CostError
from tnmoe.layer import Contraction, ExpertMap, Layer
from tnmoe.network import Network, Role
from tnmoe.routing_ops import Gather, GroupedContract

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
