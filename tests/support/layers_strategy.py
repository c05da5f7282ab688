"""Hypothesis strategies for declarations of μMoE layers, and for plans with any order of contraction."""

import random
from dataclasses import replace

from hypothesis import strategies as st

import tnmoe
from tnmoe.ir.path import ContractionPath

ACTIVATIONS = ("entmax15", "softmax", "sparsemax", "sigmoid")
NORMS = ("batch", "layer", "none")
SIMPLEX = ("entmax15", "softmax", "sparsemax")

# Size 1 breaks code that squeezes or infers an axis from its size; it is drawn as often as any other.
SIZES = st.integers(1, 6)

Spec = tnmoe.MuMoE | tnmoe.MuMoEBlock


LETTERS = "nmkl"
"""Levels of experts in custom expressions."""


@st.composite
def factorizations(draw: st.DrawFn, levels: int, widths: tuple[int, ...]) -> object:
    """Any factorization, with ranks that fit so many levels of experts, and splits that fit the widths."""
    kinds = ["cp", "tensor_ring", "tensor_train", "dense", "low_rank", "kronecker", "monarch", "custom"]
    if levels < 3:  # many tensors take the exact planner long
        kinds += ["tucker", "block_term", "hierarchical_tucker"]
    kind = draw(st.sampled_from(kinds))
    modes = [*(["n"] if levels == 1 else [f"n{e + 1}" for e in range(levels)]), "i", "o"]
    order = draw(st.one_of(st.none(), st.permutations(modes)))

    def ranks(count: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(1, 4)) for _ in range(count))

    match kind:
        case "cp":
            return tnmoe.CP(draw(SIZES))
        case "tensor_ring":
            return tnmoe.TensorRing(ranks(levels + 2), order)
        case "tensor_train":
            return tnmoe.TensorTrain(ranks(levels + 1), order)
        case "tucker":
            return tnmoe.Tucker(ranks(levels + 2))
        case "block_term":
            return tnmoe.BlockTerm(draw(st.integers(1, 3)), ranks(levels + 2))
        case "hierarchical_tucker":
            return tnmoe.HierarchicalTucker(draw(trees(order or modes)), ranks(2 * levels + 2))
        case "low_rank":
            return tnmoe.LowRank(draw(SIZES))
        case "kronecker":
            return tnmoe.Kronecker(*draw(splits(widths)))
        case "monarch":
            return tnmoe.Monarch(*draw(splits(widths)))
        case "custom":
            n = LETTERS[:levels]
            data = ",".join(f"b{letter}" for letter in n) + ",bi"
            weights = draw(st.sampled_from((f"{n}tr,ri,to", f"{n}r,{n}ih,hro", f"t,{n}it,or", f"i,{n},o")))
            sizes = {c: draw(st.integers(1, 3)) for c in sorted(set(weights) & set("trh"))}
            return tnmoe.Custom(f"{data},{weights}->bo", sizes)
        case _:
            return tnmoe.Dense()


@st.composite
def trees(draw: st.DrawFn, modes: list[str]) -> object:
    """Any binary tree with these leaves in order."""
    if len(modes) == 1:
        return modes[0]
    cut = draw(st.integers(1, len(modes) - 1))
    return (draw(trees(modes[:cut])), draw(trees(modes[cut:])))


@st.composite
def splits(draw: st.DrawFn, widths: tuple[int, ...]) -> tuple[tuple[int, int], int, bool]:
    """First parts of every map's input and output, a bond, and whether to pad (else the parts divide the widths)."""
    pad = draw(st.booleans())
    first = []
    for ends in (widths[:-1], widths[1:]):
        fitting = [b for b in range(1, min(ends) + 1) if pad or all(w % b == 0 for w in ends)]
        first.append(draw(st.sampled_from(fitting)))
    return (first[0], first[1]), draw(st.integers(1, 3)), pad


def gates() -> st.SearchStrategy[tnmoe.Gate]:
    """Every activation with every norm."""
    return st.builds(tnmoe.Gate, st.sampled_from(ACTIVATIONS), st.sampled_from(NORMS))


@st.composite
def layers(draw: st.DrawFn, *, min_levels: int = 1, max_levels: int = 3) -> Spec:
    """A `MuMoE` or a `MuMoEBlock` with small sizes."""
    levels = draw(st.integers(min_levels, max_levels))
    most = 5 if levels < 4 else 3
    experts = tuple(draw(st.integers(1, most)) for _ in range(levels))
    kind, count = (tnmoe.MuMoE, 2) if draw(st.booleans()) else (tnmoe.MuMoEBlock, 3)
    widths = tuple(draw(SIZES) for _ in range(count))
    return kind(
        *widths,
        experts,
        draw(factorizations(levels, widths)),
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
