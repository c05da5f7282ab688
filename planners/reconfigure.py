"""Improve a tree part by part: every small piece of it is planned again by the exact planner.

A piece is a step with those below it, down to a few operands that are taken as they are. Its operands and result stay
what they were, so a cheaper piece makes the tree cheaper by as much, and when no piece can be improved any more the
tree is optimal within all of them (subtree reconfiguration; J. Gray and S. Kourtis, Quantum 5, 410, 2021).
"""

from __future__ import annotations

from collections.abc import Callable

from tnmoe.ir.network import FoldedBias, Network, Tensor
from tnmoe.ir.value import Role
from tnmoe.planners import subset_dp
from tnmoe.planners.effort import Effort
from tnmoe.planners.splits import Splits, Steps, upwards


def reconfigure(steps: Steps, splits: Splits, most: int, effort: Effort) -> Splits:
    """The tree with no piece of up to `most` operands left to improve.

    Under the objective "saved" the pieces are planned as if their operands were saved anyway; a piece is
    taken only if its true price is lower, so the tree never gets dearer.

    Args:
        steps: of the network.
        splits: the tree; it is not changed.
        most: operands of a piece, up to 12.
        effort: what it may cost; a unit is a pair of parts of a piece.
    """
    splits = dict(splits)
    steps.total(splits)
    done: set[tuple[int, ...]] = set()
    improved = True
    while improved:
        improved = False
        for top in sorted(upwards(splits, steps.full), key=lambda s: (steps.price(*splits[s]), s), reverse=True):
            if effort.over:
                return splits
            if top not in splits:
                continue  # a piece above it was planned anew
            for chosen in (_dearest, _largest):
                operands = _operands(steps, splits, top, most, chosen)
                if len(operands) > 2 and operands not in done:
                    done.add(operands)
                    effort.spend(3 ** len(operands))
                    improved |= _improve(steps, splits, top, operands)
    return splits


Chosen = Callable[[Steps, Splits, int], int]


def _dearest(steps: Steps, splits: Splits, subset: int) -> int:
    return steps.price(*splits[subset])


def _largest(steps: Steps, splits: Splits, subset: int) -> int:
    return steps.elements(subset)


def _operands(steps: Steps, splits: Splits, top: int, most: int, chosen: Chosen) -> tuple[int, ...]:
    """Subsets whose results the piece below `top` takes as they are; what `chosen` makes the most of is opened."""
    taken = set(splits[top])
    while len(taken) < most:
        inner = [s for s in taken if s in splits]
        if not inner:
            break
        opened = max(inner, key=lambda s: (chosen(steps, splits, s), s))
        taken.remove(opened)
        taken |= set(splits[opened])
    return tuple(sorted(taken))


def _improve(steps: Steps, splits: Splits, top: int, operands: tuple[int, ...]) -> bool:
    """Plan a piece anew, in place; was there a cheaper one?"""
    piece = _planned(steps, top, operands)
    if piece is None:
        return False
    inner = [s for s in upwards(splits, top) if not any(s & o == s for o in operands)]
    old = sum([steps.price(*splits[s]) for s in inner])
    if sum([steps.price(*parts) for parts in piece.values()]) >= old:
        return False
    for subset in inner:
        del splits[subset]
    splits |= piece
    return True


def _planned(steps: Steps, top: int, operands: tuple[int, ...]) -> Splits | None:
    """The cheapest tree over the operands, by the exact planner; None if a network cannot say what they are."""
    network = _piece(steps, top, operands)
    if network is None:
        return None
    named = zip(network.tensors, operands, strict=True)
    known = steps.prices.requires_grad
    requires_grad = frozenset(t.name for t, subset in named if steps.operand[subset].main.name in known)
    path = subset_dp.plan(network, steps.sizes, steps.objective, requires_grad)
    mask, piece = list(operands), Splits()
    for i, j in path.steps:
        mask.append(mask[i] | mask[j])
        piece[mask[-1]] = mask[i], mask[j]
    for left, right in piece.values():
        steps.price(left, right)
    return piece


def _piece(steps: Steps, top: int, operands: tuple[int, ...]) -> Network | None:
    """The operands as a network of its own; None if they hold a folded bias in a form that leaves cannot have."""
    tensors = []
    for k, subset in enumerate(operands):
        varies = any(subset >> n & 1 and t.role is Role.DATA for n, t in enumerate(steps.network.tensors))
        tensors.append(Tensor(f"p{k}", steps.operand[subset].main.indices, Role.DATA if varies else Role.WEIGHT))
    kept = steps.kept(top)
    held = {i for t in tensors for i in t.indices}
    output = tuple(i for i in steps.network.indices if i in kept and i in held)
    folded = [t for t, subset in zip(tensors, operands, strict=True) if steps.operand[subset].folded]
    if not folded:
        return Network(tuple(tensors), output)
    given = steps.network.bias
    slices = [steps.operand[subset].extra for subset in operands if steps.operand[subset].folded]
    if given is None or len(folded) != 2 or None not in slices:
        return None
    data, weight = folded if slices[0] is None else reversed(folded)
    rest = tuple(i for i in weight.indices if i != given.index)
    extra = slices[0] or slices[1]
    if extra is None or weight.role is Role.DATA or set(extra.indices) != set(rest):
        return None
    bias = FoldedBias(given.index, data.name, weight.name, Tensor("bias", rest, Role.WEIGHT))
    return Network(tuple(tensors), output, bias)
