"""Reading plans: their JSON form, strictly, every fault by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tnmoe.costing.objective import Objective, as_objective
from tnmoe.errors import PlanError
from tnmoe.io.files import read_json
from tnmoe.ir.layer import Layer
from tnmoe.ir.path import ContractionPath
from tnmoe.layers.kinds import declare
from tnmoe.planning.shortlist import Shortlist
from tnmoe.symbolic.dims import LARGEST, check_name

FORMAT = "tnmoe-plan-1"


@dataclass(frozen=True, slots=True)
class PlanFields:
    """What a plan's JSON says; `function` is left as it stands, for the program that it is of."""

    layer: Layer
    paths: Mapping[str, ContractionPath]
    values: Mapping[str, int]
    objective: Objective
    inputs: tuple[str, ...]
    shortlist: Shortlist | None
    saved_limit: int | None
    memory_limit: int | None
    turned: tuple[str, ...] | None
    function: Any


def read(text: str) -> PlanFields:
    """The fields of a plan.

    Raises:
        PlanError: if it is no such text, or its paths do not fit its networks.
        DeclarationError: if its declaration is faulty.
    """
    data = read_json(text, "a plan", FORMAT, PlanError)
    missing = [k for k in ("declaration", "values", "objective", "input_gradients", "paths") if k not in data]
    if missing:
        raise PlanError(f"the plan lacks {missing[0]!r}")
    layer = declare(data["declaration"])
    values = {check_name(k, "size"): _size(k, v) for k, v in _mapping(data, "values").items()}
    _same_names("values", values, layer.free_symbols | set(layer.values))
    for name, value in layer.values.items():
        if values[name] != value:
            raise PlanError(f"the plan says {name} = {values[name]}, but its declaration says {value}")
    paths = {name: _path(name, p) for name, p in _mapping(data, "paths").items()}
    _same_names("paths", paths, {node.out.name for node in layer.contractions})
    for node in layer.contractions:
        paths[node.out.name].check(len(node.network.tensors))
    return PlanFields(
        layer,
        paths,
        values,
        _objective(data["objective"]),
        _inputs(layer, data["input_gradients"]),
        _shortlist(data),
        _limit(data, "saved_limit", "elements"),
        _limit(data, "memory_limit", "bytes"),
        _turned(data.get("turned")),
        data.get("function"),
    )


def _limit(data: Mapping[str, Any], key: str, unit: str) -> int | None:
    value = data.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise PlanError(f"{key} of a plan must be a number of {unit}, got {value!r}")
    limit: int | None = value
    return limit


def _turned(names: Any) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanError(f"turned of a plan must be names of weights, got {names!r}")
    return tuple(names)


def _objective(text: Any) -> Objective:
    if not isinstance(text, str):
        raise PlanError(f"the objective of a plan must be text, got {text!r}")
    return as_objective(text)


def _shortlist(data: Mapping[str, Any]) -> Shortlist | None:
    if data.get("shortlist") is None:
        return None
    shortlist = Shortlist.from_mapping(data["shortlist"])
    if shortlist.by != data["objective"]:
        raise PlanError(f"the plan's objective is {data['objective']!r}, but its shortlist is by {shortlist.by!r}")
    return shortlist


def _inputs(layer: Layer, names: Any) -> tuple[str, ...]:
    known = [v.name for v in layer.inputs]
    if not isinstance(names, list) or not all(name in known for name in names) or len(set(names)) != len(names):
        raise PlanError(f"input_gradients of a plan must be some of {known}, got {names!r}")
    return tuple(names)


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(data[key], dict):
        raise PlanError(f"{key!r} of a plan must be an object, got {data[key]!r}")
    fields: Mapping[str, Any] = data[key]
    return fields


def _same_names(what: str, given: Iterable[str], expected: Iterable[str]) -> None:
    lacking, surplus = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if lacking or surplus:
        fault = f"lack {lacking[0]!r}" if lacking else f"have {surplus[0]!r}, which the layer has not"
        raise PlanError(f"the {what} of the plan {fault}; expected {', '.join(sorted(expected))}")


def _size(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise PlanError(f"value {key!r} of a plan must be a size, got {value!r}")
    return value


def _path(name: str, data: Any) -> ContractionPath:
    match data:
        case {"steps": list(steps), "planner": str(planner), "exact": bool(exact)} if all(
            isinstance(step, list) and [type(i) for i in step] == [int, int] for step in steps
        ):
            return ContractionPath(tuple((i, j) for i, j in steps), planner, exact)
    raise PlanError(f"path {name!r} must have steps (pairs of integers), planner and exact; got {data!r}")
