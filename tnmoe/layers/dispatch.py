"""Dispatch, experts and combine, for choices of tokens and for tables of slots."""

from __future__ import annotations

import sympy

from tnmoe.factorizations.base import Factorization
from tnmoe.ir.routing_ops import Gather, ScatterAdd, SortSlots, Spread, Unsort, padded_rows
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder

BLOCK = 4
"""Rows that every expert has a multiple of by default, so that no token's result depends, to the bit, on how many
others share its expert; see docs/decisions/rows-in-blocks.md."""


def chosen_experts(
    b: Builder,
    prefix: str,
    x: Value,
    shares: Value | None,
    positions: Value,
    hidden: str | None,
    y: Value,
    *,
    bias: bool,
    last_bias: bool | None = None,
    factorization: Factorization | None = None,
    column: str = "n",
    block: int = BLOCK,
    lowering: str = "gathered",
) -> Value:
    """y[t] = Σ_k shares[t, k] · expert positions[t, k] of x[t], none dropped; without `shares` a plain sum.

    Full matrices meet rows sorted by expert (`last_bias`: whether the second of two has a bias, by default as the
    first); of factorized ones the chosen entries are gathered. The `lowering` "masked" runs every expert on every token
    and mixes their results with shares (or ones) that are zero but for the chosen ones. Either adds to the layer's
    coefficients what it mixes with.
    """
    token, slot = positions.indices
    part = f"{prefix}down" if hidden else f"{prefix}experts"
    last = bias if last_bias is None else last_bias
    if lowering == "masked":
        mixed = Value(f"{prefix}coefficients", (token, "n"), f"{prefix}gate")
        b.add(Spread(mixed, shares, positions, "n"))
        b.coefficients += (mixed.name,)
        out = Value(y.name, y.indices, part)
        return b.experts(prefix, x, hidden, out, bias=bias, last_bias=last, factorization=factorization, mix=mixed)
    b.coefficients += tuple(v.name for v in (shares, positions) if v is not None)
    outputs = Value(f"{prefix}expert_outputs", (token, slot, y.indices[-1]), part)
    if factorization is not None and factorization.kind != "dense":
        b.gathered_experts(prefix, x, positions, hidden, outputs, bias=bias, factorization=factorization)
    else:
        row, dispatch = f"{prefix}m", f"{prefix}dispatch"
        choices = sympy.sympify(b.sizes.sizes[token]) * b.sizes.sizes[slot]
        every = f"{prefix}s"
        b.length(every, choices)
        b.length(row, padded_rows(choices, sympy.sympify(b.sizes.sizes[column]), block))
        slots = Value(f"{prefix}slots", (every,), dispatch, True)
        rows = Value(f"{prefix}rows", (row,), dispatch, True)
        counts = Value(f"{prefix}counts", (column,), dispatch, True)
        b.add(SortSlots(slots, rows, counts, positions, block))
        u = Value(f"{prefix}dispatched", (row, x.indices[-1]), dispatch)
        b.add(Gather(u, x, rows, token))
        v = Value(f"{prefix}sorted_outputs", (row, y.indices[-1]), part)
        b.grouped_experts(prefix, u, counts, hidden, v, bias=bias, last_bias=last)
        outputs = Value(outputs.name, outputs.indices, y.part)
        b.add(Unsort(outputs, v, slots))
    return b.network(y, outputs) if shares is None else b.network(y, shares, outputs)


def slot_experts(
    b: Builder,
    x: Value,
    held: Value,
    rows: Value,
    hidden: str | None,
    y: Value,
    *,
    bias: bool,
    factorization: Factorization | None = None,
) -> Value:
    """Every expert on its table of slots, by batched products: `rows[n, c]` are tokens of `x`, `held[n, c]` shares."""
    token = x.indices[0]
    u = Value("dispatched", (*rows.indices, x.indices[-1]), "dispatch")
    b.add(Gather(u, x, rows, token))
    v = Value("expert_outputs", (*rows.indices, y.indices[-1]), "down" if hidden else "experts")
    b.experts("", u, hidden, v, bias=bias, factorization=factorization)
    weighted = b.network(Value("weighted", v.indices, "combine"), held, v)
    b.add(ScatterAdd(y, weighted, rows, token))
    return y
