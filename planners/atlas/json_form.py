"""Parts of an atlas as plain data, and checks of what comes from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnmoe.errors import PlanError
from tnmoe.io.json_fields import Field
from tnmoe.ir.network import Network
from tnmoe.ir.value import Role
from tnmoe.planners.atlas.multipliers import Multipliers
from tnmoe.planners.atlas.polynomial import Polynomial

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


def read_bounds(data: Field) -> tuple[int, int | None]:
    """The bounds of a size: `[lowest, highest or null]`."""
    low, high = data.items(2, "sizes, the highest null if it is open")
    return low.integer(1), high.maybe(lambda size: size.integer(1))


def read_polynomial(data: Field) -> Polynomial:
    """What `Polynomial.to_list` gave."""
    try:
        return Polynomial.from_list(data.value)
    except PlanError:
        raise data.fault("a list of [positive coefficient, [indices]], no product twice") from None


def read_sizes(data: Field) -> dict[str, int]:
    """A witness: a size of each index."""
    return {index: size.integer(1) for index, size in data.entries().items()}


def read_kept(data: Field) -> dict[int, tuple[Polynomial, ...]]:
    """The costs that a certificate keeps of each subset; a subset is a bit mask, as text."""
    subsets = data.entries()
    if not all(key.isascii() and key.isdecimal() and len(key) < 20 for key in subsets):
        raise data.fault("an object with subsets as numbers for keys")
    return {int(key): tuple(map(read_polynomial, costs.items(of="costs"))) for key, costs in subsets.items()}


def plain_proof(proof: Multipliers) -> dict[str, Any]:
    """Multipliers as they stand in a file."""
    return {"degree": list(proof.degree), "weights": [[s, list(t), w] for s, t, w in proof.weights]}


def read_proof(degree: Field, weights: Field) -> Multipliers:
    """What `plain_proof` gave."""
    rows = [row.items(3, "place, indices and weight") for row in weights.items(of="multipliers")]
    return Multipliers(degree.texts(), tuple((s.integer(0), t.texts(), w.integer(1)) for s, t, w in rows))


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
