"""A factorized linear map, mixed by expert coefficients or plain; and the layer that is nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Declared, Factorization, Factors, Modes, Sizes
from tnmoe.factorizations.kinds import FACTORIZATIONS
from tnmoe.ir.contractions import Add, Merge, Split
from tnmoe.ir.layer import DYNAMIC, Contraction, ExpertMap, Layer, Node
from tnmoe.ir.network import FoldedBias, Network, Tensor
from tnmoe.ir.value import Parameter, Role, Value
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Dim, Size


@dataclass(frozen=True, slots=True)
class FactorizedMap:
    """The nodes of one map, the weights they store, and the value they define."""

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    out: Value


def factorized_map(
    factorization: Factorization,
    sizes: Sizes,
    *,
    prefix: str,
    x: Value,
    out: Value,
    coefficients: tuple[Value, ...] = (),
    gate_sums: tuple[tuple[Dim, Dim], ...] = (),
    bias: bool,
) -> FactorizedMap:
    """Σ a¹ … a^E x̃ W̃: the network of one linear map over the last index of `x`, with its factors.

    Args:
        factorization: of W̃.
        sizes: has those of all indices of the values; gets those of the bonds.
        prefix: of all names; it is also the part of the layer that the nodes serve.
        x, out: the input, whose last index is mapped, and the result.
        coefficients: one value a level, whose last index is the experts'; none for a plain map.
        gate_sums: of each level, see `Modes`.
        bias: add one, mixed like the weights.
    """
    i, o = x.indices[-1], out.indices[-1]
    experts = tuple(a.indices[-1] for a in coefficients)
    modes = Modes(experts, i, o, sizes.sizes[i], gate_sums)
    factors = factorization.factors(modes, sizes, prefix=prefix, bias=bias)
    part = prefix.rstrip("_")
    nodes: list[Node] = []
    before = x
    linear = Value(f"{out.name}_linear" if factors.added else out.name, out.indices, part)
    raw = linear
    for split in factors.splits:
        if split.index == i:
            before = Value(f"{prefix}x_parts", (*x.indices[:-1], *split.parts), part)
            nodes.append(Split(before, x, i, split.parts, split.padded))
        else:
            raw = Value(f"{prefix}parts", (*out.indices[:-1], *split.parts), part)
    network = _network(factors, (*coefficients, before), raw, i)
    stand_in = {"x": before.name} | {f"a{e + 1}": a.name for e, a in enumerate(coefficients)}
    names = {frozenset(stand_in.get(n, n) for n in subset): name for subset, name in factors.names.items()}
    nodes.append(Contraction(raw, network, ExpertMap(i, o, experts, factors.splits), names))
    nodes += [Merge(linear, raw, o, s.parts, s.padded) for s in factors.splits if s.index == o]
    stored = factors.parameters + tuple(p for p in (factors.bias, factors.added) if p is not None)
    if factors.added is not None:
        nodes += _added(factors.added, coefficients, linear, Value(out.name, out.indices, part))
    return FactorizedMap(tuple(nodes), stored, Value(out.name, out.indices, part))


def _network(factors: Factors, data: tuple[Value, ...], out: Value, index: str) -> Network:
    leaves = tuple(Tensor(v.name, v.indices) for v in data) + factors.tensors
    folded = None
    if factors.bias is not None:
        tensor = Tensor(factors.bias.name, factors.bias.indices, Role.WEIGHT)
        folded = FoldedBias(index, data[-1].name, factors.input, tensor)
    return Network(leaves, out.indices, folded)


def _added(bias: Parameter, coefficients: tuple[Value, ...], linear: Value, out: Value) -> list[Node]:
    """`linear` plus a bias of its own, which the coefficients mix first."""
    shift = Value(bias.name, bias.indices, bias.part)
    if not coefficients:
        return [Add(out, linear, shift)]
    data = tuple(Tensor(a.name, a.indices) for a in coefficients)
    mixed = Value(f"{out.name}_bias", (*coefficients[0].indices[:-1], out.indices[-1]), out.part)
    network = Network((*data, Tensor(bias.name, bias.indices, bias.role)), mixed.indices)
    return [Contraction(mixed, network), Add(out, linear, mixed)]


def check_factorization(factorization: object, levels: int) -> None:
    """Raise `DeclarationError` unless it is a factorization whose ranks fit that many levels of experts."""
    if not isinstance(factorization, Declared):  # of the package or a user's own
        known = ", ".join(c.__name__ for c in FACTORIZATIONS.values())
        raise DeclarationError(
            f"factorization must be one of {known}, with its ranks, e.g. CP(rank=64); got {factorization!r}"
        )
    factorization.check_levels(levels)


@dataclass(frozen=True, slots=True)
class FactorizedLinear(Declaration):
    """y = x W + b with a factorized W, mapping (..., inputs) to (..., outputs); starts with nn.Linear's variance.

    Args:
        inputs, outputs: widths; ints, symbols or expressions in text.
        factorization: of W, with modes i and o alone: `TensorTrain((64,))` is a plain low-rank map.
        bias: add one.

    Raises:
        DeclarationError: a size below 1, or ranks that do not fit two modes.
    """

    inputs: Size
    outputs: Size
    factorization: Factorization
    bias: bool = True
    kind: ClassVar[str] = "factorized_linear"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs")
        check_factorization(self.factorization, 0)
        self.check_flags("bias")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        inputs, outputs = self.dim("inputs"), self.dim("outputs")
        sizes = Sizes((inputs, outputs, *self.factorization.dims()))
        sizes.add(DYNAMIC, "T", None)
        sizes.add("i", "I", inputs)
        sizes.add("o", "O", outputs)
        x, y = Value("x", (DYNAMIC, "i")), Value("y", (DYNAMIC, "o"))
        made = factorized_map(self.factorization, sizes, prefix="", x=x, out=y, bias=self.bias)
        return Layer(
            name=type(self.factorization).__name__ + "Linear",
            inputs=(x,),
            parameters=made.parameters,
            buffers=(),
            nodes=made.nodes,
            output=made.out,
            sizes=sizes.sizes,
            values=sizes.values,
            declaration=self.declaration(),
            summary=str(self),
        )
