"""Reading plans: their JSON form, strictly, every fault by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tnmoe.costing.objective import Objective, as_objective
from tnmoe.errors import PlanError
from tnmoe.io.json_fields import Field, read_json
from tnmoe.ir.layer import Layer
from tnmoe.ir.path import ContractionPath
from tnmoe.layers.kinds import declare
from tnmoe.planning.shortlist import Shortlist
from tnmoe.symbolic.dims import LARGEST, check_name

FORMAT = "tnmoe-plan-1"
REQUIRED = ("declaration", "values", "objective", "input_gradients", "paths")
OPTIONAL = ("shortlist", "saved_limit", "memory_limit", "turned", "function")


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
    function: Field


def read(text: str) -> PlanFields:
    """The fields of a plan.

    Raises:
        PlanError: if it is no such text, or its paths do not fit its networks.
        DeclarationError: if its declaration is faulty.
    """
    data = read_json(text, "a plan", FORMAT, PlanError).keys(*REQUIRED, optional=OPTIONAL)
    layer = declare(data["declaration"].value)
    values = {check_name(name, "size"): v.integer(1, LARGEST) for name, v in data["values"].entries().items()}
    _same_names("values", values, layer.free_symbols | set(layer.values))
    for name, value in layer.values.items():
        if values[name] != value:
            raise PlanError(f"the plan says {name} = {values[name]}, but its declaration says {value}")
    paths = {name: ContractionPath.read(path) for name, path in data["paths"].entries().items()}
    _same_names("paths", paths, {node.out.name for node in layer.contractions})
    for node in layer.contractions:
        paths[node.out.name].check(len(node.network.tensors))
    objective, shortlist = as_objective(data["objective"].text()), data["shortlist"].maybe(Shortlist.read)
    if shortlist is not None and shortlist.by != data["objective"].value:
        raise PlanError(f"the plan's objective is {objective}, but its shortlist is by {shortlist.by}")
    return PlanFields(
        layer,
        paths,
        values,
        objective,
        data["input_gradients"].texts(v.name for v in layer.inputs),
        shortlist,
        data["saved_limit"].maybe(lambda elements: elements.integer(0)),
        data["memory_limit"].maybe(lambda amount: amount.integer(0)),
        data["turned"].maybe(Field.texts),
        data["function"],
    )


def _same_names(what: str, given: Iterable[str], expected: Iterable[str]) -> None:
    lacking, surplus = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if lacking or surplus:
        fault = f"lack {lacking[0]!r}" if lacking else f"have {surplus[0]!r}, which the layer has not"
        raise PlanError(f"the {what} of the plan {fault}; expected {', '.join(sorted(expected))}")
