"""The ideal twin of a plan: no token runs through an expert that it did not choose, and no row fills up a block."""

from __future__ import annotations

from dataclasses import replace

from tnmoe.ir.layer import Layer, Node
from tnmoe.ir.routing_ops import CapacitySlots, SortSlots, Spread
from tnmoe.layers.kinds import declare
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan


def ideal_plan(planned: Plan) -> Plan | None:
    """The plan of the same mixture whose tokens run through their chosen experts alone; None if they do so already."""
    layer = planned.layer
    if any(isinstance(node, Spread | CapacitySlots) for node in layer.nodes):
        layer = declare({k: v for k, v in layer.declaration.items() if k not in ("lowering", "capacity")})
    layer = _unpadded(layer)
    if layer == planned.layer:
        return None
    values = {k: v for k, v in planned.values.items() if k in layer.free_symbols - {layer.token_symbol}}
    tokens = planned.values[planned.layer.token_symbol]
    alone = plan(layer, tokens=tokens, sizes=values, input_gradients=planned.input_gradients)
    return None if alone.flops == planned.flops else alone  # few tokens fill no blocks


def _unpadded(layer: Layer) -> Layer:
    """The same layer without the rows that fill up an expert's blocks."""
    sizes = dict(layer.sizes)
    nodes: list[Node] = []
    for node in layer.nodes:
        if isinstance(node, SortSlots):
            sizes[node.rows.indices[0]] = sizes[node.out.indices[0]]
            node = replace(node, block=1)
        nodes.append(node)
    return replace(layer, nodes=tuple(nodes), sizes=sizes)
