"""Contracting within a limit on memory: a network, the indices to slice, and the plan of one slice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.backends.numpy import slices as numpy_slices
from tnmoe.backends.torch import slices as torch_slices
from tnmoe.costing.objective import as_objective
from tnmoe.emission.emit import emit
from tnmoe.errors import DeclarationError, PlanError
from tnmoe.ir.layer import network_layer
from tnmoe.ir.network import Network
from tnmoe.ir.ops import results
from tnmoe.planners import slicing
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import plan_request


@dataclass(frozen=True)
class Sliced:
    """What `plan_sliced` returns.

    Attributes:
        network: what is contracted.
        sizes: of its indices.
        indices: those that are fixed at one value at a time, in the order of the loops.
        part: the plan of one slice; all its tensors are inputs.
        whole: the plan without a limit.
        limit: elements that no array may exceed.
    """

    network: Network
    sizes: Mapping[str, int]
    indices: tuple[str, ...]
    part: Plan
    whole: Plan
    limit: int

    @property
    def slices(self) -> int:
        """How often a slice is contracted."""
        return math.prod([self.sizes[i] for i in self.indices])

    @property
    def added(self) -> int:
        """Additions that put the slices together."""
        summed = math.prod([self.sizes[i] for i in self.indices if i not in self.network.output])
        return (summed - 1) * math.prod([self.sizes[i] for i in self.network.output])

    @property
    def flops(self) -> int:
        """FLOPs of all slices and of their sum."""
        return self.slices * self.part.flops + self.added

    @property
    def macs(self) -> int:
        """MACs of all slices."""
        return self.slices * self.part.macs

    @property
    def overhead(self) -> Fraction:
        """FLOPs over those of the plan without a limit; 1 if nothing is sliced."""
        return Fraction(self.flops, self.whole.flops) if self.whole.flops else Fraction(1)

    @property
    def largest(self) -> int:
        """Elements of the largest array that is written: by a slice, or the result."""
        arrays = [self.network.output, *(v.indices for op in self.part.bound.ops for v in results(op))]
        return max(math.prod([self.sizes[i] for i in indices]) for indices in arrays)

    def __str__(self) -> str:
        if not self.indices:
            return f"No slices: the largest array has {self.largest:,} elements of {self.limit:,} allowed.\n{self.part}"
        return "\n".join([*self.notes, f"Up to {self.limit:,} elements are allowed. One slice:", str(self.part)])

    def contract(self, arrays: Mapping[str, Any]) -> NDArray[Any]:
        """The network's value in NumPy, slice by slice.

        Args:
            arrays: an array for every tensor, by name, its axes in the order of the tensor's indices.

        Raises:
            DeclarationError: an array that is missing or whose shape is another.
        """
        for tensor in self.network.tensors:
            shape = tuple(self.sizes[i] for i in tensor.indices)
            if tensor.name not in arrays or np.shape(arrays[tensor.name]) != shape:
                raise DeclarationError(f"{tensor.name!r} must be an array of shape {shape} with axes {tensor.indices}")
        return numpy_slices.execute(self.network, self.part.bound, self.indices, self.sizes, arrays)

    def emit(self, name: str = "SlicedNetwork") -> str:
        """The source of a torch module whose forward takes all tensors and loops over the slices.

        Args:
            name: of the class; that of one slice is called `<name>Slice`.

        Raises:
            EmitError, DeclarationError: a name that is none, or is taken.
        """
        return torch_slices.emit(
            self.network, self.indices, self.sizes, name, emit(self.part, name=f"{name}Slice"), self.notes
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the source should know, line by line."""
        loops = ", ".join(f"{i} ({self.sizes[i]:,})" for i in self.indices) or "nothing"
        return (
            f"{self.slices:,} slices over {loops}; no array has more than {self.largest:,} elements.",
            f"{self.flops:,} FLOPs, {float(self.overhead):.4g} times those without a limit.",
        )


def plan_sliced(
    network: Network,
    *,
    sizes: Mapping[str, int],
    largest: int,
    objective: str = "flops",
    budget: float | None = None,
) -> Sliced:
    """Plan a contraction in which no array that is written has more than so many elements.

    Args:
        network: any number of tensors, without a folded bias.
        sizes: an integer for every index.
        largest: elements of the largest array allowed, the result included; the tensors themselves exist anyway.
        objective: "flops" or "macs".
        budget: seconds to search the order of a network that is beyond the exact planner.

    Raises:
        PlanError: a limit that cannot be met, with the smallest that can; another objective; a folded bias.
        DeclarationError: sizes that are none.
    """
    if objective not in ("flops", "macs"):
        raise PlanError(f"slicing minimises 'flops' or 'macs', got {objective!r}")
    minimised = as_objective(objective)
    asked = plan_request(network, 1, sizes, True)
    whole = plan(network, sizes=sizes, objective=minimised, budget=budget)
    (start,) = whole.paths.values()
    indices, path = slicing.plan(network, asked.sizes, largest, start, minimised)
    order = tuple(i for i in network.indices if i in indices)
    rest = slicing.without(network, indices)
    layer = network_layer(rest, {i: asked.sizes[i] for i in rest.indices})
    (node,) = layer.contractions
    values = {i: asked.sizes[i] for i in rest.indices}
    part = Plan(layer, {node.out.name: replace(path, exact=False)}, values, minimised)
    return Sliced(network, asked.sizes, order, part, whole, largest)
