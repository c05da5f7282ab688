"""Training as torch does it: what is saved, what is computed, and every order's price by brute force."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath


def saved_bytes(run: Callable[[], Tensor], exclude: list[Tensor]) -> tuple[int, Tensor]:
    """Bytes of the distinct storages that autograd keeps, those of `exclude` aside, and what `run` returns."""
    skip = {t.untyped_storage().data_ptr() for t in exclude}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(seen.values()), out


def measure(module: nn.Module, inputs: list[Tensor]) -> tuple[int, int]:
    """FLOPs of forward and backward by torch's counter, and saved bytes by hooks."""
    stored = [*module.parameters(), *module.buffers(), *inputs]
    saved, _ = saved_bytes(lambda: module(*inputs), stored)
    with FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    return counter.get_total_flops(), saved


def random_spec(rng: random.Random) -> tnmoe.MuMoE | tnmoe.MuMoEBlock:
    levels = rng.randint(1, 3)
    experts = [rng.randint(1, 6) for _ in range(levels)]
    factorization = rng.choice(
        [tnmoe.CP(rng.randint(1, 7)), tnmoe.TensorRing([rng.randint(1, 4) for _ in range(levels + 2)])]
    )
    gate = tnmoe.Gate(
        rng.choice(["entmax15", "softmax", "sparsemax", "sigmoid"]), rng.choice(["batch", "layer", "none"])
    )
    bias, norm = rng.random() < 0.6, rng.random() < 0.5
    widths = [rng.randint(2, 9) for _ in range(3)]
    if rng.random() < 0.5:
        return tnmoe.MuMoEBlock(*widths, experts, factorization, gate, bias, norm)
    return tnmoe.MuMoE(*widths[:2], experts, factorization, gate, bias, norm)


class Oracle:
    """Prices of contraction steps by hand, from index sets; shares no code with the package.

    Forward, as in test_planner: private indices are summed first, then 2 per product if the step sums, else 1.
    Backward, for each operand that needs a gradient: a step that sums costs one more product of the same extent; one
    that does not costs a product for each element of its result, and as many additions if the operand lacks one of
    its indices. Kept for it: the other operand, if that is no leaf (a leaf summed beforehand is none any more).
    """

    def __init__(self, network: Network, sizes: dict[str, int], requires_grad: set[str]) -> None:
        self.terms = [frozenset(t.indices) for t in network.tensors]
        self.output = frozenset(network.output)
        self.sizes = sizes
        self.needs = [t.name in requires_grad for t in network.tensors]

    def volume(self, indices: frozenset[str]) -> int:
        result = 1
        for i in indices:
            result *= self.sizes[i]
        return result

    def kept(self, group: frozenset[int]) -> frozenset[str]:
        """Indices that the result of contracting `group` has."""
        inside = frozenset().union(*(self.terms[k] for k in group))
        outside = frozenset().union(self.output, *(t for k, t in enumerate(self.terms) if k not in group))
        return inside & outside if len(group) > 1 else inside

    def step(self, left: frozenset[int], right: frozenset[int]) -> tuple[int, int]:
        """(elements saved, FLOPs of forward and backward) of one step."""
        result = self.kept(left | right)
        flops = 0
        sides = []
        for mine, other in ((left, right), (right, left)):
            indices = self.kept(mine)
            reduced = frozenset(i for i in indices if i in result or i in self.kept(other))
            if reduced != indices:
                flops += self.volume(indices)
            sides.append((reduced, any(self.needs[k] for k in mine), len(mine) == 1 and reduced == indices))
        joint = sides[0][0] | sides[1][0]
        sums = joint != result
        flops += (2 if sums else 1) * self.volume(joint)
        saved = 0
        for (indices, needs, _), (partner, _, partner_is_leaf) in (sides, sides[::-1]):
            if needs:
                flops += 2 * self.volume(joint) if sums else (2 if indices != joint else 1) * self.volume(joint)
                saved += 0 if partner_is_leaf else self.volume(partner)
        return saved, flops

    def of_path(self, path: ContractionPath) -> tuple[int, int]:
        groups = [frozenset([k]) for k in range(len(self.terms))]
        saved = flops = 0
        for i, j in path.steps:
            s, f = self.step(groups[i], groups[j])
            saved, flops = saved + s, flops + f
            groups.append(groups[i] | groups[j])
        return saved, flops

    def best(self, order: Callable[[tuple[int, int]], tuple[int, ...]]) -> tuple[int, ...]:
        """The least price over all trees; additive, so the best parts make the best whole."""

        @cache
        def least(group: frozenset[int]) -> tuple[int, ...]:
            if len(group) == 1:
                return order((0, 0))
            _, *rest = sorted(group)
            found = []
            for bits in range(1 << len(rest)):
                right = frozenset(k for n, k in enumerate(rest) if bits >> n & 1)
                if right:
                    left = group - right
                    parts = (least(left), least(right), order(self.step(left, right)))
                    found.append(tuple(map(sum, zip(*parts))))
            return min(found)

        return least(frozenset(range(len(self.terms))))
