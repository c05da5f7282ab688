"""Primitive ops that stand for several others whose results between them are never written.

What each one means, costs and must satisfy follows from the ops that it stands for: `unfused` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.errors import no_rule
from tnmoe.ir.contractions import Contract, ContractAdd, Multiply, matmul_groups
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


def unfused(op: FusedOp) -> tuple[Contract | ContractAdd | Multiply, ...]:
    """The ordinary ops that a fused op stands for, in order; the last one gives its result, the others write nothing.

    Their results have names that no value of a program has.
    """
    match op:
        case DualContract(out, lhs, rhs, bias, other_lhs, other_rhs, other_bias):
            first = product(_between(op, "first", lhs, rhs), lhs, rhs, bias)
            second = product(_between(op, "second", other_lhs, other_rhs), other_lhs, other_rhs, other_bias)
            return first, second, Multiply(out, first.out, second.out)
        case ContractMultiply(out, lhs, rhs, bias, factor):
            first = product(_between(op, "first", lhs, rhs), lhs, rhs, bias)
            return first, Multiply(out, first.out, factor)
        case ContractMix(out, mixer, lhs, rhs, bias):
            first = product(_between(op, "first", lhs, rhs), lhs, rhs, bias)
            return first, Contract(out, mixer, first.out)
        case _:
            no_rule(op, "what it stands for")


def product(out: Value, lhs: Value, rhs: Value, bias: Value | None) -> Contract | ContractAdd:
    """The contraction, with or without a bias."""
    return Contract(out, lhs, rhs) if bias is None else ContractAdd(out, lhs, rhs, bias)


def _between(op: FusedOp, which: str, lhs: Value, rhs: Value) -> Value:
    rows = tuple(i for i in lhs.indices if i not in rhs.indices)
    cols = tuple(i for i in rhs.indices if i not in lhs.indices)
    return Value(f"{which} of {op.out.name}", rows + cols, op.out.part)


def fault(op: FusedOp) -> str | None:
    """Why no kernel could compute the op, as a rule that it breaks; None if it breaks none.

    What `tnmoe.ir.program.verify` asks of the ops that it stands for comes on top.
    """
    *products, last = unfused(op)
    for made in products:
        assert isinstance(made, Contract | ContractAdd)
        groups = matmul_groups(made)
        if groups.batch or not groups.rows or not groups.cols:
            return "the product is not one of rows and columns"
        if isinstance(made, ContractAdd) and made.bias.indices != groups.cols:
            return "the bias is not one of the columns"
        if isinstance(last, Multiply) and {last.lhs.indices, last.rhs.indices} != {last.out.indices}:
            return "the factors differ in their axes"
        if isinstance(last, Contract):
            mix = matmul_groups(last)
            if mix.batch != groups.rows or len(mix.batch) != 1 or mix.inner + mix.cols != groups.cols or not mix.cols:
                return "the rows of the product are not what is mixed one by one"
    return None
