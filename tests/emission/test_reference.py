"""The reference implementation as the oracle: its weights give our outputs, and its published figures are ours."""

import copy
import re

import pytest
import torch
from support.reference_module import CPFactors, ReferenceMuMoE, TensorRingFactors
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.ir.contractions import Multiply

INPUTS, HIDDEN, OUTPUTS = 5, 7, 4
NORMS = {"bn": "batch", "ln": "layer"}

# Every size differs, so that a transposed core cannot fit by chance.
FACTORS = {
    ("cp", 1): (CPFactors, [6], 3, tnmoe.CP(3)),
    ("cp", 2): (CPFactors, [6, 8], 3, tnmoe.CP(3)),
    ("tr", 1): (TensorRingFactors, [6], [2, 3, 9], tnmoe.TensorRing((2, 3, 9))),
    ("tr", 2): (TensorRingFactors, [6, 8], [2, 3, 9, 10], tnmoe.TensorRing((2, 3, 9, 10))),
}


def make(family, levels, layers=1, norm="bn", bias=True, apply_ln=False):
    """A reference module with weights that no symmetry hides, and our plan of the same layer."""
    factors, experts, ranks, factorization = FACTORS[family, levels]
    gate = tnmoe.Gate("entmax15", NORMS[norm])
    torch.manual_seed(0)
    if layers == 1:
        module = ReferenceMuMoE(factors, INPUTS, OUTPUTS, experts, ranks, norm=norm, bias=bias, apply_ln=apply_ln)
        options = {"inputs": INPUTS, "outputs": OUTPUTS} | ({"input_norm": True} if apply_ln else {})
        spec = tnmoe.MuMoE
    else:
        module = ReferenceMuMoE(
            factors, INPUTS, HIDDEN, experts, ranks, second=OUTPUTS, norm=norm, bias=bias, apply_ln=apply_ln
        )
        options = {"inputs": INPUTS, "hidden": HIDDEN, "outputs": OUTPUTS, "input_norm": apply_ln}
        spec = tnmoe.MuMoEBlock
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    options |= {"experts": experts, "factorization": factorization, "gate": gate, "bias": bias}
    return module, tnmoe.plan(spec(**options), tokens=12)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


GRID = [
    pytest.param(family, levels, layers, norm, bias, apply_ln, id="-".join(label))
    for family in ("cp", "tr")
    for levels in (1, 2)
    for layers in (1, 2)
    for norm in ("bn", "ln")
    for bias in (True, False)
    for apply_ln in (False, True)
    if layers == 2 or not apply_ln
    for label in [[family, f"{levels}level", f"{layers}layer", norm, "bias" * bias or "plain", *["ln"] * apply_ln]]
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "levels", "layers", "norm", "bias", "apply_ln"), GRID)
def test_reference_weights_give_equal_outputs_and_come_back(family, levels, layers, norm, bias, apply_ln):
    """The whole promise of `from_reference` and `to_reference`, in evaluation and in training."""
    theirs, plan = make(family, levels, layers, norm, bias, apply_ln)
    state = copy.deepcopy(theirs.state_dict())
    ours = tnmoe.build(plan, dtype=torch.float64)
    ours.load_state_dict(tnmoe.from_reference(plan, state), strict=True)

    back = tnmoe.to_reference(plan, ours.state_dict())
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value), key
    theirs.load_state_dict(back, strict=True)

    for training in (False, True):  # in training the gate's batch norm uses the batch's statistics
        x = torch.randn(3, 4, INPUTS, dtype=torch.float64)
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y_ours, y_theirs = ours.train(training)(x_ours), theirs.train(training)(x_theirs)
        close(y_ours, y_theirs)
        y_ours.square().sum().backward()
        y_theirs.square().sum().backward()
        close(x_ours.grad, x_theirs.grad)
    assert state.keys() == theirs.state_dict().keys()
    for name, value in tnmoe.from_reference(plan, theirs.state_dict()).items():
        close(ours.state_dict()[name], value)  # the running statistics moved alike


def test_a_single_layer_with_apply_ln_converts():
    """The reference's `apply_ln` is an option of single layers too."""
    theirs, plan = make("cp", 1, layers=1, apply_ln=True)
    ours = tnmoe.build(plan, dtype=torch.float64)
    ours.load_state_dict(tnmoe.from_reference(plan, theirs.state_dict()), strict=True)
    x = torch.randn(3, 4, INPUTS, dtype=torch.float64)
    close(ours.eval()(x), theirs.eval()(x))


def test_gradients_of_the_weights_agree():
    """Training goes on from converted weights as it would have in the reference."""
    theirs, plan = make("tr", 2, layers=2, norm="ln", apply_ln=True)
    ours = tnmoe.build(plan, dtype=torch.float64)
    ours.load_state_dict(tnmoe.from_reference(plan, theirs.state_dict()))
    x = torch.randn(3, 4, INPUTS, dtype=torch.float64)
    for module in (ours, theirs):
        module(x).square().sum().backward()
    expected = tnmoe.from_reference(plan, {k: p.grad for k, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name])


def test_two_dimensional_input_keeps_its_shape():
    """The reference returns (B, 1, O) for (B, I); ours returns (B, O)."""
    theirs, plan = make("cp", 1)
    ours = tnmoe.build(plan, dtype=torch.float64)
    ours.load_state_dict(tnmoe.from_reference(plan, theirs.state_dict()))
    x = torch.randn(6, INPUTS, dtype=torch.float64)
    assert ours.eval()(x).shape == (6, OUTPUTS)
    close(ours(x), theirs.eval()(x)[:, 0])


def test_conversion_keeps_the_dtype():
    """A float32 checkpoint stays one, bit by bit."""
    theirs, plan = make("tr", 1, layers=2)
    state = theirs.float().state_dict()
    converted = tnmoe.from_reference(plan, state)
    assert {v.dtype for v in converted.values()} == {torch.float32}
    back = tnmoe.to_reference(plan, converted)
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_conversion_copies():
    """The result may be changed in place: neither side owns the other's memory."""
    theirs, plan = make("cp", 1)
    state = theirs.state_dict()
    converted = tnmoe.from_reference(plan, state)
    back = tnmoe.to_reference(plan, converted)
    memory = [{v.untyped_storage().data_ptr() for v in d.values() if v.ndim} for d in (state, converted, back)]
    assert not memory[0] & memory[1]
    assert not memory[1] & memory[2]


def test_a_layer_declared_in_symbols_converts():
    """The plan knows the value of every symbol, so the conversion does."""
    theirs, plan = make("cp", 1)
    symbolic = tnmoe.MuMoE("d", "d - 1", 6, tnmoe.CP("q"))
    planned = tnmoe.plan(symbolic, tokens=12, sizes={"d": INPUTS, "q": 3})
    converted = tnmoe.from_reference(planned, theirs.state_dict())
    for name, value in tnmoe.from_reference(plan, theirs.state_dict()).items():
        assert torch.equal(converted[name], value)


# ---- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["MuMoE.factors.0", "MuMoE2.factors.2", "projs.0", "bn.0.running_var", "input_ln.bias"])
def test_a_missing_key_is_named(key):
    theirs, plan = make("cp", 1, layers=2, apply_ln=True)
    state = {k: v for k, v in theirs.state_dict().items() if k != key}
    with pytest.raises(tnmoe.DeclarationError, match=f"lacks '{re.escape(key)}'"):
        tnmoe.from_reference(plan, state)


@pytest.mark.parametrize("key", ["MuMoE.factors.3", "MuMoE2.factors.0", "projs.1", "input_ln.weight", "head.weight"])
def test_an_unknown_key_is_named(key):
    """Weights that would be dropped silently are an error: another hierarchy, a second layer, a norm."""
    theirs, plan = make("cp", 1)
    state = {**theirs.state_dict(), key: torch.zeros(1)}
    with pytest.raises(tnmoe.DeclarationError, match=re.escape(repr(key))):
        tnmoe.from_reference(plan, state)


def test_batch_statistics_of_another_norm_are_an_error():
    theirs, _ = make("cp", 1, norm="bn")
    _, plan = make("cp", 1, norm="ln")
    with pytest.raises(tnmoe.DeclarationError, match=re.escape("bn.0.running_mean")):
        tnmoe.from_reference(plan, theirs.state_dict())


@pytest.mark.parametrize(
    ("key", "axis", "index"),
    [("MuMoE.factors.0", 1, "n"), ("MuMoE.factors.1", 2, "r3"), ("MuMoE.factors.2", 1, "o"), ("projs.0", 0, "i")],
)
def test_a_wrong_shape_names_its_axis(key, axis, index):
    theirs, plan = make("tr", 1)
    state = theirs.state_dict()
    size = state[key].shape[axis]
    state[key] = torch.cat([state[key], state[key]], axis)
    with pytest.raises(tnmoe.DeclarationError) as error:
        tnmoe.from_reference(plan, state)
    assert str(error.value).startswith(f"{key} has shape {tuple(state[key].shape)}")
    assert f"axis {index!r} has size {2 * size}, not {size}" in str(error.value)


def test_a_wrong_number_of_axes_is_an_error():
    theirs, plan = make("tr", 1)
    state = {**theirs.state_dict(), "MuMoE.factors.0": torch.zeros(2, 3)}
    with pytest.raises(tnmoe.DeclarationError, match=re.escape("(2, 3), expected (2, 6, 3)")):
        tnmoe.from_reference(plan, state)


@pytest.mark.parametrize("family", ["cp", "tr"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_bias_on_one_side_alone_has_a_remedy(family, declared):
    theirs, _ = make(family, 1, bias=not declared)
    _, plan = make(family, 1, bias=declared)
    with pytest.raises(tnmoe.DeclarationError, match=f"MuMoE.factors.1 .*axis 'i' .*declare bias={not declared}"):
        tnmoe.from_reference(plan, theirs.state_dict())


@pytest.mark.parametrize(("key", "axis"), [("MuMoE.factors.0", 1), ("MuMoE.factors.2", 1), ("projs.0", 0)])
def test_the_remedy_about_the_bias_stands_only_where_it_helps(key, axis):
    """One expert, output or input too many has nothing to do with a bias."""
    theirs, plan = make("tr", 1, bias=False)
    state = theirs.state_dict()
    state[key] = torch.cat([state[key], state[key].narrow(axis, 0, 1)], axis)
    with pytest.raises(tnmoe.DeclarationError, match="not") as error:
        tnmoe.from_reference(plan, state)
    assert "bias" not in str(error.value)


def test_back_conversion_checks_its_state_as_well():
    _, plan = make("cp", 1)
    state = tnmoe.build(plan).state_dict()
    lacking = {k: v for k, v in state.items() if k != "input_bias"}
    with pytest.raises(tnmoe.DeclarationError, match="lacks 'input_bias'"):
        tnmoe.to_reference(plan, lacking)
    with pytest.raises(tnmoe.DeclarationError, match="input_factor"):
        tnmoe.to_reference(plan, {**state, "input_factor": torch.zeros(3)})


def test_back_conversion_drops_no_weights():
    """The state of a layer with a bias is no state of one without."""
    _, plan = make("cp", 1)
    _, without = make("cp", 1, bias=False)
    with pytest.raises(tnmoe.DeclarationError, match="input_bias"):
        tnmoe.to_reference(without, tnmoe.build(plan).state_dict())


@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.MuMoE(INPUTS, OUTPUTS, 6, tnmoe.Dense()),
        tnmoe.MuMoEBlock(INPUTS, HIDDEN, OUTPUTS, 6, tnmoe.Dense()),
        tnmoe.MLP(INPUTS, HIDDEN, OUTPUTS),
        tnmoe.Linear(INPUTS, OUTPUTS),
        tnmoe.DenseMoE(INPUTS, HIDDEN, OUTPUTS, 6),
        tnmoe.Network.parse("bi,io->bo", weights="io"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_only_what_the_reference_has_converts(spec):
    sizes = {"b": 2, "i": 3, "o": 4} if isinstance(spec, tnmoe.Network) else None
    plan = tnmoe.plan(spec, tokens=12, sizes=sizes)
    for convert in (tnmoe.from_reference, tnmoe.to_reference):
        with pytest.raises(tnmoe.DeclarationError, match="the reference has CP and tensor-ring"):
            convert(plan, {})


# ---- published figures ---------------------------------------------------------------------------------------

LN, BN = tnmoe.Gate("entmax15", "layer"), tnmoe.Gate("entmax15", "batch")


def gpt2(factorization):
    return tnmoe.MuMoEBlock(768, 3072, 768, 256, factorization, LN, input_norm=True)


def token(factorization):
    return tnmoe.MuMoEBlock(196, 256, 196, 64, factorization, BN)


def channel(factorization):
    return tnmoe.MuMoEBlock(512, 2048, 512, 64, factorization, BN)


def head(experts, factorization):
    return tnmoe.MuMoE(768, 1000, experts, factorization, BN)


CP, TR = tnmoe.CP, tnmoe.TensorRing

# Name: layer, rows, parameters, matmul FLOPs of the reference, and ours. The reference multiplies the folded bias as
# one more row: 2·rows·R (CP) or 2·rows·r2·r3 (TR) more in every layer.
FIGURES = {
    "gpt2-mlp": (tnmoe.MLP(768, 3072, 768, input_norm=True), 1024, 4_723_968, 9_663_676_416, 9_663_676_416),
    "gpt2-cp": (gpt2(CP(556)), 1024, 4_754_008, 9_733_062_656, 9_730_785_280),
    "gpt2-tr": (gpt2(TR((4, 4, 149))), 1024, 4_784_808, 9_805_905_920, 9_803_464_704),
    "mixer-token-mlp": (tnmoe.MLP(196, 256, 196), 512, 100_804, 102_760_448, 102_760_448),
    "mixer-token-cp": (token(CP(147)), 512, 164_542, 168_491_008, 168_189_952),
    "mixer-token-tr": (token(TR((4, 4, 37))), 512, 148_680, 153_460_736, 153_157_632),
    "mixer-channel-mlp": (tnmoe.MLP(512, 2048, 512), 196, 2_099_712, 822_083_584, 822_083_584),
    "mixer-channel-cp": (channel(CP(384)), 196, 2_048_768, 803_117_056, 802_816_000),
    "mixer-channel-tr": (channel(TR((4, 4, 97))), 196, 2_022_152, 793_900_352, 793_596_160),
    "clip-linear": (tnmoe.Linear(768, 1000), 256, 769_000, 393_216_000, 393_216_000),
    "clip-128-cp": (head(128, CP(354)), 256, 769_842, 394_159_104, 393_977_856),
    "clip-128-tr": (head(128, TR((4, 4, 95))), 256, 772_572, 396_335_104, 396_140_544),
    "clip-512-cp": (head(512, CP(165)), 256, 769_581, 394_025_472, 393_940_992),
    "clip-512-tr": (head(512, TR((4, 4, 52))), 256, 769_360, 394_338_304, 394_231_808),
}


def bias_row(spec, rows):
    """Matmul FLOPs that the folded bias costs the reference, by hand."""
    if isinstance(spec, tnmoe.MLP | tnmoe.Linear):
        return 0
    ranks = spec.factorization
    width = ranks.rank if isinstance(ranks, tnmoe.CP) else ranks.ranks[1] * ranks.ranks[2]
    return 2 * rows * width * (2 if isinstance(spec, tnmoe.MuMoEBlock) else 1)


@pytest.mark.parametrize("name", FIGURES)
def test_published_parameters_and_flops(name):
    spec, rows, parameters, theirs, ours = FIGURES[name]
    report = tnmoe.cost(tnmoe.plan(spec, tokens=rows))
    assert report.parameters == parameters
    assert report.matmul_flops == ours
    assert theirs - ours == bias_row(spec, rows)
    assert report.flops > report.matmul_flops


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FIGURES if n.endswith(("-cp", "-tr"))])
def test_the_stand_in_has_the_published_figures(name):
    """The oracle itself is held to what was measured on the reference, without computing anything."""
    spec, rows, parameters, theirs, _ = FIGURES[name]
    block = isinstance(spec, tnmoe.MuMoEBlock)
    ranks = spec.factorization.rank if isinstance(spec.factorization, tnmoe.CP) else spec.factorization.ranks
    with torch.device("meta"):
        module = ReferenceMuMoE(
            CPFactors if isinstance(spec.factorization, tnmoe.CP) else TensorRingFactors,
            spec.inputs,
            spec.hidden if block else spec.outputs,
            spec.levels,
            ranks,
            second=spec.outputs if block else 0,
            norm="ln" if spec.gate.norm == "layer" else "bn",
            apply_ln=block and spec.input_norm,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.eval()(torch.empty(1, rows, spec.inputs))
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert counter.get_total_flops() == theirs


def test_whole_models_follow_from_their_blocks():
    """MLP-Mixer S-16 has 8 layers of both blocks; the two GPT-2 differ from each other in their 12 blocks alone."""
    parameters = {n: tnmoe.cost(spec, tokens=rows).parameters for n, (spec, rows, *_) in FIGURES.items()}

    def mixer(family):
        return sum(parameters[f"mixer-{b}-{family}"] - parameters[f"mixer-{b}-mlp"] for b in ("token", "channel"))

    assert 18_528_264 + 8 * mixer("cp") == 18_630_616
    assert 18_528_264 + 8 * mixer("tr") == 18_290_792
    assert 12 * (parameters["gpt2-tr"] - parameters["gpt2-cp"]) == 125_205_984 - 124_836_384
    flops = {n: FIGURES[n][3] for n in ("gpt2-tr", "gpt2-cp")}
    assert 12 * (flops["gpt2-tr"] - flops["gpt2-cp"]) == 254_774_280_192 - 253_900_161_024


@pytest.mark.parametrize(
    ("factorization", "theirs", "ours", "hadamards"),
    [(CP(556), 304_158_208, 304_087_040, 35_584), (TR((4, 4, 149)), 306_434_560, 306_358_272, 0)],
    ids=["cp", "tr"],
)
def test_hand_derived_figures_for_32_tokens(factorization, theirs, ours, hadamards):
    """The GPT-2 block with 256 experts, worked out by hand: matmuls, and the Hadamard products that torch ignores."""
    report = tnmoe.cost(tnmoe.plan(gpt2(factorization), tokens=32))
    assert report.matmul_flops == ours
    assert theirs - ours == bias_row(gpt2(factorization), 32)
    steps = list(zip(report.bound.ops, report.numbers.per_op))
    products = sum(c.elementwise_flops for op, c in steps if isinstance(op, Multiply))
    assert products == hadamards
    # What else is element-wise are the additions of the split-off bias, one for each entry of x·B.
    assert report.elementwise_flops - products == bias_row(gpt2(factorization), 32) // 2
    assert report.macs == ours // 2 + hadamards
