"""Figures for papers and notebooks, drawn by matplotlib (the extra `plots`). Each carries the numbers it shows."""

from tnmoe.charts.breakdown import cost_breakdown
from tnmoe.charts.chart import Chart
from tnmoe.charts.experts import against_experts
from tnmoe.charts.front import pareto_front
from tnmoe.charts.regions import winner_regions
from tnmoe.charts.roofline import roofline_chart
from tnmoe.charts.timeline import memory_timeline
from tnmoe.charts.trade import pareto_chart

__all__ = [
    "Chart",
    "against_experts",
    "cost_breakdown",
    "memory_timeline",
    "pareto_chart",
    "pareto_front",
    "roofline_chart",
    "winner_regions",
]
