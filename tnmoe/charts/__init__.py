"""Figures for papers and notebooks, drawn by matplotlib (the extra `plots`). Each carries the numbers it shows."""
