"""No order is cheaper than the planned one: 2,000 random networks of 3 to 6 tensors and 300 of 7, per objective."""

from __future__ import annotations

import random

import pytest
from networks import random_network
from test_training import Oracle

import tnmoe
from tnmoe.network import Role


class Priced(Oracle):
    """The hand-priced oracle, by objective."""

    def step(self, left: frozenset[int], right: frozenset[int]) -> tuple[int, int]:
        """(first criterion, second criterion) of one step: the oracle's own, or products alone for MACs."""
        if self.objective != "macs":
            return super().step(left, right)
        result = self.kept(left | right)
        joint = frozenset().union(
            *(
                frozenset(i for i in self.kept(mine) if i in result or i in self.kept(other))
                for mine, other in ((left, right), (right, left))
            )
        )
        return 0, self.volume(joint)


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("objective", ["flops", "macs", "training", "saved"])
def test_no_order_is_cheaper(objective: str, part: int) -> None:
    rng = random.Random(f"{objective} {part}")
    sizes_of = [3 + k % 4 for k in range(1000)] + [7] * 150
    for tensors in sizes_of:
        network, sizes = random_network(rng, tensors)
        data = [t.name for t in network.tensors if t.role is Role.DATA]
        wanted = [name for name in data if rng.random() < 0.5]
        plan = tnmoe.plan(network, sizes=sizes, objective=objective, input_gradients=wanted)
        training = objective in ("training", "saved")
        needing = {t.name for t in network.tensors if t.role is Role.WEIGHT} | set(wanted) if training else set()
        oracle = Priced(network, sizes, needing)
        oracle.objective = objective
        order = (lambda price: price) if objective == "saved" else (lambda price: (price[1],))
        assert order(oracle.of_path(plan.paths["result"])) == oracle.best(order), str(network)
