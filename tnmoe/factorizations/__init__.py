"""Factorizations of a weight tensor, one file each."""
