"""Parts of an atlas as plain data, and checks of what comes from outside."""

from __future__ import annotations

from typing import Any

from tnmoe.errors import PlanError
from tnmoe.network import Network, Role
from tnmoe.planners.multipliers import Multipliers

FORMAT = "tnmoe-atlas-1"


def check_calls(calls: object) -> int:
    """`calls` if it is a positive integer, else a `PlanError`."""
    if type(calls) is not int or calls < 1:
        raise PlanError(f"calls must be a positive integer, got {calls!r}")
    return calls


def constants(network: Network, frozen: frozenset[str]) -> frozenset[str]:
    """Names of the tensors that stay the same between calls: weights, frozen ones, and those that are named."""
    for name in sorted(frozen):
        network.tensor(name)
    return frozen | {t.name for t in network.tensors if t.role is not Role.DATA}


def read_bounds(bounds: object) -> tuple[int, int | None]:
    """`[lowest, highest or null]` of a file; a `PlanError` if it is something else."""
    match bounds:
        case [int(low), None | int() as high]:
            return low, high
    raise PlanError(f"bounds in an atlas must be [lowest, highest or null], got {bounds!r}")


def plain_proof(proof: Multipliers) -> dict[str, Any]:
    """Multipliers as they stand in a file."""
    return {"degree": list(proof.degree), "weights": [[s, list(t), w] for s, t, w in proof.weights]}


def plain_network(network: Network) -> dict[str, Any]:
    """Tensor by tensor even where an expression would do, so that the verifier need not parse one."""
    tensors = [{"name": t.name, "indices": list(t.indices), "role": t.role.value} for t in network.tensors]
    found: dict[str, Any] = {"tensors": tensors, "output": list(network.output)}
    return found if network.bias is None else {**found, "bias": network.to_mapping()["bias"]}
