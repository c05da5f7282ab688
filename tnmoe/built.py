"""Which plan a live module was built from."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from tnmoe.plan import Plan

_PLANS: WeakKeyDictionary[type, Plan] = WeakKeyDictionary()


def remember(module: type, planned: Plan) -> None:
    """Keep the plan of a class that was made from emitted source."""
    _PLANS.setdefault(module, planned)


def plan_of(module: object) -> Plan | None:
    """The plan that the module's class was built from in this process; None for any other module."""
    return _PLANS.get(type(module))
