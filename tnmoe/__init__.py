"""tnmoe: a tensor-network compiler and cost analyzer for mixture-of-experts layers.

Declare a layer, plan its contractions, emit a standalone torch module, and read its exact cost:

>>> import tnmoe
>>> layer = tnmoe.MuMoE(inputs=768, outputs=3072, experts=256, factorization=tnmoe.CP(rank=556))
>>> plan = tnmoe.plan(layer, tokens=4096)
>>> report = tnmoe.cost(plan)
>>> report.parameters, report.formula("parameters")
(2474540, I*N + R*(I + N + O + 1))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tnmoe._version import __version__

if TYPE_CHECKING:
    from tnmoe.analysis.crossover import Crossover, crossover
    from tnmoe.analysis.expert_rank import ExpertRank, ExpertRanks, expert_ranks
    from tnmoe.analysis.explain import TokenRange, explain, token_range
    from tnmoe.analysis.fit_ranks import FittedRanks, fit_ranks
    from tnmoe.analysis.sweep import sweep
    from tnmoe.charts.breakdown import cost_breakdown
    from tnmoe.charts.chart import Chart
    from tnmoe.charts.experts import against_experts
    from tnmoe.charts.front import pareto_front
    from tnmoe.charts.regions import winner_regions
    from tnmoe.charts.roofline import roofline_chart
    from tnmoe.charts.timeline import memory_timeline
    from tnmoe.charts.trade import pareto_chart
    from tnmoe.counting.cost_model import cost_model
    from tnmoe.counting.model_cost import ModelCost, ModuleCost
    from tnmoe.counting.torch_formulas.registry import flop_formulas
    from tnmoe.counting.work import Uncounted, Work
    from tnmoe.emission.build import build
    from tnmoe.emission.emit import emit
    from tnmoe.emission.slicing import Sliced, plan_sliced
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
    from tnmoe.io.files import save
    from tnmoe.ir.layer import Layer
    from tnmoe.ir.network import Network, Tensor
    from tnmoe.ir.program import Program
    from tnmoe.ir.value import Role
    from tnmoe.layers.cartesian_moe import CartesianMoE
    from tnmoe.layers.deep_moe import DeepMoE
    from tnmoe.layers.dense_moe import DenseMoE
    from tnmoe.layers.expert_choice import ExpertChoice
    from tnmoe.layers.factorized import FactorizedLinear
    from tnmoe.layers.gate import Gate
    from tnmoe.layers.kinds import Spec, declare
    from tnmoe.layers.linear import MLP, Linear
    from tnmoe.layers.lora import MoLoRA, MoSLoRA, MoV
    from tnmoe.layers.mixture_of_depths import MixtureOfDepths
    from tnmoe.layers.mixture_of_heads import MixtureOfHeads
    from tnmoe.layers.mixture_of_tokens import MixtureOfTokens
    from tnmoe.layers.moefied import MoEfied
    from tnmoe.layers.multi_head_moe import MultiHeadMoE
    from tnmoe.layers.mumoe import MuMoE, MuMoEBlock
    from tnmoe.layers.peer import PEER
    from tnmoe.layers.residual_moe import ResidualMoE
    from tnmoe.layers.smile import SMILE
    from tnmoe.layers.soft_moe import SoftMoE
    from tnmoe.layers.sparse_moe import SparseMoE
    from tnmoe.layers.tensor_poly import TensorPoly
    from tnmoe.layers.toml import load
    from tnmoe.measuring.calibrate import calibrate
    from tnmoe.measuring.check import check
    from tnmoe.measuring.measured import Measurement, measured
    from tnmoe.measuring.tune import tune
    from tnmoe.measuring.tuned import Tuned
    from tnmoe.planners.atlas.atlas import Atlas
    from tnmoe.planners.atlas.make import atlas
    from tnmoe.planning.candidates import Candidate, shortlist
    from tnmoe.planning.plan import Plan
    from tnmoe.planning.plan_layer import pareto, plan
    from tnmoe.planning.request import PLANNERS
    from tnmoe.presets.registry import PRESETS
    from tnmoe.reports.calls import cost, memory
    from tnmoe.reports.cost_report import CostReport, comparison
    from tnmoe.reports.memory_report import MemoryReport
    from tnmoe.symbolic.dims import symbol
    from tnmoe.timing.datasheet import Datasheet, datasheet
    from tnmoe.timing.device_profile import DeviceProfile
    from tnmoe.timing.predict import Prediction, predict
    from tnmoe.timing.predict_training import TrainingPrediction, predict_training
    from tnmoe.weights.from_weights import (
        Converted,
        CurvePoint,
        error_curve,
        from_experts,
        from_linear,
        stack_experts,
    )
    from tnmoe.weights.reference_format import from_reference, to_reference
    from tnmoe.weights.replace import Replacement, replace
    from tnmoe.weights.safetensors_files import read_safetensors, write_safetensors

__all__ = [
    "CP",
    "MLP",
    "PEER",
    "PLANNERS",
    "PRESETS",
    "SMILE",
    "Atlas",
    "BlockTerm",
    "Candidate",
    "CartesianMoE",
    "Chart",
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
    "Spec",
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
    "against_experts",
    "atlas",
    "build",
    "calibrate",
    "check",
    "comparison",
    "cost",
    "cost_breakdown",
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
    "memory_timeline",
    "pareto",
    "pareto_chart",
    "pareto_front",
    "plan",
    "plan_sliced",
    "predict",
    "predict_training",
    "read_safetensors",
    "replace",
    "roofline_chart",
    "save",
    "shortlist",
    "stack_experts",
    "sweep",
    "symbol",
    "to_reference",
    "token_range",
    "tune",
    "winner_regions",
    "write_safetensors",
]

_ROOMS = {
    "analysis.crossover": "Crossover crossover",
    "analysis.expert_rank": "ExpertRank ExpertRanks expert_ranks",
    "analysis.explain": "TokenRange explain token_range",
    "analysis.fit_ranks": "FittedRanks fit_ranks",
    "analysis.sweep": "sweep",
    "charts.breakdown": "cost_breakdown",
    "charts.chart": "Chart",
    "charts.experts": "against_experts",
    "charts.front": "pareto_front",
    "charts.regions": "winner_regions",
    "charts.roofline": "roofline_chart",
    "charts.timeline": "memory_timeline",
    "charts.trade": "pareto_chart",
    "counting.cost_model": "cost_model",
    "counting.model_cost": "ModelCost ModuleCost",
    "counting.torch_formulas.registry": "flop_formulas",
    "counting.work": "Uncounted Work",
    "emission.build": "build",
    "emission.emit": "emit",
    "emission.slicing": "Sliced plan_sliced",
    "errors": "CostError DeclarationError EmitError FileError PlanError ProgramError RankWarning TnmoeError",
    "factorizations.block_term": "BlockTerm",
    "factorizations.cp": "CP",
    "factorizations.custom": "Custom",
    "factorizations.dense": "Dense",
    "factorizations.hierarchical_tucker": "HierarchicalTucker",
    "factorizations.kronecker": "Kronecker",
    "factorizations.low_rank": "LowRank",
    "factorizations.monarch": "Monarch",
    "factorizations.tensor_ring": "TensorRing",
    "factorizations.tensor_train": "TensorTrain",
    "factorizations.tucker": "Tucker",
    "io.files": "save",
    "ir.layer": "Layer",
    "ir.network": "Network Tensor",
    "ir.program": "Program",
    "ir.value": "Role",
    "layers.cartesian_moe": "CartesianMoE",
    "layers.deep_moe": "DeepMoE",
    "layers.dense_moe": "DenseMoE",
    "layers.expert_choice": "ExpertChoice",
    "layers.factorized": "FactorizedLinear",
    "layers.gate": "Gate",
    "layers.kinds": "Spec declare",
    "layers.linear": "MLP Linear",
    "layers.lora": "MoLoRA MoSLoRA MoV",
    "layers.mixture_of_depths": "MixtureOfDepths",
    "layers.mixture_of_heads": "MixtureOfHeads",
    "layers.mixture_of_tokens": "MixtureOfTokens",
    "layers.moefied": "MoEfied",
    "layers.multi_head_moe": "MultiHeadMoE",
    "layers.mumoe": "MuMoE MuMoEBlock",
    "layers.peer": "PEER",
    "layers.residual_moe": "ResidualMoE",
    "layers.smile": "SMILE",
    "layers.soft_moe": "SoftMoE",
    "layers.sparse_moe": "SparseMoE",
    "layers.tensor_poly": "TensorPoly",
    "layers.toml": "load",
    "measuring.calibrate": "calibrate",
    "measuring.check": "check",
    "measuring.measured": "Measurement measured",
    "measuring.tune": "tune",
    "measuring.tuned": "Tuned",
    "planners.atlas.atlas": "Atlas",
    "planners.atlas.make": "atlas",
    "planning.candidates": "Candidate shortlist",
    "planning.plan": "Plan",
    "planning.plan_layer": "pareto plan",
    "planning.request": "PLANNERS",
    "presets.registry": "PRESETS",
    "reports.calls": "cost memory",
    "reports.cost_report": "CostReport comparison",
    "reports.memory_report": "MemoryReport",
    "symbolic.dims": "symbol",
    "timing.datasheet": "Datasheet datasheet",
    "timing.device_profile": "DeviceProfile",
    "timing.predict": "Prediction predict",
    "timing.predict_training": "TrainingPrediction predict_training",
    "weights.from_weights": "Converted CurvePoint error_curve from_experts from_linear stack_experts",
    "weights.reference_format": "from_reference to_reference",
    "weights.replace": "Replacement replace",
    "weights.safetensors_files": "read_safetensors write_safetensors",
}
"""Where each public name lives. It is imported when it is first asked for: `import tnmoe` costs next to nothing."""

_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tnmoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tnmoe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
