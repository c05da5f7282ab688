"""What inference costs, by brute force."""

from __future__ import annotations

from support.training import Oracle
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role


class Inference(Oracle):
    """FLOPs by hand of the steps that data reaches, and of those that weights alone make; an index that one operand
    alone has is summed beforehand, by a step of its own."""

    def __init__(self, network: Network, sizes: dict[str, int]) -> None:
        super().__init__(network, sizes, set())
        self.data = [t.role is Role.DATA for t in network.tensors]

    def work(self, path: ContractionPath) -> tuple[int, int]:
        """(FLOPs of every call, FLOPs once)."""
        spent = [0, 0]
        groups = [frozenset([k]) for k in range(len(self.terms))]
        for i, j in path.steps:
            whole = groups[i] | groups[j]
            joint: frozenset[str] = frozenset()
            for mine, other in ((groups[i], groups[j]), (groups[j], groups[i])):
                indices = self.kept(mine)
                left = frozenset(x for x in indices if x in self.kept(whole) or x in self.kept(other))
                if left != indices:
                    spent[not any(self.data[k] for k in mine)] += self.volume(indices)
                joint |= left
            factor = 1 if joint == self.kept(whole) else 2
            spent[not any(self.data[k] for k in whole)] += factor * self.volume(joint)
            groups.append(whole)
        return spent[0], spent[1]
