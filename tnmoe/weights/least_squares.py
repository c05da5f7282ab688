"""Factors of a given tensor: alternating least squares over any network, started from truncated SVDs.

One factor at a time is the solution of a linear least-squares problem (Kolda & Bader, 2009, section 3.4, for CP); a
network of two factors is solved by the SVD that it starts from, which is then the best approximation there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.ir.network import Tensor

MAX_SYSTEM = 4096
"""Unknowns of one system of normal equations; larger ones are solved by conjugate gradients."""

MAX_STEPS = 30
"""Of conjugate gradients."""

Array = NDArray[np.float64]
Axes = tuple[str, ...]

CUTOFF = 1e-13
"""Eigenvalues of a Gram matrix below this share of the largest count as zero."""


@dataclass(frozen=True)
class Factorized:
    """Factors by name, the relative error ‖T - network‖ / ‖T‖, and the number of sweeps."""

    factors: dict[str, Array]
    error: float
    sweeps: int


def factorize(
    factors: Sequence[Tensor],
    sizes: Mapping[str, int],
    target: Array,
    axes: Axes,
    *,
    sweeps: int = 100,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Factorized:
    """The factors whose contraction comes close to `target` in the Frobenius norm.

    Args:
        factors: the network; indices outside `axes` are summed.
        sizes: of every index.
        target: with these `axes`.
        sweeps: at most so many times over all factors.
        tolerance: stop when a sweep lowers the relative error by less than this share of it.
        seed: of the random numbers that start what no SVD does.
    """
    rng = np.random.default_rng(seed)
    norm = float(np.linalg.norm(target))
    arrays = {f.name: _start(f, factors, sizes, target, axes, rng) for f in factors}
    if norm == 0:
        return Factorized({name: np.zeros_like(a) for name, a in arrays.items()}, 0.0, 0)
    # What has no axis of its own starts at random, so it is solved for first; the first of the others comes last.
    order = sorted(factors, key=lambda f: (bool(set(f.indices) & set(axes)), -list(factors).index(f)))
    error = float("inf")
    done = 0
    while done < sweeps:
        done += 1
        for factor in order:
            arrays[factor.name] = _solve(factor, factors, arrays, target, axes)
        previous, error = error, _error(factors, arrays, target, axes) / norm
        if error < 1e-13 or previous - error < tolerance * error:
            break
    return Factorized(_balanced(arrays), error, done)


def contract(factors: Sequence[Tensor], arrays: Mapping[str, Array], axes: Axes) -> Array:
    """The tensor that the factors make up."""
    return _einsum([(arrays[f.name], f.indices) for f in factors], axes)


def _einsum(operands: Sequence[tuple[Array, Axes]], output: Axes) -> Array:
    letter = {i: k for k, i in enumerate(dict.fromkeys(i for _, indices in operands for i in indices))}
    flat: list[Any] = [x for array, indices in operands for x in (array, [letter[i] for i in indices])]
    return np.asarray(np.einsum(*flat, [letter[i] for i in output], optimize="greedy"))


def _error(factors: Sequence[Tensor], arrays: Mapping[str, Array], target: Array, axes: Axes) -> float:
    return float(np.linalg.norm(target - contract(factors, arrays, axes)))


def _start(
    factor: Tensor, factors: Sequence[Tensor], sizes: Mapping[str, int], target: Array, axes: Axes, rng: Any
) -> Array:
    """Leading singular vectors along the axes that only this factor has; random numbers for what remains."""
    shape = [sizes[i] for i in factor.indices]
    elsewhere = {i for f in factors if f is not factor for i in f.indices}
    batch = [i for i in factor.indices if i in axes and i in elsewhere]
    own = [i for i in factor.indices if i in axes and i not in elsewhere]
    bonds = [i for i in factor.indices if i not in axes]
    width = prod(sizes[i] for i in bonds)
    rows = prod(sizes[i] for i in own)
    filled = rng.standard_normal((prod(sizes[i] for i in batch), rows, width)) / np.sqrt(rows)
    if own:
        order = [axes.index(i) for i in (*batch, *own)]
        rest = [k for k in range(len(axes)) if k not in order]
        unfolded = target.transpose(*order, *rest).reshape(len(filled), rows, -1)
        gram = unfolded @ unfolded.transpose(0, 2, 1)
        leading = np.linalg.eigh(gram)[1][:, :, ::-1][:, :, :width]
        filled[:, :, : leading.shape[2]] = leading
    arranged = filled.reshape([sizes[i] for i in (*batch, *own, *bonds)])
    back = [(*batch, *own, *bonds).index(i) for i in factor.indices]
    return np.ascontiguousarray(arranged.transpose(back).reshape(shape))


def _solve(factor: Tensor, factors: Sequence[Tensor], arrays: Mapping[str, Array], target: Array, axes: Axes) -> Array:
    """The factor that is best while all others stay: normal equations, one system for each entry of shared axes."""
    others = [(arrays[f.name], f.indices) for f in factors if f is not factor]
    elsewhere = {i for _, indices in others for i in indices}
    shared = tuple(i for i in factor.indices if i in axes and i in elsewhere)
    own = tuple(i for i in factor.indices if i in axes and i not in elsewhere)
    bonds = tuple(i for i in factor.indices if i not in axes)
    order = shared + own + bonds
    right = _einsum([(target, axes), *others], order)
    parts = _components(others, set(factor.indices), bonds if not shared else ())
    if max((prod(right.shape[order.index(i)] for i in held) for held, _ in parts), default=1) > MAX_SYSTEM:
        start = arrays[factor.name].transpose([factor.indices.index(i) for i in order])
        solved = _conjugate_gradients(others, order, target, axes, right, start)
    else:
        solved = right
        for held, tensors in parts:
            solved = _divided(solved, order, shared, held or bonds, _gram(tensors, axes, shared, held or bonds))
    return np.ascontiguousarray(solved.transpose([order.index(i) for i in factor.indices]))


Leaf = tuple[Array, Axes]


def _components(others: Sequence[Leaf], own: set[str], bonds: Axes) -> list[tuple[Axes, list[Leaf]]]:
    """The surroundings of a factor in parts that meet only in it: the bonds to each part, and its tensors.

    The Gram matrix is the Kronecker product of theirs. Without `bonds` everything is one part.
    """
    parts: list[tuple[set[str], list[Leaf]]] = []
    for leaf in others:
        links = {i for i in leaf[1] if i not in own or i in bonds} if bonds else {""}
        joined = [p for p in parts if p[0] & links]
        merged = (links.union(*(p[0] for p in joined)), [*(t for p in joined for t in p[1]), leaf])
        parts = [p for p in parts if p not in joined] + [merged]
    return [(tuple(i for i in bonds if i in links), tensors) for links, tensors in parts]


def _gram(tensors: Sequence[Leaf], axes: Axes, shared: Axes, bonds: Axes) -> Array:
    """Σ E[shared, bonds, rest] E[shared, bonds', rest] of one part, with its two groups of bonds as one axis each."""
    twin = {i: f"{i}'" for _, indices in tensors for i in indices if i not in axes}
    twins = [(array, tuple(twin.get(i, i) for i in indices)) for array, indices in tensors]
    gram = _einsum([*tensors, *twins], shared + bonds + tuple(twin[i] for i in bonds))
    width = prod(gram.shape[len(shared) : len(shared) + len(bonds)])
    return gram.reshape(-1, width, width)


def _divided(array: Array, order: Axes, shared: Axes, bonds: Axes, gram: Array) -> Array:
    """`array` times the pseudo-inverse of a Gram matrix over `bonds`, for each entry of the shared axes."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > CUTOFF * values[:, -1:]
    inverse = np.where(kept, 1 / np.where(kept, values, 1), 0)
    front = [order.index(i) for i in shared]
    back = [order.index(i) for i in bonds]
    moved = [*front, *(k for k in range(len(order)) if k not in front + back), *back]
    arranged = array.transpose(moved)
    flat = arranged.reshape(len(gram), -1, gram.shape[-1])
    solved = ((flat @ vectors) * inverse[:, None, :]) @ vectors.transpose(0, 2, 1)
    return np.asarray(solved.reshape(arranged.shape).transpose(np.argsort(moved)))


def _conjugate_gradients(
    others: Sequence[Leaf], order: Axes, target: Array, axes: Axes, right: Array, start: Array
) -> Array:
    """The normal equations without their matrix, where that would be too large; a few steps from `start`."""

    def normal(x: Array) -> Array:
        return _einsum([(_einsum([(x, order), *others], axes), axes), *others], order)

    x = start
    residual = right - normal(x)
    direction, size = residual, float((residual**2).sum())
    for _ in range(MAX_STEPS):
        if size <= 1e-28 * float((right**2).sum()):
            break
        image = normal(direction)
        step = size / float((direction * image).sum())
        x, residual = x + step * direction, residual - step * image
        size, previous = float((residual**2).sum()), size
        direction = residual + (size / previous) * direction
    return x


def _balanced(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The same network with factors of equal norm, so that none learns much faster than the others."""
    norms = {name: float(np.linalg.norm(a)) for name, a in arrays.items()}
    if min(norms.values()) == 0:
        return dict(arrays)
    mean = float(np.exp(np.mean([np.log(n) for n in norms.values()])))
    return {name: a * (mean / norms[name]) for name, a in arrays.items()}
