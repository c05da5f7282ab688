"""Tensor networks: named tensors over named indices, and which indices remain.

A network is multilinear: the product of all tensors, summed over every index that is not in the output.
An index may sit in any number of tensors (a hyperedge) and in the output as well (a batch index).
"""

from __future__ import annotations

import enum
import keyword
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tnmoe.dims import check_name
from tnmoe.errors import DeclarationError, point_at


class Role(enum.Enum):
    """What a tensor is: decides what needs a gradient, what is saved, and what may be folded."""

    DATA = "data"
    WEIGHT = "weight"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A leaf of a network. `indices` name its axes in their canonical order, one each, no repeats."""

    name: str
    indices: tuple[str, ...]
    role: Role = Role.DATA

    def __post_init__(self) -> None:
        check_name(self.name, "tensor")
        for index in self.indices:
            check_name(index, "index")
        repeated = [i for i, count in Counter(self.indices).items() if count > 1]
        if repeated:
            raise DeclarationError(
                f"index {repeated[0]!r} stands twice in tensor {self.name!r} {self.indices}; a diagonal must "
                f"be taken beforehand"
            )


@dataclass(frozen=True, slots=True)
class FoldedBias:
    """A bias folded into a contraction: the contracted `index` has one more entry than its size says.

    The extra entry of the `data` tensor is fixed at 1 (it is never stored), the extra slice of the `weight`
    tensor is `tensor`. So the network computes `data @ weight + tensor` in whatever order it is contracted,
    without a concatenated column of ones.
    """

    index: str
    data: str
    weight: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Network:
    """Tensors, the output's indices, and at most one folded bias.

    Raises:
        DeclarationError: repeated tensor names, an output index that no tensor has, a bias that does not fit.
    """

    tensors: tuple[Tensor, ...]
    output: tuple[str, ...]
    bias: FoldedBias | None = None

    def __post_init__(self) -> None:
        if not self.tensors:
            raise DeclarationError("a network needs at least one tensor")
        repeated = [n for n, count in Counter(t.name for t in self.leaves).items() if count > 1]
        if repeated:
            raise DeclarationError(f"two tensors are named {repeated[0]!r}; names must differ")
        known = set(self.indices)
        for index in self.output:
            if index not in known:
                raise DeclarationError(
                    f"output index {index!r} is in no tensor; the tensors have {', '.join(sorted(known))}"
                )
        if len(set(self.output)) != len(self.output):
            raise DeclarationError(f"an index stands twice in the output {self.output}")
        if self.bias is not None:
            self._check_bias(self.bias)

    def _check_bias(self, bias: FoldedBias) -> None:
        holders = {t.name for t in self.tensors if bias.index in t.indices}
        if holders != {bias.data, bias.weight} or bias.index in self.output:
            raise DeclarationError(
                f"the folded index {bias.index!r} must join exactly {bias.data!r} and {bias.weight!r}, "
                f"but it is in {sorted(holders)} and output {self.output}"
            )
        weight, data = self.tensor(bias.weight), self.tensor(bias.data)
        if bias.tensor.indices != tuple(i for i in weight.indices if i != bias.index):
            raise DeclarationError(
                f"bias {bias.tensor.name!r} has indices {bias.tensor.indices}, expected those of "
                f"{bias.weight!r} without {bias.index!r}"
            )
        elsewhere = set(self.output).union(*(t.indices for t in self.tensors if t is not data))
        lonely = [i for i in data.indices if i not in elsewhere]
        if lonely:
            raise DeclarationError(
                f"index {lonely[0]!r} of {bias.data!r} is summed alone, which a folded bias does not allow"
            )

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All stored tensors, the bias last."""
        return self.tensors + ((self.bias.tensor,) if self.bias else ())

    @property
    def indices(self) -> tuple[str, ...]:
        """Every index once, in order of first appearance."""
        return tuple(dict.fromkeys(i for t in self.tensors for i in t.indices))

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`; a `DeclarationError` lists the names if there is none."""
        for tensor in self.leaves:
            if tensor.name == name:
                return tensor
        raise DeclarationError(f"no tensor {name!r}; the network has {', '.join(t.name for t in self.leaves)}")

    @classmethod
    def parse(cls, expression: str, *, weights: str | Iterable[str] = (), frozen: str | Iterable[str] = ()) -> Network:
        """A network from an einsum expression with one letter an index, e.g. `"bn,nr,bi,ir,ro->bo"`.

        Args:
            expression: terms separated by commas, `->`, and the output's indices. Each term names its
                tensor; a second equal term is named `term_2`, and a keyword gets a trailing underscore.
            weights: terms that are trained, separated by blanks (or an iterable of names).
            frozen: terms that are constant weights. All others are data.

        Raises:
            DeclarationError: with a caret under the fault.
        """
        if not isinstance(expression, str):
            raise DeclarationError(f"an expression must be text such as 'bi,io->bo', got {expression!r}")

        def fail(reason: str, start: int, length: int = 1) -> DeclarationError:
            return DeclarationError(f"{reason}\n{point_at(expression, start, length)}")

        if "->" not in expression:
            raise fail("an expression needs '->' and the output's indices, e.g. 'bi,io->bo'", len(expression))
        left, _, right = expression.partition("->")
        terms: list[tuple[str, ...]] = []
        position = 0
        for text in left.split(","):
            terms.append(_letters(text, position, fail))
            position += len(text) + 1
        output = _letters(right, len(left) + 2, fail)
        known = {i for term in terms for i in term}
        for offset, index in enumerate(expression[len(left) + 2 :]):
            if index != " " and index not in known:
                raise fail(f"output index {index!r} is in no tensor", len(left) + 2 + offset)

        trained = weights.split() if isinstance(weights, str) else list(weights)
        constant = frozen.split() if isinstance(frozen, str) else list(frozen)
        roles = dict.fromkeys(trained, Role.WEIGHT) | dict.fromkeys(constant, Role.FROZEN)
        both = set(trained) & set(constant)
        if both:
            raise DeclarationError(f"{sorted(both)[0]!r} is listed both in weights and in frozen")
        names: list[str] = []
        for term in terms:
            base = "".join(term) or "scalar"
            base += "_" if keyword.iskeyword(base) else ""
            name, copy = base, 1
            while name in names:
                copy += 1
                name = f"{base}_{copy}"
            names.append(name)
        # A keyword term such as "or" may be called by its letters or by its name "or_".
        alias = {"".join(term): name for term, name in reversed(list(zip(terms, names, strict=True)))}
        chosen = {alias.get(name, name): role for name, role in roles.items()}
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise DeclarationError(f"no term {unknown[0]!r} in {expression!r}; the terms are {', '.join(names)}")
        tensors = tuple(Tensor(n, t, chosen.get(n, Role.DATA)) for n, t in zip(names, terms, strict=True))
        return cls(tensors, output)

    @property
    def expression(self) -> str:
        """`ti,ir->tr` if every index is one letter, else `t i, i rank -> t rank`."""
        if all(len(i) == 1 for i in self.indices):
            return ",".join("".join(t.indices) for t in self.tensors) + "->" + "".join(self.output)
        return ", ".join(" ".join(t.indices) for t in self.tensors) + " -> " + " ".join(self.output)

    def __str__(self) -> str:
        return f"{self.expression}  [{', '.join(f'{t.name}: {t.role.value}' for t in self.tensors)}]"


def _letters(text: str, start: int, fail: Callable[[str, int], DeclarationError]) -> tuple[str, ...]:
    """The one-letter indices of a term; `fail(reason, start)` makes the error."""
    seen: list[str] = []
    for offset, letter in enumerate(text):
        if letter == " ":
            continue
        if not (letter.isascii() and letter.isalpha()):
            raise fail(f"{letter!r} is no index; indices are single ASCII letters", start + offset)
        if letter in seen:
            raise fail(f"index {letter!r} stands twice in one term; take the diagonal beforehand", start + offset)
        seen.append(letter)
    return tuple(seen)
