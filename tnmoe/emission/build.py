"""Live modules, made from the very source that `emit` writes."""

from __future__ import annotations

import hashlib
import linecache
import sys
import types
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tnmoe.emission.emit import as_plan, emit
from tnmoe.planning.plan import Plan

if TYPE_CHECKING:
    import torch


def build(
    planned: Plan,
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    freeze: bool = False,
) -> torch.nn.Module:
    """A live module, made from the very source that `emit` writes.

    Args:
        planned: the plan.
        name: of the class.
        device, dtype: of the parameters.
        freeze: give it a method `freeze()`; see `emit`.
    """
    source = emit(as_plan(planned), name=name, freeze=freeze)
    name = name or planned.layer.name
    made = getattr(loaded(source), name)
    remember(made, planned)
    result: torch.nn.Module = made(device=device, dtype=dtype)
    return result


def loaded(source: str) -> types.ModuleType:
    """The module of an emitted source, imported once."""
    module_name = f"tnmoe_emitted_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        module = types.ModuleType(module_name)
        file = f"<{module_name}.py>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
        exec(compile(source, file, "exec"), module.__dict__)
        sys.modules[module_name] = module  # so that instances can be pickled within the process
    return sys.modules[module_name]


_PLANS: WeakKeyDictionary[type, Plan] = WeakKeyDictionary()


def remember(module: type, planned: Plan) -> None:
    """Keep the plan of a class that was made from emitted source."""
    _PLANS.setdefault(module, planned)


def plan_of(module: object) -> Plan | None:
    """The plan that the module's class was built from in this process; None for any other module."""
    return _PLANS.get(type(module))
