"""One call of a torch operation, its operands by the names of its schema, and sizes of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from tnmoe.counting.work import Flops


@dataclass(frozen=True, slots=True)
class Call:
    """What a formula reads. Shapes count alone; values are never looked at.

    Attributes:
        arguments: operands by the names of the operation's schema; defaults that were not given are left out.
        out: what the operation returned.
    """

    arguments: Mapping[str, Any]
    out: Any

    @staticmethod
    def of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Call:
        """A call of an `OpOverload`; where it writes what it was given for that, this is no operand."""
        names = [a.name for a in func._schema.arguments if not a.kwarg_only]
        written = {a.name for a in func._schema.arguments if a.is_out}
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return Call({name: value for name, value in given.items() if name not in written}, out)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor operand."""
        return tuple(self.arguments[name].shape)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor operand once."""
        every = (t for t in tree_leaves(self.arguments) if isinstance(t, torch.Tensor))
        return list({id(t): t for t in every}.values())

    @property
    def results(self) -> list[torch.Tensor]:
        """Every tensor that it returned."""
        return [t for t in tree_leaves(self.out) if isinstance(t, torch.Tensor)]

    @property
    def size(self) -> int:
        """Elements of the first result."""
        return self.results[0].numel() if self.results else 0

    @property
    def first(self) -> int:
        """Elements of the first tensor operand."""
        return self.tensors[0].numel() if self.tensors else 0


Formula = Callable[[Call], Flops]
"""FLOPs of a call."""

Moved = Callable[[Call], tuple[int, int]]
"""Bytes that a call reads and writes."""


def words(text: str) -> tuple[str, ...]:
    """Names that stand side by side, which a list would set one below the other."""
    return tuple(text.split())


def tensor_bytes(t: torch.Tensor) -> int:
    """Bytes of the distinct elements of a tensor: what is expanded lies in memory once."""
    sizes = zip(t.shape, t.stride(), strict=True) if t.layout == torch.strided else ((n, 1) for n in t.shape)
    return math.prod(n for n, stride in sizes if stride or n == 0) * t.element_size()


def storages(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> set[int]:
    """Identities of the memory that tensors lie in."""
    return {int(t.untyped_storage()._cdata) for t in tensors if t.layout == torch.strided}


def unpacked(packed: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of the weights that a quantised layer keeps packed, and whether it has biases."""
    with unset_fake_temporarily():
        weight, bias = packed.unpack()
        return tuple(weight.shape), bias is not None


def packed_bytes(call: Call) -> int:
    """Of the weights of quantised layers, which are no tensor operands."""
    packed: list[Any] = [
        v for v in call.arguments.values() if isinstance(v, torch.ScriptObject) and hasattr(v, "unpack")
    ]
    with unset_fake_temporarily():
        return sum(t.numel() * t.element_size() for p in packed for t in p.unpack() if t is not None)


def elementwise(per_element: int = 1) -> Formula:
    """So many FLOPs for each element of the result."""
    return lambda call: Flops(elementwise=per_element * call.size)


def special(per_element: int) -> Formula:
    """So many special FLOPs for each element of the result."""
    return lambda call: Flops(special=per_element * call.size)


def reduction(per_element: int = 1) -> Formula:
    """So many FLOPs for each element of the first operand."""
    return lambda call: Flops(elementwise=per_element * call.first)


def nothing(_: Call) -> Flops:
    """Data moves, or memory is reserved; nothing is computed."""
    return Flops()
