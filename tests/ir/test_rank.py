"""Maximal expert ranks against `numpy.linalg.matrix_rank` of random instances, and against the published table."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
from support.cases import case

import tnmoe
from tnmoe.factorizations.kinds import FACTORIZATIONS
from tnmoe.ir.layer import Contraction, ExpertMap
from tnmoe.ir.network import Network
from tnmoe.ir.rank import layer_rank, max_expert_rank
from tnmoe.ir.value import Role

TOLERANCE = 1e-9
"""Singular values below this share of the largest count as zero (float64 noise is near 1e-15)."""


def random_expert(node: Contraction, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """The matrix of one random expert: random factors, expert indices fixed, everything else summed."""
    assert node.expert_map is not None
    weights = [t for t in node.network.tensors if t.role is not Role.DATA]
    letter = {i: k for k, i in enumerate(dict.fromkeys(i for t in weights for i in t.indices))}
    operands: list[object] = []
    for t in weights:
        array = rng.standard_normal([1 if i in node.expert_map.experts else sizes[i] for i in t.indices])
        operands += [array, [letter[i] for i in t.indices]]
    for n in node.expert_map.experts:
        operands += [np.ones(1), [letter[n]]]
    rows, cols = (node.expert_map.parts(i) for i in (node.expert_map.input, node.expert_map.output))
    whole = np.einsum(*operands, [letter[i] for i in rows + cols], optimize="greedy")
    whole = whole.reshape(np.prod([sizes[i] for i in rows]), np.prod([sizes[i] for i in cols]))
    return whole[: sizes[node.expert_map.input], : sizes[node.expert_map.output]]


def random_spec(kind: str, levels: int, rng: np.random.Generator) -> tnmoe.MuMoE:
    size = lambda top: int(rng.integers(1, top))  # noqa: E731
    experts = tuple(size(5) for _ in range(levels))
    widths = (size(16), size(16))
    modes = [*(["n"] if levels == 1 else [f"n{e + 1}" for e in range(levels)]), "i", "o"]
    order = tuple(rng.permutation(modes).tolist())
    ranks = lambda count, top=6: tuple(size(top) for _ in range(count))  # noqa: E731
    exact = tuple(int(rng.choice([d for d in range(1, w + 1) if w % d == 0])) for w in widths)
    first = tuple(int(rng.integers(1, w + 1)) for w in widths)

    def tree(modes: list[str]) -> object:
        cut = size(len(modes)) if len(modes) > 1 else 0
        return (tree(modes[:cut]), tree(modes[cut:])) if cut else modes[0]

    made = {
        "cp": lambda: tnmoe.CP(size(20)),
        "tensor_ring": lambda: tnmoe.TensorRing(ranks(levels + 2), order),
        "tensor_train": lambda: tnmoe.TensorTrain(ranks(levels + 1, 16), order),
        "tucker": lambda: tnmoe.Tucker(ranks(levels + 2, 12)),
        "block_term": lambda: tnmoe.BlockTerm(size(4), ranks(levels + 2)),
        "hierarchical_tucker": lambda: tnmoe.HierarchicalTucker(tree(order), ranks(2 * levels + 2, 9)),
        "low_rank": lambda: tnmoe.LowRank(size(20)),
        "kronecker": lambda: tnmoe.Kronecker(exact),
        "monarch": lambda: tnmoe.Monarch(exact, size(4)),
        "several_kronecker": lambda: tnmoe.Kronecker(exact, size(4)),
        "padded_kronecker": lambda: tnmoe.Kronecker(first, size(4), pad=True),
        "padded_monarch": lambda: tnmoe.Monarch(first, size(4), pad=True),
        "dense": tnmoe.Dense,
    }
    return tnmoe.MuMoE(*widths, experts, made[kind](), bias=bool(rng.integers(2)))


KINDS = sorted(set(FACTORIZATIONS) - {"custom"})  # a custom one is a random network, see below


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rank_is_that_of_a_random_instance(kind: str) -> None:
    """Generic weights reach the min-cut: 200 random layers per factorization, one to three levels."""
    for trial in range(200):
        with case(kind, trial) as rng:
            draws = np.random.default_rng(rng.getrandbits(32))
            bound, found = bound_and_rank(random_spec(kind, 1 + trial % 3, draws), draws)
            assert bound == found


@pytest.mark.parametrize("kind", ["several_kronecker", "padded_kronecker", "padded_monarch"])
def test_rank_bounds_structured_instances(kind: str) -> None:
    """Sums of Kronecker products, and parts that zeros fill: the cut bounds the rank, and mostly is it."""
    tight = 0
    for trial in range(200):
        with case(kind, trial) as rng:
            draws = np.random.default_rng(rng.getrandbits(32))
            bound, found = bound_and_rank(random_spec(kind, 1 + trial % 3, draws), draws)
            assert bound >= found
            tight += bound == found
    assert tight >= 180


def bound_and_rank(spec: tnmoe.MuMoE, rng: np.random.Generator) -> tuple[int, int]:
    """The min-cut, and the numeric rank of one random expert."""
    layer = spec.layer()
    (node,) = [c for c in layer.contractions if c.expert_map is not None]
    sizes = layer.bound_sizes({"T": 1})
    values = np.linalg.svd(random_expert(node, sizes, rng), compute_uv=False)
    return max_expert_rank(node.network, node.expert_map, sizes), int((values > TOLERANCE * values[0]).sum())


def test_rank_of_random_networks() -> None:
    """Random weight networks with hyperedges: never below the numeric rank, and tight in almost all cases."""
    tight = 0
    for trial in range(300):
        with case(trial) as rng:
            draws = np.random.default_rng(rng.getrandbits(32))
            bonds = "abcd"[: draws.integers(1, 5)]
            count = int(draws.integers(1, 4))
            terms = ["".join(sorted(set(draws.choice(list(bonds), size=2)))) for _ in range(count)]
            terms = ["i" + terms[0], *terms[1:], "o" + terms[-1]] if count > 1 else ["io" + terms[0]]
            net = Network.parse(",".join(terms) + "->io", weights=[])
            net = Network(tuple(type(t)(t.name, t.indices, Role.WEIGHT) for t in net.tensors), net.output)
            sizes = {i: int(draws.integers(1, 5)) for i in net.indices}
            sizes |= {"i": int(draws.integers(1, 12)), "o": int(draws.integers(1, 12))}
            node = Contraction(None, net, ExpertMap("i", "o"))  # type: ignore[arg-type]
            bound = max_expert_rank(net, ExpertMap("i", "o"), sizes)
            found = np.linalg.matrix_rank(random_expert(node, sizes, draws), tol=None)
            assert found <= bound
            tight += found == bound
    assert tight >= 297


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # mathematics: min(I, O, R) and min(I, O, r_{E+2} · min(r_1 … r_{E+1}))
        (tnmoe.MuMoE(768, 3072, 256, tnmoe.CP(556)), 556),
        (tnmoe.MuMoE(768, 3072, 256, tnmoe.TensorRing((4, 4, 149))), 596),
        (tnmoe.MuMoE(768, 3072, (64, 8), tnmoe.TensorRing((4, 3, 5, 100))), 300),
        (tnmoe.MuMoE(768, 1000, 128, tnmoe.TensorRing((16, 16, 95))), 768),
        (tnmoe.MuMoE(768, 1000, 128, tnmoe.Dense()), 768),
        (tnmoe.Linear(768, 1000), 768),
        (tnmoe.SparseMoE(768, 1000, 8, 2), 768),
        (tnmoe.SparseMoE(768, 1000, 8, 2, hidden=32), 32),
        (tnmoe.DenseMoE(768, 100, 1000, 8), 100),
        # a block's figure is the smaller of its two layers'
        (tnmoe.MuMoEBlock(10, 40, 4, 8, tnmoe.CP(12)), 4),
    ],
)
def test_published_ranks(spec: tnmoe.MuMoE, expected: int) -> None:
    assert tnmoe.cost(spec).max_rank == expected


def test_rank_formula_is_the_papers() -> None:
    """As a formula: a minimum over cuts, without those that contain another."""
    i, o, r = (tnmoe.symbol(n) for n in "IOR")
    r1, r2, r3 = (tnmoe.symbol(n) for n in ("r1", "r2", "r3"))
    cp = tnmoe.MuMoE("I", "O", "N", tnmoe.CP("R")).layer()
    assert layer_rank(cp, cp.sizes) == sympy.Min(i, o, r)
    ring = tnmoe.MuMoE("I", "O", "N", tnmoe.TensorRing(("r1", "r2", "r3"))).layer()
    assert layer_rank(ring, ring.sizes) == sympy.Min(i, o, r1 * r3, r2 * r3)
