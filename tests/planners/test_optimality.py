"""No order is cheaper than the planned one: 2,000 random networks of 3 to 6 tensors and 300 of 7, per objective."""

from __future__ import annotations

import pytest
from support.cases import blocks, case
from support.networks import random_network
from support.training import Oracle

import tnmoe
from tnmoe.ir.value import Role


class Priced(Oracle):
    """The hand-priced oracle, by objective."""

    data: frozenset[int]

    def step(self, left: frozenset[int], right: frozenset[int]) -> tuple[int, int]:
        """(first criterion, second criterion) of one step: the oracle's own, or what is counted below.

        An index of one operand alone is summed beforehand. MACs are products; traffic is what is read and written;
        inference repeats 7 times what data reaches.
        """
        if self.objective in ("flops", "training", "saved"):
            return super().step(left, right)
        result = self.kept(left | right)
        joint: frozenset[str] = frozenset()
        traffic, inference = self.volume(result), 0
        for mine, other in ((left, right), (right, left)):
            indices = self.kept(mine)
            reduced = frozenset(i for i in indices if i in result or i in self.kept(other))
            joint |= reduced
            traffic += self.volume(reduced)
            if reduced != indices:
                traffic += self.volume(indices) + self.volume(reduced)
                inference += self.volume(indices) * (7 if mine & self.data else 1)
        inference += self.volume(joint) * (1 if joint == result else 2) * (7 if (left | right) & self.data else 1)
        return 0, {"macs": self.volume(joint), "traffic": traffic, "inference(7)": inference}[self.objective]


@pytest.mark.parametrize("block", blocks(2300, of=115))
@pytest.mark.parametrize("objective", ["flops", "macs", "traffic", "training", "saved", "inference(7)"])
def test_no_order_is_cheaper(objective: str, block: range) -> None:
    """13,800 random networks: the plan's price is the least of all trees."""
    for seed in block:
        with case(objective, seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 4 if seed % 23 < 20 else 7)
            data = [t.name for t in network.tensors if t.role is Role.DATA]
            wanted = [name for name in data if rng.random() < 0.5]
            plan = tnmoe.plan(network, sizes=sizes, objective=objective, input_gradients=wanted)
            training = objective in ("training", "saved")
            requires_grad = (
                {t.name for t in network.tensors if t.role is Role.WEIGHT} | set(wanted) if training else set()
            )
            oracle = Priced(network, sizes, requires_grad)
            oracle.objective = objective
            oracle.data = frozenset(k for k, t in enumerate(network.tensors) if t.role is Role.DATA)
            order = (lambda price: price) if objective == "saved" else (lambda price: (price[1],))
            assert order(oracle.of_path(plan.paths["result"])) == oracle.best(order), str(network)
