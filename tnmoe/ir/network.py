"""Tensor networks: named tensors over named indices, and which indices remain.

A network is multilinear: the product of all tensors, summed over every index that is not in the output.
An index may sit in any number of tensors (a hyperedge) and in the output as well (a batch index).
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tnmoe.errors import DeclarationError, point_at, unknown
from tnmoe.ir.value import Role
from tnmoe.render.graph import Node, network_graph
from tnmoe.render.scene import Scene
from tnmoe.symbolic.dims import check_name


@dataclass(frozen=True, slots=True)
class Tensor:
    """A leaf of a network. `indices` name its axes in their canonical order, one each, no repeats."""

    name: str
    indices: tuple[str, ...]
    role: Role = Role.DATA

    def __post_init__(self) -> None:
        check_name(self.name, "tensor")
        object.__setattr__(self, "indices", _index_names(self.indices, f"the indices of tensor {self.name!r}"))
        if not isinstance(self.role, Role):
            raise DeclarationError(
                f"the role of tensor {self.name!r} must be a Role such as Role.WEIGHT, got {self.role!r}"
            )
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
        given: object = self.tensors
        if not isinstance(given, list | tuple) or not all(isinstance(t, Tensor) for t in given):
            raise DeclarationError(
                f"a network takes a tuple of Tensor, got {given!r}; for an expression use Network.parse('bi,io->bo')"
            )
        object.__setattr__(self, "tensors", tuple(given))
        object.__setattr__(self, "output", _index_names(self.output, "the output"))
        if not isinstance(self.bias, FoldedBias | None):
            raise DeclarationError(f"the bias of a network must be a FoldedBias, got {self.bias!r}")
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
        if Role.DATA in (weight.role, bias.tensor.role):
            raise DeclarationError(
                f"{weight.name!r} and its bias {bias.tensor.name!r} are stored, so their role must be WEIGHT or FROZEN"
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
    def leaf_names(self) -> frozenset[str]:
        """Names of all stored tensors and of the data."""
        return frozenset(t.name for t in self.leaves)

    def kept(self, inside: Container[int]) -> frozenset[str]:
        """Indices that the output, or a tensor whose position is not in `inside`, needs."""
        outside = (t.indices for k, t in enumerate(self.tensors) if k not in inside)
        return frozenset(self.output).union(*outside)

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

        trained, constant = _names(weights, "weights"), _names(frozen, "frozen")
        roles = dict.fromkeys(trained, Role.WEIGHT) | dict.fromkeys(constant, Role.FROZEN)
        both = set(trained) & set(constant)
        if both:
            raise DeclarationError(f"{sorted(both)[0]!r} is listed both in weights and in frozen")
        names: list[str] = []
        copies: Counter[str] = Counter()
        for term in terms:
            base = "".join(term) or "scalar"
            base += "_" if keyword.iskeyword(base) else ""
            copies[base] += 1
            names.append(base if copies[base] == 1 else f"{base}_{copies[base]}")
        # A keyword term such as "or" may be called by its letters or by its name "or_".
        alias = {"".join(term): name for term, name in reversed(list(zip(terms, names, strict=True)))}
        chosen = {alias.get(name, name): role for name, role in roles.items()}
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise DeclarationError(f"no term {unknown[0]!r} in {expression!r}; the terms are {', '.join(names)}")
        tensors = tuple(Tensor(n, t, chosen.get(n, Role.DATA)) for n, t in zip(names, terms, strict=True))
        return cls(tensors, output)

    def to_mapping(self) -> dict[str, Any]:
        """The network as plain data: an expression where `parse` gives it back, else its tensors one by one."""
        weights = [t.name for t in self.tensors if t.role is Role.WEIGHT]
        frozen = [t.name for t in self.tensors if t.role is Role.FROZEN]
        if all(len(i) == 1 for i in self.indices) and self.bias is None:
            if Network.parse(self.expression).tensors == tuple(Tensor(t.name, t.indices) for t in self.tensors):
                return {"expression": self.expression, "weights": weights, "frozen": frozen}
        mapping: dict[str, Any] = {"tensors": [_plain(t) for t in self.tensors], "output": list(self.output)}
        if (bias := self.bias) is not None:
            mapping["bias"] = {"index": bias.index, "data": bias.data, "weight": bias.weight, **_plain(bias.tensor)}
        return mapping

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Network:
        """The network that `to_mapping` wrote (further keys are the caller's).

        Raises:
            DeclarationError: naming the key that is missing or wrong.
        """
        if not isinstance(mapping, Mapping):
            raise DeclarationError(f"a network must be a table of keys, got {mapping!r}")
        if "expression" in mapping:
            given = {key: mapping.get(key, []) for key in ("weights", "frozen")}
            return cls.parse(mapping["expression"], weights=given["weights"], frozen=given["frozen"])
        tensors = mapping.get("tensors")
        if not isinstance(tensors, list):
            raise DeclarationError(f"a network needs an expression such as 'bi,io->bo', or tensors; got {tensors!r}")
        bias = None
        if (folded := mapping.get("bias")) is not None:
            names = {key: _entry(folded, key, "bias") for key in ("index", "data", "weight")}
            bias = FoldedBias(**names, tensor=_tensor(folded))
        return cls(tuple(_tensor(t) for t in tensors), _entry(mapping, "output", "network"), bias)

    @property
    def expression(self) -> str:
        """`ti,ir->tr` if every index is one letter, else `t i, i rank -> t rank`."""
        if all(len(i) == 1 for i in self.indices):
            return ",".join("".join(t.indices) for t in self.tensors) + "->" + "".join(self.output)
        return ", ".join(" ".join(t.indices) for t in self.tensors) + " -> " + " ".join(self.output)

    def diagram(self, sizes: Mapping[str, Any] | None = None) -> Scene:
        """The network as a picture, with the sizes (integers or formulas) of those indices that `sizes` names."""
        nodes = [Node(t.name, t.indices, t.role.value) for t in self.tensors]
        return network_graph(nodes, self.output, sizes, str(self))

    def _repr_svg_(self) -> str:
        return self.diagram().svg()

    def __str__(self) -> str:
        return f"{self.expression}  [{', '.join(f'{t.name}: {t.role.value}' for t in self.tensors)}]"


def _plain(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "indices": list(tensor.indices), "role": tensor.role.value}


def _entry(mapping: Any, key: str, what: str) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise DeclarationError(f"{key} of a {what} is missing in {mapping!r}")
    return mapping[key]


def _tensor(mapping: Any) -> Tensor:
    name, indices, role = (_entry(mapping, key, "tensor") for key in ("name", "indices", "role"))
    roles = [r.value for r in Role]
    if role not in roles:
        raise DeclarationError(unknown("role of a tensor", role, roles))
    return Tensor(name, indices, Role(role))


def _index_names(given: object, what: str) -> tuple[str, ...]:
    if not isinstance(given, list | tuple):
        raise DeclarationError(f"{what} must be a tuple of names, got {given!r}")
    return tuple(check_name(index, "index") for index in given)


def _names(given: object, what: str) -> list[str]:
    names = given.split() if isinstance(given, str) else given
    if not isinstance(names, Iterable) or isinstance(names, bytes):
        raise DeclarationError(f"{what} must be terms such as 'nr ir ro', got {given!r}")
    terms = []
    for name in names:
        if not isinstance(name, str):
            raise DeclarationError(f"{what} must be terms such as 'nr ir ro', got {name!r} among them")
        terms.append(name)
    return terms


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


def components(network: Network) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors of each connected part, in order of first appearance."""
    joined: list[tuple[set[str], list[str]]] = []
    for tensor in network.tensors:
        touched = [part for part in joined if part[0] & set(tensor.indices)]
        joined = [part for part in joined if part not in touched]
        indices = set(tensor.indices).union(*(part[0] for part in touched))
        joined.append((indices, [name for part in touched for name in part[1]] + [tensor.name]))
    place = {t.name: k for k, t in enumerate(network.tensors)}
    parts = [tuple(sorted(names, key=place.__getitem__)) for _, names in joined]
    return tuple(sorted(parts, key=lambda part: place[part[0]]))


def note(network: Network) -> str:
    """A sentence on a network in several parts; empty if it is in one."""
    parts = components(network)
    if len(parts) == 1:
        return ""
    shown = "; ".join(", ".join(part) for part in parts)
    return f"{len(parts)} parts share no index, so outer products join them: {shown}."
