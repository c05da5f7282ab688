"""Seeded random networks for the tests, with arrays whose einsum is exact in float64.

Uniformly drawn networks rarely hold what planners and lowering get wrong, so every kind is drawn on purpose:
hyperedges, batch indices (in several tensors and in the output), private indices (of one tensor, summed alone),
scalars, parts that share no index, an output in any order, and indices of size 1.
"""

from __future__ import annotations

import random
from dataclasses import replace
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.ir.network import FoldedBias, Network, Tensor
from tnmoe.ir.value import Role

Sizes = dict[str, int]
Arrays = dict[str, NDArray[Any]]


def random_network(
    rng: random.Random, tensors: int, *, max_size: int = 9, connected: bool = False, most: int = 4
) -> tuple[Network, Sizes]:
    """A network of `tensors` tensors and the size of each of its indices.

    Args:
        rng: the source of all choices, so that a seed names a network.
        tensors: how many.
        max_size: of an index; sizes are 1 … max_size.
        connected: every tensor shares an index with an earlier one, and none is a scalar.
        most: indices of one tensor.
    """
    pool = rng.sample(ascii_lowercase, rng.randint(max(2, tensors // 2), tensors + 2))
    fresh = iter(ascii_uppercase)  # private, or kept by the output alone
    terms: list[list[str]] = []
    for k in range(tensors):
        if not connected and rng.random() < 0.04:
            terms.append([])
            continue
        count = rng.choice([n for n in (1, 2, 2, 3, 3, 4) if n <= min(most, len(pool))])
        term = rng.sample(pool, count)
        used = sorted({i for t in terms for i in t if i.islower()})
        if connected and k and not set(used) & set(term):
            term[0] = rng.choice(used)
        if len(term) < most and rng.random() < 0.25:
            term.insert(rng.randint(0, len(term)), next(fresh))
        terms.append(term)
    held = list(dict.fromkeys(i for term in terms for i in term))
    holders = {i: sum(i in term for term in terms) for i in held}
    output = [i for i in held if rng.random() < (0.3 if holders[i] > 1 else 0.5)]
    rng.shuffle(output)
    network = Network.parse(",".join("".join(t) for t in terms) + "->" + "".join(output))
    roles = [rng.choice([Role.DATA, Role.WEIGHT, Role.FROZEN]) for _ in terms]
    named = tuple(replace(t, role=role) for t, role in zip(network.tensors, roles))
    return Network(named, network.output), {i: rng.randint(1, max_size) for i in held}


def random_folded_network(rng: random.Random, tensors: int, *, max_size: int = 4) -> tuple[Network, Sizes]:
    """A network with a folded bias: x and w are joined by the index f alone, in random positions among the rest.

    x may have indices that are summed elsewhere in the network (by w, by a third tensor, or by both), and w may
    have private ones; an index of x that nobody else has goes to the output, as the declaration asks.
    """
    pool = rng.sample("abcdegh", rng.randint(2, 4))
    x = ["f", *rng.sample(pool, rng.choice([0, 1, 1, 2]))]
    w = ["f", *rng.sample(pool, rng.choice([0, 1, 1, 2]))]
    rng.shuffle(x)
    rng.shuffle(w)
    rest = [
        rng.sample(pool, rng.randint(0 if rng.random() < 0.1 else 1, min(3, len(pool)))) for _ in range(tensors - 2)
    ]
    if rng.random() < 0.15:
        w.append("p")  # summed alone
    if rest and rng.random() < 0.15:
        rest[0].append("q")
    held = list(dict.fromkeys(i for term in (x, w, *rest) for i in term))
    output = [i for i in held if i not in "fpq" and rng.random() < 0.4]
    output += [i for i in x if i != "f" and i not in output and not any(i in term for term in (w, *rest))]
    rng.shuffle(output)
    leaves = [Tensor("x", tuple(x)), Tensor("w", tuple(w), Role.WEIGHT)]
    leaves += [Tensor(f"t{k}", tuple(term), rng.choice([Role.DATA, Role.WEIGHT])) for k, term in enumerate(rest)]
    rng.shuffle(leaves)
    bias = FoldedBias("f", "x", "w", Tensor("u", tuple(i for i in w if i != "f"), Role.WEIGHT))
    return Network(tuple(leaves), tuple(output), bias), {i: rng.randint(1, max_size) for i in held}


def random_arrays(network: Network, sizes: Sizes, seed: int) -> Arrays:
    """An array of small integers for every leaf, so that no order of contraction rounds: results must be equal."""
    rng = np.random.default_rng(seed)
    return {t.name: rng.integers(-3, 4, [sizes[i] for i in t.indices]).astype(np.float64) for t in network.leaves}


def einsum(network: Network, arrays: Arrays) -> NDArray[Any]:
    """The network's value by one `np.einsum`; a folded bias is concatenated, as ones and as one more slice."""
    full = dict(arrays)
    if (bias := network.bias) is not None:
        for name, extra in ((bias.data, None), (bias.weight, arrays[bias.tensor.name])):
            axis = network.tensor(name).indices.index(bias.index)
            array = full[name]
            shape = [1 if k == axis else n for k, n in enumerate(array.shape)]
            row = np.ones(shape) if extra is None else extra.reshape(shape)
            full[name] = np.concatenate([array, row], axis)
    letter = {i: k for k, i in enumerate(network.indices)}
    operands: list[Any] = []
    for t in network.tensors:
        operands += [full[t.name], [letter[i] for i in t.indices]]
    return np.asarray(np.einsum(*operands, [letter[i] for i in network.output]))
