"""Seconds of one op by measured rates, and the calls of torch that it makes: family by family."""

from __future__ import annotations

from collections.abc import Mapping

from tnmoe.costing.traffic import forward_traffic
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.fused_ops import FusedOp, unfused
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.symbolic.dims import Dim
from tnmoe.timing import contraction_time, pointwise_time, routing_time
from tnmoe.timing.device import entries
from tnmoe.timing.rates import Products, Rates


def moved_bytes(op: Op, sizes: Mapping[str, Dim], itemsize: int) -> int:
    """Bytes of an op's operands and results; one that routes reads what is chosen alone."""
    if isinstance(op, RoutingOp):
        traffic = forward_traffic(op, sizes)
        return itemsize * max(1, int(traffic.read + traffic.written))
    return itemsize * sum(entries(v.indices, sizes) for v in (*operands(op), *results(op)))


def measured_seconds(
    op: Op, sizes: Mapping[str, Dim], rates: Rates, itemsize: int, moved: int, fast: Products | None
) -> float:
    """Seconds of an op whose operands, `moved` bytes with the result, lie where they lay when it was measured."""
    if isinstance(op, ContractionOp):
        return contraction_time.seconds(op, sizes, rates, itemsize, moved, fast)
    if isinstance(op, PointwiseOp):
        return pointwise_time.seconds(op, sizes, rates, moved)
    if isinstance(op, RoutingOp):
        return routing_time.seconds(op, sizes, rates, itemsize, moved)
    if isinstance(op, FusedOp):  # a profile times no kernels: as the public products that it stands for
        parts = unfused(op)
        return sum(measured_seconds(p, sizes, rates, itemsize, moved_bytes(p, sizes, itemsize), None) for p in parts)
    no_rule(op, "its time")


def torch_calls(op: Op, sizes: Mapping[str, Dim]) -> int:
    """Calls of torch that an op makes, its views aside: each is looked up and launched.

    One for each op but those that route: contractions, pointwise and fused ops are emitted as one call each.
    """
    if isinstance(op, RoutingOp):
        return routing_time.calls(op, sizes)
    if isinstance(op, ContractionOp | PointwiseOp | FusedOp):
        return 1
    no_rule(op, "its calls of torch")


def graph_nodes(op: Op, sizes: Mapping[str, Dim]) -> int:
    """Nodes of autograd's graph that an op records, one for each differentiated call of torch, views included."""
    if isinstance(op, ContractionOp):
        return contraction_time.graph_nodes(op)
    if isinstance(op, PointwiseOp):
        return pointwise_time.graph_nodes(op)
    if isinstance(op, RoutingOp):
        return routing_time.graph_nodes(op, sizes)
    if isinstance(op, FusedOp):  # it is in functions with a backward pass of their own, each of which is one node
        return 1
    no_rule(op, "its nodes of autograd's graph")
