"""Pieces that several layers share."""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.errors import DeclarationError
from tnmoe.initialise import Ones, Zeros
from tnmoe.layer import Parameter
from tnmoe.ops import LayerNorm, Value


@dataclass(frozen=True, slots=True)
class NormedInput:
    """A LayerNorm with weight and bias over the features of a layer's input."""

    parameters: tuple[Parameter, Parameter]
    node: LayerNorm


def input_layer_norm(x: Value) -> NormedInput:
    """Normalise `x` of indices (token, feature)."""
    index = x.indices[-1]
    weight = Parameter("norm_weight", (index,), Ones(), "norm")
    bias = Parameter("norm_bias", (index,), Zeros(), "norm")
    values = (Value(p.name, p.indices, p.part) for p in (weight, bias))
    return NormedInput((weight, bias), LayerNorm(Value("x_norm", x.indices, "norm"), x, index, *values))


def check_flag(value: object, what: str) -> None:
    """Raise `DeclarationError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise DeclarationError(f"{what} must be true or false, got {value!r}")
