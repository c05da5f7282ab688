"""Ranks beyond which a factorization cannot express more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from tnmoe.layer import Contraction, Layer
from tnmoe.network import Role


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
