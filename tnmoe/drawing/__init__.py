"""Diagrams as data: tensor networks and contraction trees, as SVG alone, or as PNG and PDF with matplotlib."""

from tnmoe.drawing.contraction_tree import contraction_tree
from tnmoe.drawing.graph import Node, network_graph
from tnmoe.drawing.scene import Scene

__all__ = ["Node", "Scene", "contraction_tree", "network_graph"]
