"""From a plan to source and to a live module."""
