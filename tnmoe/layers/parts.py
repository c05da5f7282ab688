"""Pieces that several layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar

import sympy

from tnmoe.errors import DeclarationError, unknown
from tnmoe.factorizations.kinds import FACTORIZATIONS
from tnmoe.ir.initialise import Ones, Zeros
from tnmoe.ir.pointwise_ops import LayerNorm
from tnmoe.ir.value import Parameter, Value
from tnmoe.symbolic.dims import Dim, as_dim, dim_text, evaluate, symbol_names

LOWERINGS = ("auto", "gathered", "masked")
"""Programs of a routed mixture: "gathered" runs the chosen experts alone, on tokens sorted by expert; "masked" runs all
of them and mixes with shares that are zero but for the chosen ones. "auto" leaves it to the plan: under the objective
"time" the one whose program has the least predicted time, else the gathered one. Both have the same parameters."""


class Declaration:
    """What every declaration has: checks of its fields, and its plain forms."""

    __slots__ = ()
    kind: ClassVar[str]

    def check_sizes(self, *keys: str) -> None:
        """Turn the fields `keys` into checked dimensions, or raise `DeclarationError`."""
        for key in keys:
            object.__setattr__(self, key, as_dim(getattr(self, key), key))

    def check_flags(self, *keys: str) -> None:
        """Raise `DeclarationError` unless the fields `keys` are bools."""
        for key in keys:
            if not isinstance(getattr(self, key), bool):
                raise DeclarationError(f"{key} must be true or false, got {getattr(self, key)!r}")

    def check_choice(self, key: str, allowed: Sequence[str]) -> None:
        """Raise `DeclarationError` unless the field `key` is one of `allowed`."""
        if getattr(self, key) not in allowed:
            raise DeclarationError(unknown(key, getattr(self, key), allowed))

    def check_factorization(self) -> None:
        """Raise `DeclarationError` unless the field `factorization` is one (or None) for one level of experts."""
        given: Any = self.factorization  # type: ignore[attr-defined]  # of declarations that have the field
        if given is None:
            return
        if type(given) not in FACTORIZATIONS.values():
            raise DeclarationError(f"factorization must be CP(rank), TensorRing(ranks), …, or None; got {given!r}")
        given.check_levels(1)

    def lowerings(self) -> dict[str, dict[str, Any]]:
        """The declarations that `lowering = "auto"` leaves to choose from, by name; none if it is pinned."""
        declared = self.declaration()
        if declared.get("lowering") != "auto":
            return {}
        return {name: declared | {"lowering": name} for name in LOWERINGS[1:]}

    def only_lowering(self) -> str:
        """Why a routed mixture has one program alone, as half a sentence; empty if there is a choice, or no routing."""
        pinned = self.declaration().get("lowering", "auto")
        return "" if pinned == "auto" else f'the declaration asks for the {pinned} one; "auto" leaves a choice'

    def dim(self, key: str) -> Dim:
        """The field `key` as a dimension."""
        return as_dim(getattr(self, key), key)

    def dims(self, *keys: str) -> list[Dim]:
        """Those of the fields `keys` that are given, as dimensions, and the ranks of a factorization."""
        own = [self.dim(key) for key in keys if getattr(self, key) is not None]
        factorization = getattr(self, "factorization", None)
        return own + (list(factorization.dims()) if factorization is not None else [])

    def _plain_fields(self) -> dict[str, Any]:
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]  # every declaration is a dataclass
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def declaration(self) -> dict[str, Any]:
        """The mapping that declares it, as in a TOML file."""
        return {"kind": self.kind} | {key: _plain(value) for key, value in self._plain_fields().items()}

    def __str__(self) -> str:
        return ", ".join(f"{key}={_shown(value)}" for key, value in self._plain_fields().items())


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str | float):
        return value
    if isinstance(value, int | sympy.Expr):
        return dim_text(value)
    if isinstance(value, tuple):
        return [dim_text(v) for v in value] if len(value) > 1 else dim_text(value[0])
    return value.declaration()


def _shown(value: Any) -> Any:
    return _plain(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class NormedInput:
    """A layer's input, after its LayerNorm with weight and bias if it has one."""

    out: Value
    parameters: tuple[Parameter, ...] = ()
    nodes: tuple[LayerNorm, ...] = ()


def input_layer_norm(x: Value, wanted: bool) -> NormedInput:
    """`x` of indices (token, feature), normalised over its features if `wanted`."""
    if not wanted:
        return NormedInput(x)
    index = x.indices[-1]
    weight = Parameter("norm_weight", (index,), Ones(), "norm")
    bias = Parameter("norm_bias", (index,), Zeros(), "norm")
    values = (Value(p.name, p.indices, p.part) for p in (weight, bias))
    out = Value("x_norm", x.indices, "norm")
    return NormedInput(out, (weight, bias), (LayerNorm(out, x, index, *values),))


def with_values(spec: Any, values: Mapping[str, int]) -> Any:
    """A declaration with integers in place of symbols, wherever its fields have them."""
    if isinstance(spec, sympy.Expr):
        return evaluate(spec, values) if symbol_names([spec]) <= set(values) else spec
    if isinstance(spec, tuple):
        return tuple(with_values(v, values) for v in spec)
    if isinstance(spec, Mapping):
        return {k: with_values(v, values) for k, v in spec.items()}
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{f.name: with_values(getattr(spec, f.name), values) for f in fields(spec) if f.init})
    return spec
