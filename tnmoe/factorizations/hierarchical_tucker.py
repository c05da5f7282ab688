"""Hierarchical Tucker: factors of the modes at the leaves of a binary tree, transfer tensors at its inner nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes, mode_names, mode_stems
from tnmoe.factorizations.start import assemble
from tnmoe.symbolic.dims import Size

Tree: TypeAlias = "str | tuple[Tree, Tree]"


@dataclass(frozen=True, slots=True)
class HierarchicalTucker(Declared):
    """Hierarchical Tucker (Hackbusch & Kühn, 2009), e.g. {{n}, {i, o}}: N r_n + I r_i + O r_o + r_n t + t r_i r_o.

    Each node but the root has a rank, the bond to its parent: a leaf stores mode × rank, an inner node
    rank(left) × rank(right) × rank, the root rank(left) × rank(right).

    Args:
        tree: nested pairs of the modes, e.g. `("n", ("i", "o"))` or `(("n1", "n2"), ("i", "o"))`.
        ranks: of the nodes, each after its children and the left child first, without the root:
            for `("n", ("i", "o"))` those of n, i, o and (i, o).
    """

    tree: Sequence[Any]
    ranks: Sequence[Size]
    kind: ClassVar[str] = "hierarchical_tucker"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", _tree(self.tree))
        self.check_list("ranks", "[8, 64, 64, 32]")

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if tree or ranks do not fit that many levels of experts."""
        modes = [node for node in _nodes(self._root) if isinstance(node, str)]
        if sorted(modes) != sorted(mode_names(levels)):
            expected = ", ".join(mode_names(levels))
            raise DeclarationError(f"tree must have each of the modes {expected} once, got {', '.join(modes)}")
        self.check_count(self.dims(), [_label(n) for n in _nodes(self._root)[:-1]], levels, "this tree")

    @property
    def _root(self) -> Tree:
        return _tree(self.tree)

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        levels = len(modes.experts)
        self.check_levels(levels)
        nodes = _nodes(self._root)
        bonds: dict[Tree, str] = {}
        transfers: dict[str, tuple[str, ...]] = {}
        stems = dict(zip(mode_names(levels), mode_stems(levels, "factor"), strict=True))
        leaves: dict[str, tuple[str, ...]] = {}
        for node, rank in zip(nodes, (*self.dims(), None), strict=True):
            if rank is not None:
                inner = sum(not isinstance(n, str) for n in bonds) + 1
                bonds[node] = f"r_{node}" if isinstance(node, str) else f"t{inner}"
                sizes.add(bonds[node], bonds[node], rank)
            if isinstance(node, str):
                leaves[stems[node]] = (modes.by_name[node], bonds[node])
            else:
                left, right = (bonds[child] for child in node)
                own = (left, right) if rank is None else (left, right, bonds[node])
                transfers["root" if rank is None else f"transfer_{inner}"] = own
        made = {stem: leaves[stem] for stem in stems.values()}
        output = made.popitem()
        return assemble(made | transfers | dict([output]), modes, sizes, prefix=prefix, bias=bias)


def _tree(given: object) -> Tree:
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence) or len(given) != 2:
        raise DeclarationError(f'tree must be nested pairs of modes such as ["n", ["i", "o"]], got {given!r}')
    left, right = given
    return (_tree(left), _tree(right))


def _nodes(tree: Tree) -> list[Tree]:
    """Every node after its children, the left ones first."""
    if isinstance(tree, str):
        return [tree]
    return [*_nodes(tree[0]), *_nodes(tree[1]), tree]


def _label(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({', '.join(map(_label, tree))})"
