"""Declarations of layers, one family a file, and what they become."""
