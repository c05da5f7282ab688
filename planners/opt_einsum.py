"""Orders by opt_einsum (an extra), for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from tnmoe.costing.objective import MACS, Objective
from tnmoe.errors import PlanError
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planners.pairs import pairwise

try:
    import opt_einsum
except ImportError:  # it is an extra
    opt_einsum = None

INSTALLED = opt_einsum is not None


def plan(
    network: Network,
    sizes: Mapping[str, int],
    objective: Objective = MACS,
    requires_grad: Set[str] = frozenset(),
    algorithm: Any = None,
) -> ContractionPath:
    """The path opt_einsum finds; it minimises its own count, one operation per product, whatever the objective.

    Args:
        network: a folded bias is planned as if its index had the size of the data alone.
        sizes: an integer for every index.
        objective, requires_grad: recorded by the caller; opt_einsum knows none.
        algorithm: an `optimize=` argument of opt_einsum, by default exact dynamic programming with outer products.

    Raises:
        PlanError: if opt_einsum is not installed.
    """
    if opt_einsum is None:
        raise PlanError("opt_einsum is not installed; pip install 'tnmoe[opt_einsum]'")
    letter = {index: opt_einsum.get_symbol(k) for k, index in enumerate(network.indices)}
    terms = ["".join(letter[i] for i in t.indices) for t in network.tensors]
    expression = ",".join(terms) + "->" + "".join(letter[i] for i in network.output)
    shapes = [tuple(sizes[i] for i in t.indices) for t in network.tensors]
    if algorithm is None:
        algorithm = opt_einsum.DynamicProgramming(minimize="flops", search_outer=True)
    linear, _ = opt_einsum.contract_path(expression, *shapes, shapes=True, optimize=algorithm)
    ssa = opt_einsum.paths.linear_to_ssa(linear)
    return ContractionPath(pairwise(ssa, len(terms)), "opt_einsum")
