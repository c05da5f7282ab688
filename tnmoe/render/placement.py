"""Positions of a graph's nodes in the plane by stress majorization (Gansner, Koren, North 2004), deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STARTS = 24
ROUNDS = 200


def place(nodes: int, edges: Sequence[tuple[int, int, float]]) -> Array:
    """Positions (nodes × 2) whose distances come close to the lengths of shortest paths; parts lie side by side.

    Args:
        nodes: how many.
        edges: (node, node, wished length).
    """
    apart = np.full((nodes, nodes), np.inf)
    np.fill_diagonal(apart, 0.0)
    for a, b, length in edges:
        apart[a, b] = apart[b, a] = min(apart[a, b], length)
    for k in range(nodes):  # Floyd and Warshall
        apart = np.minimum(apart, apart[:, k, None] + apart[None, k, :])
    reach = apart[np.isfinite(apart)]
    apart[np.isinf(apart)] = reach.max() + 1.0  # parts that nothing joins

    best, least = np.zeros((nodes, 2)), np.inf
    for seed in range(STARTS):
        where = _majorize(apart, seed)
        cost = _stress(where, apart) + 10.0 * _crossings(where, [(a, b) for a, b, _ in edges])
        if cost < least - 1e-9:
            best, least = where, cost
    return _upright(best)


def _majorize(apart: Array, seed: int) -> Array:
    nodes = len(apart)
    where: Array = np.random.default_rng(seed).normal(size=(nodes, 2)) * max(1.0, float(apart.max()) / 2)
    if nodes == 1:
        return np.zeros((1, 2))
    with np.errstate(divide="ignore"):
        weight = np.where(apart > 0, apart**-2.0, 0.0)
    laplacian = np.diag(weight.sum(1)) - weight
    inverse = np.linalg.pinv(laplacian)
    for _ in range(ROUNDS):
        between = np.linalg.norm(where[:, None] - where[None], axis=-1)
        pull = -weight * apart / np.maximum(between, 1e-9)
        np.fill_diagonal(pull, 0.0)
        np.fill_diagonal(pull, -pull.sum(1))
        where = np.matmul(inverse, np.matmul(pull, where))
    return where


def _stress(where: Array, apart: Array) -> float:
    between = np.linalg.norm(where[:, None] - where[None], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(apart > 0, (between - apart) ** 2 / apart**2, 0.0)
    return float(terms.sum())


def _crossings(where: Array, edges: Sequence[tuple[int, int]]) -> int:
    def side(a: int, b: int, c: int) -> float:
        (ax, ay), (bx, by), (cx, cy) = where[a], where[b], where[c]
        return float((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))

    return sum(
        side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
        for k, (a, b) in enumerate(edges)
        for c, d in edges[k + 1 :]
        if len({a, b, c, d}) == 4
    )


def _upright(where: Array) -> Array:
    """Turned so that the longest extent is horizontal."""
    centred: Array = where - where.mean(0)
    if len(where) < 2:
        return centred
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    turned: Array = np.matmul(centred, axes.T)
    # The sign of a singular vector is free: put the first node at the left and above, so that pictures repeat.
    signs = np.where(turned[0] > 1e-9, -1.0, 1.0)
    upright: Array = turned * signs
    return upright
