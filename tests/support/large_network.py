"""Networks beyond the exact planner."""

from __future__ import annotations

import random

import cotengra as peer

from support.networks import Sizes
from tnmoe import Network, Tensor
from tnmoe.ir.value import Role


def large_network(tensors: int, seed: int, *, most: int = 4) -> tuple[Network, Sizes]:
    """Random regular-like graphs of three indices a tensor, with two hyperedges, two open indices and roles."""
    inputs, output, _, sizes = peer.utils.rand_equation(tensors, 3, n_out=2, n_hyper_in=2, d_max=most, seed=seed)
    name = {i: f"i{k}" for k, i in enumerate(sizes)}
    rng = random.Random(seed)
    made = tuple(Tensor(f"t{k}", tuple(name[i] for i in term), rng.choice(list(Role))) for k, term in enumerate(inputs))
    return Network(made, tuple(name[i] for i in output)), {name[i]: size for i, size in sizes.items()}
