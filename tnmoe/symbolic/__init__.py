"""Sizes as integers or formulas, and questions about them over ranges."""
