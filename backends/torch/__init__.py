"""A program as the source of a torch module."""
