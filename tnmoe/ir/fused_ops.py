"""Primitive ops that stand for several others whose results between them are never written.

What each one means, costs and must satisfy follows from the ops that it stands for: `tnmoe.ir.unfused` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.ir.value import Value


@dataclass(frozen=True, slots=True)
class DualContract:
    """Product, entry by entry, of two matrix products with the same rows and columns, neither of which is written.

    `out = (lhs · rhs + bias) ⊙ (other_lhs · other_rhs + other_bias)`; a bias has one number a column, or is missing.
    """

    out: Value
    lhs: Value
    rhs: Value
    bias: Value | None
    other_lhs: Value
    other_rhs: Value
    other_bias: Value | None


@dataclass(frozen=True, slots=True)
class ContractMultiply:
    """A matrix product that is never written, times a factor of its shape: `out = (lhs · rhs + bias) ⊙ factor`."""

    out: Value
    lhs: Value
    rhs: Value
    bias: Value | None
    factor: Value


@dataclass(frozen=True, slots=True)
class ContractMix:
    """A matrix product that is never written, mixed within each of its rows by a small matrix of that row.

    `out[t, m, c] = Σ_k mixer[t, m, k] (lhs · rhs + bias)[t, k, c]`, where `rhs` has the columns (k, c).
    """

    out: Value
    mixer: Value
    lhs: Value
    rhs: Value
    bias: Value | None


FusedOp = DualContract | ContractMultiply | ContractMix
