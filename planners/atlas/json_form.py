"""Parts of an atlas as plain data, and checks of what comes from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnmoe.errors import PlanError
from tnmoe.ir.network import Network
from tnmoe.ir.value import Role
from tnmoe.planners.atlas.multipliers import Multipliers

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


def read_proof(data: Mapping[str, Any]) -> Multipliers:
    """What `plain_proof` gave."""
    return Multipliers(tuple(data["degree"]), tuple((int(s), tuple(t), int(w)) for s, t, w in data["weights"]))


def plain_network(network: Network) -> dict[str, Any]:
    """Tensor by tensor even where an expression would do, so that the verifier need not parse one."""
    tensors = [{"name": t.name, "indices": list(t.indices), "role": t.role.value} for t in network.tensors]
    plain: dict[str, Any] = {"tensors": tensors, "output": list(network.output)}
    return plain if network.bias is None else {**plain, "bias": network.to_mapping()["bias"]}


def renamed(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What depends on the names of indices in the plain data of an atlas, under other names: orders and certificate."""

    def polynomial(terms: list[Any]) -> list[Any]:
        return [[c, [names[i] for i in m]] for c, m in terms]

    def order(given: Mapping[str, Any]) -> dict[str, Any]:
        witness = given["witness"]
        moved = None if witness is None else {names[i]: size for i, size in witness.items()}
        return {**given, "cost": polynomial(given["cost"]), "witness": moved}

    def proof(given: Mapping[str, Any]) -> dict[str, Any]:
        weights = [[s, [names[i] for i in t], w] for s, t, w in given["weights"]]
        return {"cost": polynomial(given["cost"]), "degree": [names[i] for i in given["degree"]], "weights": weights}

    kept = {subset: [polynomial(p) for p in costs] for subset, costs in data["certificate"]["kept"].items()}
    out = [proof(p) for p in data["certificate"]["out"]]
    return {"orders": [order(o) for o in data["orders"]], "certificate": {"kept": kept, "out": out}}
