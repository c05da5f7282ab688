"""Hypothesis strategies for declarations of μMoE layers, and for plans with any order of contraction."""

import random
from dataclasses import replace

from hypothesis import strategies as st

import tnmoe
from tnmoe.path import ContractionPath

ACTIVATIONS = ("entmax15", "softmax", "sparsemax", "sigmoid")
NORMS = ("batch", "layer", "none")
SIMPLEX = ("entmax15", "softmax", "sparsemax")

# Size 1 breaks code that squeezes or infers an axis from its size; it is drawn as often as any other.
SIZES = st.integers(1, 5)

Spec = tnmoe.MuMoE | tnmoe.MuMoEBlock


@st.composite
def factorizations(draw: st.DrawFn, levels: int) -> tnmoe.CP | tnmoe.TensorRing | tnmoe.Dense:
    """CP, tensor ring or dense, with ranks that fit so many levels of experts."""
    kind = draw(st.sampled_from(("cp", "tensor_ring", "dense")))
    if kind == "cp":
        return tnmoe.CP(draw(SIZES))
    if kind == "tensor_ring":
        return tnmoe.TensorRing(tuple(draw(st.integers(1, 4)) for _ in range(levels + 2)))
    return tnmoe.Dense()


def gates() -> st.SearchStrategy[tnmoe.Gate]:
    """Every activation with every norm."""
    return st.builds(tnmoe.Gate, st.sampled_from(ACTIVATIONS), st.sampled_from(NORMS))


@st.composite
def layers(draw: st.DrawFn, *, min_levels: int = 1, max_levels: int = 3) -> Spec:
    """A `MuMoE` or a `MuMoEBlock` with small sizes."""
    levels = draw(st.integers(min_levels, max_levels))
    most = 5 if levels < 4 else 3
    experts = tuple(draw(st.integers(1, most)) for _ in range(levels))
    kind, widths = (tnmoe.MuMoE, 2) if draw(st.booleans()) else (tnmoe.MuMoEBlock, 3)
    return kind(
        *(draw(SIZES) for _ in range(widths)),
        experts,
        draw(factorizations(levels)),
        draw(gates()),
        bias=draw(st.booleans()),
        input_norm=draw(st.booleans()),
    )


def any_order(plan: tnmoe.Plan, seed: int) -> tnmoe.Plan:
    """The plan with a random order for each of its networks.

    Planners find few of the orders that a plan may hold; lowering and emission have to be right for all.
    """
    generator = random.Random(seed)
    paths = {}
    for name, path in plan.paths.items():
        live = list(range(len(path.steps) + 1))
        steps = []
        while len(live) > 1:
            pair = generator.sample(live, 2)
            live = [k for k in live if k not in pair] + [len(path.steps) + 1 + len(steps)]
            steps.append((pair[0], pair[1]))
        paths[name] = ContractionPath(tuple(steps))
    return replace(plan, paths=paths)


def lead_shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Leading axes of an input: none, a batch (perhaps empty, perhaps of one), a batch of sequences."""
    return st.sampled_from([(), (0,), (1,), (2,), (5,), (2, 3), (1, 1), (3, 0)])
