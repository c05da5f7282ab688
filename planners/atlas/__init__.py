"""Atlases: every order of contraction that matters within bounds, with a proof."""
