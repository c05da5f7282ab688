"""Sizes of a declaration that are left open: by the name of their symbol, or of the field that declares them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tnmoe.errors import DeclarationError, unknown
from tnmoe.ir.layer import Layer
from tnmoe.planning.plan import Plan
from tnmoe.planning.request import Planable, as_layer
from tnmoe.symbolic.dims import symbol_names


def open_sizes(what: Planable | Plan, names: Collection[str], *, optional: bool = False) -> Layer:
    """The layer with each of the named sizes a symbol without a value.

    Args:
        what: a declaration, layer, network or plan.
        names: of symbols, e.g. `N`, `R`, `T`; or of fields of a declaration that are one size, e.g. `experts`, `rank`.
        optional: pass over names that the layer does not have.

    Raises:
        DeclarationError: a name that is no size of the layer.
    """
    layer = what.layer if isinstance(what, Plan) else as_layer(what)
    if not isinstance(what, Plan | Layer):
        changed: Any = what
        for name in names:
            if name not in symbol_names(layer.sizes.values()):
                changed = _with_symbol(changed, name)
        layer = as_layer(changed)
    known = symbol_names(layer.sizes.values())
    for name in names:
        if name not in known and not optional:
            raise DeclarationError(unknown(f"size of {layer.name}", name, sorted(known)))
    return replace(layer, values={k: v for k, v in layer.values.items() if k not in names})


def _with_symbol(spec: Any, field: str) -> Any:
    """The declaration with a field, of its own or of one of its parts, as a symbol of the field's name."""
    if not is_dataclass(spec) or isinstance(spec, type):
        return spec
    for f in fields(spec):
        value = getattr(spec, f.name)
        if f.name == field:
            single = not isinstance(value, tuple) or len(value) == 1
            if isinstance(value, bool) or not single:
                raise DeclarationError(
                    f"{field} is no single size but {value!r}; name its symbols instead, e.g. N1, r2"
                )
            return replace(spec, **{field: field})
        inner = _with_symbol(value, field) if is_dataclass(value) else value
        if inner is not value:
            return replace(spec, **{f.name: inner})
    return spec
