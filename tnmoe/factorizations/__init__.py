"""Factorizations of a weight tensor, one file each; the file name is the public name."""

from tnmoe.factorizations.base import Factorization, Factors, Modes, Sizes
from tnmoe.factorizations.cp import CP
from tnmoe.factorizations.dense import Dense
from tnmoe.factorizations.tensor_ring import TensorRing

FACTORIZATIONS: dict[str, type[CP] | type[TensorRing] | type[Dense]] = {c.kind: c for c in (CP, TensorRing, Dense)}

__all__ = ["CP", "FACTORIZATIONS", "Dense", "Factorization", "Factors", "Modes", "Sizes", "TensorRing"]
