"""The ranks that the experts of a trained module really have: singular values of their matrices, from the factors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tnmoe.errors import CostError, DeclarationError
from tnmoe.ir.layer import Contraction
from tnmoe.ir.rank import max_expert_rank
from tnmoe.ir.value import Role
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Table
from tnmoe.symbolic.dims import Dim

if TYPE_CHECKING:
    import torch

MOST_ELEMENTS = 10**8
"""The largest matrix that is formed."""


@dataclass(frozen=True, slots=True)
class ExpertRank:
    """The matrix of one expert in one linear map.

    Attributes:
        map: name of the value that the map defines, e.g. "hidden", "y".
        expert: its number on each level of the hierarchy.
        max_rank: the most that the factorization allows (`tnmoe.ir.rank`).
        numerical: singular values above max(I, O) · ε · σ₁, ε of the module's dtype; what `matrix_rank` counts.
        effective: exp of the entropy of the normalised singular values (Roy & Vetterli, 2007).
        stable: ‖W‖²_F / ‖W‖²₂.
    """

    map: str
    expert: tuple[int, ...]
    max_rank: int
    numerical: int
    effective: float
    stable: float


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """One row for each expert that was asked for, of each map.

    Attributes:
        name: of the layer.
        parameters: stored weights of the layer, for what a unit of rank costs.
        flops: of one forward pass at the plan's tokens, likewise.
        rows: the experts.
    """

    name: str
    parameters: int
    flops: int
    rows: tuple[ExpertRank, ...]

    @property
    def mean_effective(self) -> float:
        """Mean effective rank of all rows."""
        return math.fsum(r.effective for r in self.rows) / len(self.rows)

    @property
    def parameters_per_rank(self) -> float:
        """Stored weights for each unit of the mean effective rank; infinite if all matrices are zero."""
        return self.parameters / self.mean_effective if self.mean_effective else math.inf

    @property
    def flops_per_rank(self) -> float:
        """FLOPs of one forward pass for each unit of the mean effective rank; infinite if all matrices are zero."""
        return self.flops / self.mean_effective if self.mean_effective else math.inf

    def table(self) -> Table:
        """One row for each expert."""
        rows = tuple(
            (r.map, ", ".join(map(str, r.expert)), r.max_rank, r.numerical, r.effective, r.stable) for r in self.rows
        )
        columns = (
            ("map", "map"),
            ("expert", "expert"),
            ("max_rank", "max rank"),
            ("numerical", "numerical rank"),
            ("effective", "effective rank"),
            ("stable", "stable rank"),
        )
        notes = (
            f"Mean effective rank {self.mean_effective:,.2f}, {self.parameters_per_rank:,.0f} parameters and "
            f"{self.flops_per_rank:,.0f} FLOPs of a forward pass a unit.",
            "Effective: exp of the entropy of the normalised singular values. Stable: squared Frobenius over squared "
            "spectral norm. Biases are left aside.",
        )
        return Table(f"Ranks of the experts of {self.name}", columns, rows, notes)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().render("html")


def expert_ranks(
    planned: Plan,
    module: torch.nn.Module | Mapping[str, torch.Tensor],
    experts: Iterable[int | tuple[int, ...]] | None = None,
) -> ExpertRanks:
    """Numerical, effective and stable rank of experts' matrices, each formed from the factors by itself.

    Args:
        planned: the plan that the module was built from.
        module: the module, or its state dict.
        experts: which; a tuple names one of a hierarchy. By default all of them.

    Raises:
        CostError: a layer without factorized experts, or matrices of more than 10⁸ elements.
        DeclarationError: an expert that is not there, or a state that does not fit the plan.
    """
    import torch  # costing does without

    state = module.state_dict() if isinstance(module, torch.nn.Module) else module
    sizes = planned.bound.sizes
    stored = {p.name: p.indices for p in planned.program.parameters}
    maps = [n for n in planned.layer.contractions if n.expert_map is not None and _weights(n)]
    if not maps:
        raise CostError(f"{planned.layer.name} has no experts in factors; ranks are of μMoE layers")
    measured: list[ExpertRank] = []
    for node in maps:
        assert node.expert_map is not None
        arrays, epsilon = {}, 0.0
        for name in _weights(node):
            if name not in state or tuple(state[name].shape) != tuple(sizes[i] for i in stored[name]):
                raise DeclarationError(f"the state does not fit the plan: {name} must have the axes {stored[name]}")
            epsilon = float(torch.finfo(state[name].dtype).eps)
            arrays[name] = state[name].detach().to("cpu", torch.float64).numpy()
        bound = max_expert_rank(node.network, node.expert_map, sizes)
        for expert in _chosen(node, sizes, experts):
            matrix = _matrix(node, arrays, stored, expert, sizes)
            measured.append(_measured(node.out.name, expert, int(bound), matrix, epsilon))
    total = sum(math.prod(int(sizes[i]) for i in indices) for indices in stored.values())
    return ExpertRanks(planned.layer.name, total, planned.flops, tuple(measured))


def _weights(node: Contraction) -> list[str]:
    return [t.name for t in node.network.tensors if t.role is not Role.DATA]


def _chosen(
    node: Contraction, sizes: Mapping[str, Dim], experts: Iterable[int | tuple[int, ...]] | None
) -> list[tuple[int, ...]]:
    assert node.expert_map is not None
    counts = [int(sizes[i]) for i in node.expert_map.experts]
    if experts is None:
        return list(itertools.product(*map(range, counts)))
    chosen = [(e,) if isinstance(e, int) else tuple(e) for e in experts]
    for expert in chosen:
        if len(expert) != len(counts) or not all(0 <= e < n for e, n in zip(expert, counts, strict=True)):
            raise DeclarationError(f"there is no expert {expert}: the levels have {', '.join(map(str, counts))}")
    return chosen


def _matrix(
    node: Contraction,
    arrays: Mapping[str, Any],
    stored: Mapping[str, tuple[str, ...]],
    expert: tuple[int, ...],
    sizes: Mapping[str, Dim],
) -> Any:
    """W_n of the network's weights, with the expert indices fixed; rows are inputs, columns outputs."""
    assert node.expert_map is not None
    place = dict(zip(node.expert_map.experts, expert, strict=True))
    rows, columns = (node.expert_map.parts(i) for i in (node.expert_map.input, node.expert_map.output))
    high, wide = (math.prod(int(sizes[i]) for i in parts) for parts in (rows, columns))
    if high * wide > MOST_ELEMENTS:
        raise CostError(f"the experts of {node.out.name} are too large to form: {high:,} × {wide:,}")
    letters: dict[str, int] = {}
    operands: list[Any] = []
    for name in _weights(node):
        kept = [i for i in stored[name] if i not in place]
        operands += [arrays[name][tuple(place.get(i, slice(None)) for i in stored[name])]]
        operands += [[letters.setdefault(i, len(letters)) for i in kept]]
    if lost := [i for i in (*rows, *columns) if i not in letters]:
        raise CostError(f"no weight of {node.out.name} has the index {lost[0]!r} of its experts' matrices")
    whole = np.einsum(*operands, [letters[i] for i in (*rows, *columns)], optimize=True).reshape(high, wide)
    return whole[: int(sizes[node.expert_map.input]), : int(sizes[node.expert_map.output])]  # without padding


def _measured(name: str, expert: tuple[int, ...], bound: int, matrix: Any, epsilon: float) -> ExpertRank:
    values = np.linalg.svd(matrix, compute_uv=False)
    largest, total = float(values[0]), float(values.sum())
    if not largest:
        return ExpertRank(name, expert, bound, 0, 0.0, 0.0)
    shares = values[values > 0] / total
    return ExpertRank(
        name,
        expert,
        bound,
        int((values > max(matrix.shape) * epsilon * largest).sum()),
        math.exp(-float((shares * np.log(shares)).sum())),
        float((values**2).sum()) / largest**2,
    )
