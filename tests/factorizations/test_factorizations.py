"""Every factorization: parameters, MACs and ranks by hand-derived formulas, initial variances, faults, contract."""

import math
import warnings

import numpy as np
import opt_einsum
import pytest
import torch
from support import oracle
from support.cases import case
from support.factorized_layers import EMITTED, LINEAR
from torch import nn

import tnmoe
from tnmoe.factorizations.kinds import FACTORIZATIONS
from tnmoe.ir.initialise import DiagonalNormal, Normal, SharedUniform, Uniform, bind_init

FREE = tnmoe.Gate("softmax", "none")


def layer_report(factorization, experts=8, inputs=24, outputs=36, tokens=1, **options):
    return tnmoe.cost(tnmoe.plan(tnmoe.MuMoE(inputs, outputs, experts, factorization, FREE, **options), tokens=tokens))


# ---- parameters and work -------------------------------------------------------------------------------------

# mathematics: I = 24, O = 36, N = 8 (or 8 and 5), without bias and gate. Formulas evaluated by hand:
COUNTS = {
    # R(ΣN + I + O) = 7·68 and 7·73
    "cp": (tnmoe.CP(7), 8, 476),
    "cp, two levels": (tnmoe.CP(7), (8, 5), 511),
    # ΠN·I·O
    "dense, two levels": (tnmoe.Dense(), (8, 5), 8 * 5 * 24 * 36),
    # 2·8·3 + 3·24·5 + 5·36·2
    "ring": (tnmoe.TensorRing((2, 3, 5)), 8, 768),
    # ring n1, i, n2, o: 2·8·3 + 3·24·5 + 5·5·4 + 4·36·2
    "ring, mixed order": (tnmoe.TensorRing((2, 3, 5, 4), ("n1", "i", "n2", "o")), (8, 5), 796),
    # N r2 + r2 I r3 + r3 O = 8·3 + 3·24·5 + 5·36
    "train n, i, o": (tnmoe.TensorTrain((3, 5)), 8, 564),
    # I r2 + r2 N r3 + r3 O = 24·3 + 3·8·5 + 5·36
    "train i, n, o": (tnmoe.TensorTrain((3, 5), ("i", "n", "o")), 8, 372),
    # ΣN_e r_e + I r_i + O r_o + (Πr_e) r_i r_o = 8·3 + 24·4 + 36·5 + 3·4·5
    "tucker": (tnmoe.Tucker((3, 4, 5)), 8, 360),
    "tucker, two levels": (tnmoe.Tucker((3, 2, 4, 5)), (8, 5), 24 + 10 + 96 + 180 + 120),
    # P × Tucker
    "block term": (tnmoe.BlockTerm(4, (3, 4, 5)), 8, 1440),
    # {{n},{i,o}}: N r_n + I r_i + O r_o + r_n t + t r_i r_o
    "hierarchical n, (i, o)": (tnmoe.HierarchicalTucker(("n", ("i", "o")), (3, 4, 5, 6)), 8, 300 + 18 + 120),
    # {{n,i},o}: N r_n + I r_i + O r_o + r_n r_i t + t r_o
    "hierarchical (n, i), o": (tnmoe.HierarchicalTucker((("n", "i"), "o"), (3, 4, 6, 5)), 8, 300 + 72 + 30),
    # N·R(I + O)
    "low rank": (tnmoe.LowRank(3), 8, 8 * 3 * 60),
    # N·S(I1 O1 + I2 O2) with 24 = 4·6, 36 = 9·4
    "kronecker": (tnmoe.Kronecker((4, 9), 2), 8, 8 * 2 * (36 + 24)),
    # N·R·I1·O1(I2 + O2) with 24 = 4·6, 36 = 9·4
    "monarch": (tnmoe.Monarch((4, 9), 2), 8, 8 * 2 * 36 * 10),
    # padded: 24 → 5·5, 36 → 7·6
    "monarch, padded": (tnmoe.Monarch((5, 7), 2, pad=True), 8, 8 * 2 * 35 * 11),
    "custom": (tnmoe.Custom("bn,bi,nr,ir,ro->bo", {"r": 7}), 8, 476),
}


@pytest.mark.parametrize(("factorization", "experts", "expected"), COUNTS.values(), ids=COUNTS)
def test_parameters_are_those_of_the_formula(factorization, experts, expected):
    report = layer_report(factorization, experts, bias=False)
    gate = 24 * (sum(experts) if isinstance(experts, tuple) else experts)
    assert report.parameters == expected + gate
    module = tnmoe.build(tnmoe.plan(tnmoe.MuMoE(24, 36, experts, factorization, FREE, bias=False)))
    assert sum(p.numel() for p in module.parameters()) == expected + gate


# A folded bias adds one more row to the input's mode; the others add N·O.
BIASES = {
    "cp": 7,
    "ring": 3 * 5,
    "train i, n, o": 3,
    "tucker": 4,
    "block term": 4 * 4,
    "hierarchical (n, i), o": 4,
    "low rank": 8 * 3,
    "kronecker": 8 * 36,
    "monarch": 8 * 36,
    "custom": 7,
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_add_a_row_or_one_bias_an_expert(name):
    factorization, experts, _ = COUNTS[name]
    with_bias, without = (layer_report(factorization, experts, bias=b).parameters for b in (True, False))
    assert with_bias - without == BIASES[name]


# MACs of one token with the gate's I·N = 192 taken off, from the table of the best orders.
WORK = {
    "cp": (tnmoe.CP(7), 476 + 7),
    "ring": (tnmoe.TensorRing((2, 3, 5)), 768 + 2 * 3 * 5),
    "train n, i, o": (tnmoe.TensorTrain((3, 5)), 564 + 3 * 5),
    # E = 1: parameters + min(r_n r_i, r_n r_o, r_i r_o) = 360 + 12
    "tucker": (tnmoe.Tucker((3, 4, 5)), 372),
    "block term": (tnmoe.BlockTerm(4, (3, 4, 5)), 4 * 372),
    # + min(t r_i, t r_o, r_i r_o) = 20 and min of pairs of (r_n, r_i, t) = 12
    "hierarchical n, (i, o)": (tnmoe.HierarchicalTucker(("n", ("i", "o")), (3, 4, 5, 6)), 438 + 20),
    "hierarchical (n, i), o": (tnmoe.HierarchicalTucker((("n", "i"), "o"), (3, 4, 6, 5)), 402 + 12),
}


@pytest.mark.parametrize("name", WORK)
def test_macs_are_those_of_the_table(name):
    factorization, expected = WORK[name]
    # One token: mixing experts, projecting inputs, joining both and mapping out, each stored number used once.
    spec = tnmoe.MuMoE(24, 36, 8, factorization, FREE, bias=False)
    assert tnmoe.plan(spec, tokens=1, objective="macs").macs - 192 == expected


def test_ranks_of_the_table():
    """min(I, O, …) at I = 24, O = 36, from the table of maximal expert ranks."""
    assert layer_report(tnmoe.TensorRing((2, 3, 2, 4), ("n1", "i", "n2", "o")), (8, 5)).max_rank == 2 * 2
    assert layer_report(tnmoe.TensorTrain((3, 5))).max_rank == 5
    assert layer_report(tnmoe.TensorTrain((3, 5), ("i", "n", "o"))).max_rank == 3
    assert layer_report(tnmoe.Tucker((2, 9, 7))).max_rank == 7
    assert layer_report(tnmoe.BlockTerm(3, (2, 9, 7))).max_rank == 21
    assert layer_report(tnmoe.BlockTerm(4, (2, 9, 7))).max_rank == 24
    assert layer_report(tnmoe.HierarchicalTucker(("n", ("i", "o")), (2, 9, 7, 3))).max_rank == 7
    assert layer_report(tnmoe.HierarchicalTucker((("n", "i"), "o"), (2, 9, 5, 7))).max_rank == 5
    assert layer_report(tnmoe.LowRank(11)).max_rank == 11
    assert layer_report(tnmoe.Kronecker((4, 2))).max_rank == 2 * 6  # min(4, 2)·min(6, 18)
    assert layer_report(tnmoe.Monarch((2, 3), 2)).max_rank == 12


def test_formulas_speak_the_fields_language():
    train = tnmoe.FactorizedLinear("I", "O", tnmoe.TensorTrain(("r",)), bias=False)
    plan = tnmoe.plan(train, sizes={"I": 8, "O": 6, "r": 2})
    assert str(tnmoe.cost(plan).formula("parameters")) == "r*(I + O)"
    split = tnmoe.FactorizedLinear("I", "O", tnmoe.Monarch(("a", "b")), bias=False)
    plan = tnmoe.plan(split, sizes={"I": 12, "O": 15, "a": 4, "b": 5})
    assert tnmoe.cost(plan).parameters == 4 * 3 * 5 + 4 * 5 * 3
    assert tnmoe.check(plan).passed


# ---- initial variance ----------------------------------------------------------------------------------------


def random_factorization(kind, levels, widths, rng):
    """Bonds of 2 to 5, so that products of few numbers do not dominate."""
    size = lambda low=2, high=6: int(rng.integers(low, high))  # noqa: E731
    ranks = lambda count: tuple(size() for _ in range(count))  # noqa: E731
    modes = [*(["n"] if levels == 1 else [f"n{e + 1}" for e in range(levels)]), "i", "o"][-levels - 2 :]
    modes = modes if levels else ["i", "o"]
    order = tuple(rng.permutation(modes).tolist())
    first = tuple(int(rng.choice([d for d in range(2, w + 1) if w % d == 0])) for w in widths)
    tree = order[-1]
    for mode in order[:-1]:
        tree = (mode, tree)
    n = "nmk"[:levels]
    custom = ",".join([*(f"b{c}" for c in n), "bi", f"{n}r", "ri", "rto", "t"]) + "->bo"
    return {
        "cp": lambda: tnmoe.CP(size()),
        "tensor_ring": lambda: tnmoe.TensorRing(ranks(levels + 2), order),
        "tensor_train": lambda: tnmoe.TensorTrain(ranks(levels + 1), order),
        "dense": tnmoe.Dense,
        "tucker": lambda: tnmoe.Tucker(ranks(levels + 2)),
        "block_term": lambda: tnmoe.BlockTerm(size(), ranks(levels + 2)),
        "hierarchical_tucker": lambda: tnmoe.HierarchicalTucker(tree, ranks(2 * levels + 2)),
        "low_rank": lambda: tnmoe.LowRank(size()),
        "kronecker": lambda: tnmoe.Kronecker(first, size()),
        "monarch": lambda: tnmoe.Monarch(first, size()),
        "custom": lambda: tnmoe.Custom(custom, {"r": size(), "t": size()}),
    }[kind]()


def sample(init, indices, sizes, draws, rng):
    """Many draws of one parameter, along a first axis."""
    shape = [draws, *(sizes[i] for i in indices)]
    match init:
        case Normal(mean, std):
            return rng.normal(mean, std, shape)
        case Uniform(bound):
            return rng.uniform(-bound, bound, shape)
        case SharedUniform(shared, bound):
            common = [1 if i in shared else n for i, n in zip(("", *indices), shape)]
            return rng.uniform(-bound, bound, shape) + rng.uniform(-bound, bound, common)
        case DiagonalNormal(rows, cols):
            eye = np.eye(sizes[rows], sizes[cols])
            spread = [1 if i not in (rows, cols) else n for i, n in zip(("", *indices), shape)]
            eye = eye if indices.index(rows) < indices.index(cols) else eye.T
            return rng.normal(1, 1, shape) * eye.reshape(spread)
    raise AssertionError(init)


def mixed_variance(spec, draws, rng):
    """Of an entry of the weight that equal shares of all experts make, the bias left aside."""
    layer = spec.layer()
    (node,) = [c for c in layer.contractions if c.expert_map is not None]
    sizes = layer.bound_sizes({"T": 1})
    inits = {p.name: bind_init(p.init, layer.values) for p in layer.parameters}
    weights = [t for t in node.network.tensors if t.role is not tnmoe.Role.DATA]
    number = {i: k + 1 for k, i in enumerate(dict.fromkeys(i for t in weights for i in t.indices))}
    operands = []
    for t in weights:
        drawn = torch.from_numpy(sample(inits[t.name], t.indices, sizes, draws, rng))
        operands += [drawn, [0, *(number[i] for i in t.indices)]]
    for n in node.expert_map.experts:
        operands += [torch.full((sizes[n],), 1 / sizes[n], dtype=torch.float64), [number[n]]]
    ends = [number[i] for m in ("i", "o") for i in node.expert_map.parts(m)]
    whole = torch.einsum(*operands, [0, *ends])
    return float(whole.square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_mixed_weights_start_with_the_variance_of_linear(kind):
    """Var = 1 / (3 I), within 10 %, for random shapes of zero to three levels."""
    for trial in range(24):
        with case(kind, trial) as rng:
            draws = np.random.default_rng(rng.getrandbits(32))
            levels = trial % 4
            widths = (int(draws.choice([8, 9, 12])), int(draws.choice([8, 10, 15])))
            factorization = random_factorization(kind, levels, widths, draws)
            if levels:
                spec = tnmoe.MuMoE(
                    *widths, tuple(int(draws.integers(2, 7 - levels)) for _ in range(levels)), factorization, FREE
                )
            else:
                spec = tnmoe.FactorizedLinear(*widths, factorization)
            found = [mixed_variance(spec, 300, draws) for _ in range(2)]
            while abs(np.mean(found) * 3 * widths[0] - 1) > 0.08 and len(found) < 60:
                found.append(mixed_variance(spec, 300, draws))  # heavy tails: products of many small factors
            assert np.mean(found) == pytest.approx(1 / (3 * widths[0]), rel=0.1), spec


emitted = pytest.mark.parametrize("factorization", EMITTED.values(), ids=EMITTED)


@emitted
def test_emitted_outputs_start_with_the_variance_of_linear(factorization):
    """What reset_parameters draws, within 20 % of nn.Linear's output variance; experts differ from the start."""
    plan = tnmoe.plan(tnmoe.MuMoE(12, 16, 5, factorization, tnmoe.Gate("softmax", "layer")), tokens=16)
    module = tnmoe.build(plan)
    torch.manual_seed(0)
    outputs, linear = [], []
    with torch.no_grad():
        for _ in range(400):
            module.reset_parameters()
            x = torch.randn(16, 12)
            outputs.append(module(x))
            linear.append(nn.Linear(12, 16)(x))
    assert float(torch.stack(outputs).var()) == pytest.approx(float(torch.stack(linear).var()), rel=0.2)
    weights = oracle.canonical(plan, dict(module.named_parameters()))
    rows = oracle.whole_weight(oracle.plan_spec(plan), weights).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 5


# ---- the contract --------------------------------------------------------------------------------------------


@pytest.mark.slow
@emitted
def test_exports_with_a_dynamic_batch_and_runs_under_autocast(factorization):
    block = tnmoe.MuMoEBlock(12, 24, 12, 4, factorization, tnmoe.Gate("entmax15", "layer"))
    module = oracle.randomise(tnmoe.build(tnmoe.plan(block, tokens=16), dtype=torch.float64), 0).eval()
    example = torch.randn(7, 12, dtype=torch.float64)
    exported = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 5):
        torch.testing.assert_close(exported.module()(example[:batch]), module(example[:batch]))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float()(example.float()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_factorized_linear(kind, bias):
    """Values, parameters and FLOPs by the dense oracle and torch's counters; a plan survives JSON."""
    plan = tnmoe.plan(tnmoe.FactorizedLinear(12, 14, LINEAR[kind], bias), tokens=9)
    report = tnmoe.check(plan)
    assert report.passed, str(report)
    assert tnmoe.Plan.from_json(plan.to_json()).program == plan.program
    module = tnmoe.build(plan, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


# ---- faults --------------------------------------------------------------------------------------------------

FAULTS = {
    "another order than the reference's": (
        lambda: tnmoe.to_reference(tnmoe.plan(tnmoe.MuMoE(4, 5, 3, tnmoe.TensorRing((2, 2, 2), ("i", "n", "o")))), {}),
        "the reference has its rings in the order experts, input, output alone",
    ),
    "a split that does not divide": (
        lambda: tnmoe.MuMoE(768, 1000, 4, tnmoe.Monarch((7, 10))).layer(),
        "blocks[0] = 7 does not divide axis 'i' of size 768 (= 7·109 + 5); take 6 or 8, or set pad = true",
    ),
    "more blocks than entries": (
        lambda: tnmoe.FactorizedLinear(4, 8, tnmoe.Kronecker((5, 2), pad=True)).layer(),
        "left[0] = 5 is more than the 4 entries of axis 'i'",
    ),
    "an output of an unknown index": (
        lambda: tnmoe.Custom("bn,nr,bi,ir,ro->bx", {"r": 4}),
        "output index 'x' is in no tensor\n  bn,nr,bi,ir,ro->bx\n                   ^",
    ),
    "a bond without a size": (
        lambda: tnmoe.Custom("bn,nr,bi,ir,ro->bo"),
        "bond 'r' has no size: add sizes={'r': …}\n  bn,nr,bi,ir,ro->bo\n      ^",
    ),
    "a size without a bond": (lambda: tnmoe.Custom("bi,io->bo", {"r": 4}), "sizes names 'r', which is no bond"),
    "a weight with the tokens": (
        lambda: tnmoe.Custom("bn,bi,bir,ro->bo", {"r": 4}),
        "a term with the token index 'b' is data",
    ),
    "a mode without a weight": (
        lambda: tnmoe.Custom("bn,bi,ir,ro->bo", {"r": 4}),
        "index 'n' is in no weight\n  bn,bi,ir,ro->bo\n   ^",
    ),
    "an output that is no vector": (
        lambda: tnmoe.Custom("bn,bi,nio->boi"),
        "the output must be two indices, tokens and outputs\n  bn,bi,nio->boi\n             ^^^",
    ),
    "levels that differ": (
        lambda: tnmoe.MuMoE(4, 5, (2, 3), tnmoe.Custom("bn,bi,nio->bo")),
        "the terms bn, bi are the coefficients of 1 level(s) of experts and the input, but the layer has 2 level(s)",
    ),
    "ranks of a train": (
        lambda: tnmoe.MuMoE(4, 5, 3, tnmoe.TensorTrain((2,))),
        "ranks has 1 entries, expected 2: a tensor train over 1 level(s) of experts, input and output has r1, r2",
    ),
    "an order that lacks a mode": (
        lambda: tnmoe.MuMoE(4, 5, 3, tnmoe.TensorTrain((2, 2), ("n", "i", "i"))),
        "order must be the modes n, i, o in some order, got ['n', 'i', 'i']",
    ),
    "an order in text": (lambda: tnmoe.TensorRing((2, 2, 2), "nio"), "order must be a list of modes"),
    "a tree that is not binary": (
        lambda: tnmoe.HierarchicalTucker(("n", "i", "o"), (2, 2, 2)),
        "tree must be nested pairs of modes",
    ),
    "a tree without a mode": (
        lambda: tnmoe.MuMoE(4, 5, (3, 2), tnmoe.HierarchicalTucker(("n", ("i", "o")), (2, 2, 2, 2))),
        "tree must have each of the modes n1, n2, i, o once, got n, i, o",
    ),
    "ranks of a tree": (
        lambda: tnmoe.MuMoE(4, 5, 3, tnmoe.HierarchicalTucker(("n", ("i", "o")), (2, 2, 2))),
        "ranks has 3 entries, expected 4: this tree over 1 level(s) of experts, input and output has n, i, o, (i, o)",
    ),
    "no factorization": (lambda: tnmoe.FactorizedLinear(4, 5, "cp"), "factorization must be one of CP, "),
    "three blocks": (lambda: tnmoe.Monarch((2, 3, 4)), "blocks must be two"),
}


@pytest.mark.parametrize(("make", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_say_where(make, words):
    with pytest.raises(tnmoe.DeclarationError) as caught:
        make()
    assert words in str(caught.value)


WASTED = {
    # 9 of 8 outputs; 4 of 3 experts; 8 of 6 inputs and the bias; 7 of 2 × 3 entries of the left factor
    "tucker": (
        tnmoe.MuMoE(6, 8, 3, tnmoe.Tucker((3, 6, 9)), bias=False),
        "'r_o' of 'y' has size 9, but more than 8",
    ),
    "train": (tnmoe.MuMoE(6, 8, 3, tnmoe.TensorTrain((4, 8))), "bond 'r1' of 'y' has size 4, but more than 3"),
    "low rank": (tnmoe.MuMoE(6, 9, 3, tnmoe.LowRank(8)), "bond 'r' of 'y' has size 8, but more than 7"),
    "kronecker": (
        tnmoe.FactorizedLinear(6, 9, tnmoe.Kronecker((2, 3), 7)),
        "'s' of 'parts' has size 7, but",
    ),
}


@pytest.mark.parametrize(("spec", "words"), WASTED.values(), ids=WASTED)
def test_ranks_beyond_use_are_warned_of_with_the_bound(spec, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tnmoe.RankWarning)
        tnmoe.plan(spec)
    assert any(words in str(w.message) for w in caught)


def test_useful_ranks_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", tnmoe.RankWarning)
        for name, (factorization, experts, _) in COUNTS.items():
            if "hierarchical" not in name:  # their roots are 3 × 6 and 6 × 5
                tnmoe.plan(tnmoe.MuMoE(24, 36, experts, factorization, FREE))


def path_macs(terms, output, sizes, path):
    """Products of every step of a path of opt_einsum, each step the extent of all its indices."""
    live, total = [set(t) for t in terms], 0
    for step in path:
        joined = set().union(*(live.pop(k) for k in sorted(step, reverse=True)))
        total += math.prod(sizes[i] for i in joined)
        live.append(joined & set(output).union(*live))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(FACTORIZATIONS) - {"custom"}))
def test_planned_macs_are_the_optimum(kind):
    """Against opt_einsum's dynamic programming with outer products, on random layers of one and two levels."""
    for trial in range(10):
        with case(kind, trial) as rng:
            draws = np.random.default_rng(rng.getrandbits(32))
            widths = (int(draws.choice([8, 9, 12])), int(draws.choice([8, 10, 15])))
            factorization = random_factorization(kind, 1 + trial % 2, widths, draws)
            spec = tnmoe.MuMoE(*widths, (5, 3)[: 1 + trial % 2], factorization, FREE, bias=False)
            planned = tnmoe.plan(spec, tokens=int(draws.integers(1, 50)), objective="macs")
            (node,) = [c for c in planned.layer.contractions if c.expert_map is not None]
            sizes = planned.layer.bound_sizes(planned.values)
            terms, output = [set(t.indices) for t in node.network.tensors], set(node.network.output)
            best = opt_einsum.DynamicProgramming(minimize="flops", search_outer=True)(terms, output, sizes)
            gates = sum(planned.values["T"] * widths[0] * n for n in spec.levels)
            assert planned.macs - gates == path_macs(terms, output, sizes, best)
