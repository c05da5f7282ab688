"""Factorizations of a weight tensor, one file each; the file name is the public name."""

from tnmoe.factorizations.block_term import BlockTerm
from tnmoe.factorizations.cp import CP
from tnmoe.factorizations.custom import Custom
from tnmoe.factorizations.dense import Dense
from tnmoe.factorizations.hierarchical_tucker import HierarchicalTucker
from tnmoe.factorizations.kronecker import Kronecker
from tnmoe.factorizations.low_rank import LowRank
from tnmoe.factorizations.monarch import Monarch
from tnmoe.factorizations.tensor_ring import TensorRing
from tnmoe.factorizations.tensor_train import TensorTrain
from tnmoe.factorizations.tucker import Tucker

AnyFactorization = (
    CP
    | TensorRing
    | Dense
    | TensorTrain
    | Tucker
    | HierarchicalTucker
    | BlockTerm
    | LowRank
    | Kronecker
    | Monarch
    | Custom
)

FACTORIZATIONS: dict[str, type[AnyFactorization]] = {c.kind: c for c in AnyFactorization.__args__}
