"""Which formula an operation has. The tables of all families are one, by names such as `aten::mm`.

Names, and not the operations themselves, since no torch has all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tnmoe.counting.torch_formulas import (
    attention,
    convolutions,
    encoder,
    grouped,
    moves,
    norms,
    pointwise,
    products,
    recurrent,
    reductions,
)
from tnmoe.counting.torch_formulas.call import (
    Call,
    Formula,
    Moved,
    elementwise,
    nothing,
    packed_bytes,
    storages,
    tensor_bytes,
)

MULTIPLY = (products, grouped, attention, convolutions, recurrent, encoder)
"""The families with products of matrices."""

FORMULAS: dict[str, Formula] = {
    name: formula
    for family in (*MULTIPLY, pointwise, norms, reductions, moves)
    for name, formula in family.FORMULAS.items()
}

_MOVED: dict[str, Moved] = grouped.MOVED | moves.MOVED


def formula_of(func: Any) -> Formula | None:
    """The formula of an `OpOverload`; None if it has none, so that it must be named.

    Views compute nothing; what torch tags as pointwise is one FLOP an element if no table says otherwise.
    """
    name = func._schema.name
    if (formula := FORMULAS.get(name)) is not None:
        return formula
    if func.is_view:
        return nothing
    if name.startswith("aten::") and torch.Tag.pointwise in func.tags:
        return elementwise()
    return None


def moved_bytes(func: Any, call: Call) -> tuple[int, int]:
    """Bytes that a call reads and writes: operands once each, and results that are no views of them."""
    if (moved := _MOVED.get(func._schema.name)) is not None:
        return moved(call)
    given, made = call.tensors, call.results
    if not func._schema.is_mutable:
        owners = storages(given)
        made = [t for t in made if not storages([t]) & owners]
    if not made:
        return 0, 0
    return sum(map(tensor_bytes, given)) + packed_bytes(call), sum(map(tensor_bytes, made))


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of matmul FLOPs for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=…)`.

    With it, torch's own counter sees grouped products, attention on CPUs, the encoder's fast path, quantised layers and
    what emitted modules of the flavour `fast` call, as `tnmoe.cost_model` counts them. Attention is counted in full,
    its backward pass without scores computed anew.
    """
    formulas: dict[Any, Callable[..., int]] = {}
    for family in MULTIPLY:
        for name, formula in family.FORMULAS.items():
            namespace, _, short = name.partition("::")
            try:
                packet = getattr(getattr(torch.ops, namespace), short)
                formulas[packet] = _raw(getattr(packet, packet.overloads()[0]), formula)
            except AttributeError:  # not in this torch
                continue
    return formulas


def _raw(func: Any, formula: Formula) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(Call.of(func, args, kwargs, out_val)).matmul

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
    return count
