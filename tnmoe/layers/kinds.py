"""Layer families, one file each, and the one function that makes a layer from a plain mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from tnmoe.errors import DeclarationError, unknown
from tnmoe.factorizations.base import Factorization
from tnmoe.factorizations.kinds import FACTORIZATIONS
from tnmoe.ir.layer import Layer, network_layer
from tnmoe.ir.network import Network
from tnmoe.layers.cartesian_moe import CartesianMoE
from tnmoe.layers.deep_moe import DeepMoE
from tnmoe.layers.dense_moe import DenseMoE
from tnmoe.layers.expert_choice import ExpertChoice
from tnmoe.layers.factorized import FactorizedLinear
from tnmoe.layers.gate import Gate
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
from tnmoe.symbolic.dims import Dim, as_dim

Spec = (
    MuMoE
    | MuMoEBlock
    | FactorizedLinear
    | Linear
    | MLP
    | DenseMoE
    | SparseMoE
    | ExpertChoice
    | SoftMoE
    | MixtureOfTokens
    | MixtureOfDepths
    | PEER
    | MultiHeadMoE
    | MoLoRA
    | MoV
    | MoSLoRA
    | TensorPoly
    | CartesianMoE
    | DeepMoE
    | ResidualMoE
    | SMILE
    | MoEfied
    | MixtureOfHeads
)

KINDS: dict[str, type[Spec]] = {c.kind: c for c in Spec.__args__}


def declare(mapping: Mapping[str, Any]) -> Layer:
    """The layer that a mapping declares: a TOML file's `[layer]`, or a plan's `declaration`.

    Raises:
        DeclarationError: naming the key, its value and what is allowed.
    """
    if not isinstance(mapping, Mapping):
        raise DeclarationError(f"a layer must be a table of keys, got {mapping!r}")
    kind = mapping.get("kind")
    if kind == "network":
        return _network(mapping)
    if "kind" not in mapping:
        raise DeclarationError(f"kind is missing; it is one of {', '.join([*KINDS, 'network'])}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DeclarationError(unknown("kind", kind, [*KINDS, "network"]))
    spec = KINDS[kind]
    given = {k: v for k, v in mapping.items() if k != "kind"}
    required = [f.name for f in fields(spec) if f.default is MISSING and f.default_factory is MISSING]
    check_keys(given, [f.name for f in fields(spec)], required, "")
    if "factorization" in given:
        given["factorization"] = _factorization(given["factorization"])
    if "gate" in given:
        given["gate"] = _gate(given["gate"])
    return spec(**given).layer()


def check_keys(given: Mapping[str, Any], allowed: list[str], required: list[str], where: str) -> None:
    """Raise `DeclarationError` for a key that is not allowed, or one that is missing."""
    for key in given:
        if key not in allowed:
            raise DeclarationError(unknown(f"{where}key", key, allowed))
    missing = [k for k in required if k not in given]
    if missing:
        raise DeclarationError(f"{where}{missing[0]} is missing; required are {', '.join(required)}")


def _factorization(given: object) -> Factorization:
    if not isinstance(given, Mapping):
        raise DeclarationError(f'factorization must be a table such as {{ kind = "cp", rank = 64 }}, got {given!r}')
    if "kind" not in given:
        raise DeclarationError(f"factorization.kind is missing; it is one of {', '.join(FACTORIZATIONS)}")
    kind = given["kind"]
    if not isinstance(kind, str) or kind not in FACTORIZATIONS:
        raise DeclarationError(unknown("factorization.kind", kind, list(FACTORIZATIONS)))
    made = FACTORIZATIONS[kind]
    rest = {k: v for k, v in given.items() if k != "kind"}
    required = [f.name for f in fields(made) if f.default is MISSING and f.default_factory is MISSING]
    check_keys(rest, [f.name for f in fields(made)], required, "factorization.")
    try:
        return made(**rest)
    except DeclarationError as error:
        raise DeclarationError(f"factorization.{error}") from None


def _gate(given: object) -> Gate:
    if not isinstance(given, Mapping):
        raise DeclarationError(
            f'gate must be a table such as {{ activation = "entmax15", norm = "batch" }}, got {given!r}'
        )
    check_keys(given, ["activation", "norm"], [], "gate.")
    return Gate(**given)


def _network(mapping: Mapping[str, Any]) -> Layer:
    if "tensors" in mapping:  # a network that no expression says, as plans keep it
        check_keys(mapping, ["kind", "tensors", "output", "bias", "sizes"], ["tensors", "output"], "")
    else:
        check_keys(mapping, ["kind", "expression", "weights", "frozen", "sizes"], ["expression"], "")
    sizes = mapping.get("sizes", {})
    if not isinstance(sizes, Mapping):
        raise DeclarationError(f"sizes must be a table such as {{ n = 256 }}, got {sizes!r}")
    dims: dict[str, Dim] = {str(k): as_dim(v, f"sizes.{k}") for k, v in sizes.items()}
    return network_layer(Network.from_mapping(mapping), dims)
