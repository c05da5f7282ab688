"""tnmoe: a tensor-network compiler and cost analyzer for mixture-of-experts layers.

Declare a layer, plan its contractions, emit a standalone torch module, and read its exact cost:

>>> import tnmoe
>>> layer = tnmoe.MuMoE(inputs=768, outputs=3072, experts=256, factorization=tnmoe.CP(rank=556))
>>> plan = tnmoe.plan(layer, tokens=4096)
>>> report = tnmoe.cost(plan)
>>> report.parameters, report.formula("parameters")
(2474540, I*N + R*(I + N + O + 1))
"""

from tnmoe._version import __version__
from tnmoe.api import build, cost, emit, from_reference, memory, to_reference
from tnmoe.calibrate import calibrate
from tnmoe.candidates import Candidate, shortlist
from tnmoe.check import check
from tnmoe.cost_report import CostReport
from tnmoe.counting.cost_model import cost_model
from tnmoe.counting.model_cost import ModelCost, ModuleCost
from tnmoe.counting.torch_formulas.registry import flop_formulas
from tnmoe.counting.work import Uncounted, Work
from tnmoe.crossover import Crossover, crossover
from tnmoe.datasheet import Datasheet, datasheet
from tnmoe.device_profile import DeviceProfile
from tnmoe.dims import symbol
from tnmoe.errors import (
    CostError,
    DeclarationError,
    EmitError,
    FileError,
    PlanError,
    ProgramError,
    RankWarning,
    TnmoeError,
)
from tnmoe.expert_rank import ExpertRank, ExpertRanks, expert_ranks
from tnmoe.explain import TokenRange, explain, token_range
from tnmoe.factorizations import (
    CP,
    BlockTerm,
    Custom,
    Dense,
    HierarchicalTucker,
    Kronecker,
    LowRank,
    Monarch,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tnmoe.files import load
from tnmoe.fit_ranks import FittedRanks, fit_ranks
from tnmoe.from_weights import Converted, CurvePoint, error_curve, from_experts, from_linear, stack_experts
from tnmoe.hardware import Prediction, predict
from tnmoe.layer import Layer
from tnmoe.layers import (
    MLP,
    PEER,
    SMILE,
    CartesianMoE,
    DeepMoE,
    DenseMoE,
    ExpertChoice,
    FactorizedLinear,
    Gate,
    Linear,
    MixtureOfDepths,
    MixtureOfHeads,
    MixtureOfTokens,
    MoEfied,
    MoLoRA,
    MoSLoRA,
    MoV,
    MultiHeadMoE,
    MuMoE,
    MuMoEBlock,
    ResidualMoE,
    SoftMoE,
    SparseMoE,
    TensorPoly,
    declare,
)
from tnmoe.measured import Measurement, measured
from tnmoe.memory_report import MemoryReport
from tnmoe.network import Network, Role, Tensor
from tnmoe.plan import Plan
from tnmoe.planners.atlas import atlas
from tnmoe.planners.atlas_orders import Atlas
from tnmoe.planning import pareto, plan
from tnmoe.program import Program
from tnmoe.replace import Replacement, replace
from tnmoe.safetensors_files import read_safetensors, write_safetensors
from tnmoe.slicing import Sliced, plan_sliced
from tnmoe.sweep import sweep
from tnmoe.training_time import TrainingPrediction, predict_training
from tnmoe.tune import tune
from tnmoe.tuned import Tuned
from tnmoe.writing import save

__all__ = [
    "CP",
    "MLP",
    "PEER",
    "SMILE",
    "Atlas",
    "BlockTerm",
    "Candidate",
    "CartesianMoE",
    "Converted",
    "CostError",
    "CostReport",
    "Crossover",
    "CurvePoint",
    "Custom",
    "Datasheet",
    "DeclarationError",
    "DeepMoE",
    "Dense",
    "DenseMoE",
    "DeviceProfile",
    "EmitError",
    "ExpertChoice",
    "ExpertRank",
    "ExpertRanks",
    "FactorizedLinear",
    "FileError",
    "FittedRanks",
    "Gate",
    "HierarchicalTucker",
    "Kronecker",
    "Layer",
    "Linear",
    "LowRank",
    "Measurement",
    "MemoryReport",
    "MixtureOfDepths",
    "MixtureOfHeads",
    "MixtureOfTokens",
    "MoEfied",
    "MoLoRA",
    "MoSLoRA",
    "MoV",
    "ModelCost",
    "ModuleCost",
    "Monarch",
    "MuMoE",
    "MuMoEBlock",
    "MultiHeadMoE",
    "Network",
    "Plan",
    "PlanError",
    "Prediction",
    "Program",
    "ProgramError",
    "RankWarning",
    "Replacement",
    "ResidualMoE",
    "Role",
    "Sliced",
    "SoftMoE",
    "SparseMoE",
    "Tensor",
    "TensorPoly",
    "TensorRing",
    "TensorTrain",
    "TnmoeError",
    "TokenRange",
    "TrainingPrediction",
    "Tucker",
    "Tuned",
    "Uncounted",
    "Work",
    "__version__",
    "atlas",
    "build",
    "calibrate",
    "check",
    "cost",
    "cost_model",
    "crossover",
    "datasheet",
    "declare",
    "emit",
    "error_curve",
    "expert_ranks",
    "explain",
    "fit_ranks",
    "flop_formulas",
    "from_experts",
    "from_linear",
    "from_reference",
    "load",
    "measured",
    "memory",
    "pareto",
    "plan",
    "plan_sliced",
    "predict",
    "predict_training",
    "read_safetensors",
    "replace",
    "save",
    "shortlist",
    "stack_experts",
    "sweep",
    "symbol",
    "to_reference",
    "token_range",
    "tune",
    "write_safetensors",
]
