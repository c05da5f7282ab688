"""Planners: from a network, its sizes and an objective to a contraction path; one algorithm a file."""
