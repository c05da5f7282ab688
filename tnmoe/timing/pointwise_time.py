"""Seconds of gates, GELU and norms, by measured rates, and what their gradients are made of."""

from __future__ import annotations

from collections.abc import Mapping

from tnmoe.errors import CostError, no_rule
from tnmoe.ir.pointwise_ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    GeluBackward,
    LayerNorm,
    PointwiseOp,
    Sigmoid,
    Softmax,
    Sparsemax,
)
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.device import entries
from tnmoe.timing.rates import Rates


def seconds(op: PointwiseOp, sizes: Mapping[str, Dim], rates: Rates, moved: int) -> float:
    """Seconds of an op whose operands, `moved` bytes with the result, lie where they lay when it was measured.

    Raises:
        CostError: an op of a backward pass, whose time is that of a gradient.
    """
    kind, least = type(op).__name__, moved / rates.bandwidth
    match op:
        case Sigmoid() | Gelu():
            return max(moved / rates.streams[kind].at(moved), least) + rates.overhead[kind]
        case Softmax() | Entmax15() | Sparsemax() | LayerNorm() | BatchNorm():
            count, length = entries(op.x.indices, sizes), entries((op.index,), sizes)
            return max(count / rates.rowwise[kind].at(count // length, length), least) + rates.overhead[kind]
        case GeluBackward():
            raise CostError(
                f"op {kind} has no time model: it is a gradient, which `predict_training` takes the time of"
            )
        case _:
            no_rule(op, "its time")


def python_statements(op: PointwiseOp) -> int:
    """Statements over all entries of a gradient that a function in Python makes; 0 where a kernel of torch does.

    Autograd's own for the square of `Entmax15` are included.
    """
    match op:
        case Entmax15():
            return 11
        case Sparsemax():
            return 7
        case Softmax() | Sigmoid() | Gelu() | GeluBackward() | LayerNorm() | BatchNorm():
            return 0
        case _:
            no_rule(op, "how its gradient is made")


def graph_nodes(op: PointwiseOp) -> int:
    """Nodes of autograd's graph that an op records."""
    match op:
        case Entmax15():  # its root, and the square of that
            return 2
        case Softmax() | Sparsemax() | Sigmoid() | Gelu() | GeluBackward() | LayerNorm() | BatchNorm():
            return 1
        case _:
            no_rule(op, "its nodes of autograd's graph")
