"""The time model on a profile made by hand, its JSON form, and the structure of a calibration. Nothing is timed."""

from __future__ import annotations

import itertools
import json
import math
import random
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device_by_hand import FAST_OVERHEAD, GRAPH_OVERHEAD, OVERHEAD, ROUTING_OVERHEAD, by_hand, value
from torch.utils._python_dispatch import TorchDispatchMode

import tnmoe
from tnmoe.ir import ops, routing_ops
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Merge, Multiply, Permute, Reduce, Split
from tnmoe.ir.fused_ops import ContractMix, ContractMultiply, DualContract
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.routing_ops import GroupedContract, RoutingOp
from tnmoe.ir.value import Value
from tnmoe.measuring.calibrate import calibrate
from tnmoe.timing.device_profile import DeviceProfile, default_path, load_cached
from tnmoe.timing.op_time import torch_calls
from tnmoe.timing.predict import op_seconds, predict, working_set
from tnmoe.timing.rates import (
    Grid,
)
from tnmoe.timing.routing_time import touched_experts

SIZES = {"t": 32, "i": 16, "o": 8, "a": 4, "b": 2, "n": 4, "k": 2, "c": 5, "s": 64}

X, W = Value("x", ("t", "i")), Value("w", ("i", "o"))

Y, BIAS = Value("y", ("t", "o")), Value("c", ("o",))

Z = Value("z", ("t", "i"))

EXAMPLES: dict[str, tuple[ops.Op, float | None]] = {
    # 2·32·16·8 FLOPs at 1 GFLOP/s
    "Contract": (Contract(Y, X, W), 8192e-9 + OVERHEAD["matmul"]),
    # … and 32·8 results of 4 bytes, at 2 GB/s
    "ContractAdd": (ContractAdd(Y, X, W, BIAS), 8192e-9 + 512e-9 + OVERHEAD["matmul"] + OVERHEAD["bias"]),
    # two operands and the result, 32·16 elements of 4 bytes each
    "Multiply": (Multiply(Z, X, X), 3 * 2048 / 2e9 + OVERHEAD["Multiply"]),
    "Add": (Add(Z, X, X), 3 * 2048 / 2e9 + OVERHEAD["Add"]),
    "Reduce": (Reduce(Value("z", ("t",)), X), (2048 + 128) / 2e9 + OVERHEAD["Reduce"]),
    "Permute": (Permute(Value("z", ("i", "t")), X), 2 * 2048 / 2e9 + OVERHEAD["Permute"]),
    "Softmax": (Softmax(Z, X, "i"), 512 / 1e8 + OVERHEAD["Softmax"]),
    "Entmax15": (Entmax15(Z, X, "i"), 512 / 1e8 + OVERHEAD["Entmax15"]),
    "Sparsemax": (Sparsemax(Z, X, "i"), 512 / 1e8 + OVERHEAD["Sparsemax"]),
    "Sigmoid": (Sigmoid(Z, X), 2 * 2048 / 2e9 + OVERHEAD["Sigmoid"]),
    "Gelu": (Gelu(Z, X), 2 * 2048 / 2e9 + OVERHEAD["Gelu"]),
    "LayerNorm": (LayerNorm(Z, X, "i"), 512 / 1e8 + OVERHEAD["LayerNorm"]),
    "BatchNorm": (
        BatchNorm(Z, X, "i", Value("m", ("i",)), Value("v", ("i",))),
        512 / 1e8 + OVERHEAD["BatchNorm"],
    ),
    "Split": (Split(Value("z", ("t", "a", "b")), X, "i", ("a", "b")), OVERHEAD["split"]),
    "Merge": (Merge(Y, Value("z", ("t", "a", "b")), "o", ("a", "b")), OVERHEAD["merge"]),
    # fused ones take what they stand for takes: no profile times their kernels
    "ContractMultiply": (
        ContractMultiply(Value("z", ("t", "o")), X, W, None, Y),
        8192e-9 + OVERHEAD["matmul"] + 3 * 1024 / 2e9 + OVERHEAD["Multiply"],
    ),
    "DualContract": (
        DualContract(Y, X, W, None, X, W, BIAS),
        2 * (8192e-9 + OVERHEAD["matmul"]) + 512e-9 + OVERHEAD["bias"] + 3 * 1024 / 2e9 + OVERHEAD["Multiply"],
    ),
    "ContractMix": (  # a product of 32·16·16, its columns merged and split again, and a batched one of 32·4·2·8
        ContractMix(Value("z", ("t", "a", "o")), Value("m", ("t", "a", "b")), X, Value("w", ("i", "b", "o")), None),
        16384e-9 + OVERHEAD["matmul"] + OVERHEAD["merge"] + OVERHEAD["split"] + 4096 / 5e8 + OVERHEAD["batched"],
    ),
    "GeluBackward": (GeluBackward(Z, X, X), None),  # forward passes are what is timed
}

POSITIONS, SLOTS = value("p", "tk", True), value("s", "s", True)

ROUTED: dict[str, tuple[ops.Op, float | None]] = {
    # 32 · 4 entries, at 10 M/s
    "TopK": (routing_ops.TopK(value("y", "tk"), POSITIONS, value("x", "tn"), "n"), 128e-7 + ROUTING_OVERHEAD["TopK"]),
    "ProductTopK": (
        routing_ops.ProductTopK(value("y", "tk"), POSITIONS, value("l", "tn"), value("r", "ta")),
        128e-7 + ROUTING_OVERHEAD["ProductTopK"],
    ),
    # product and sum of 32 · 2 · 2 positions of 8 bytes, at 2 GB/s
    "PairPositions": (
        routing_ops.PairPositions(value("y", "tkb", True), POSITIONS, value("r", "tb", True), "n"),
        2 * (2 * 8 * 128 / 2e9 + OVERHEAD["Multiply"]),
    ),
    "Noise": (routing_ops.Noise(Z, X, value("s", "ti")), 0.0),  # of no evaluation
    "Normalise": (routing_ops.Normalise(value("y", "tk"), value("x", "tk")), 64e-7 + ROUTING_OVERHEAD["Normalise"]),
    "SortSlots": (
        routing_ops.SortSlots(SLOTS, value("r", "s", True), value("c", "n", True), POSITIONS),
        64e-7 + ROUTING_OVERHEAD["SortSlots"],
    ),
    "Unsort": (routing_ops.Unsort(value("y", "tki"), value("x", "si"), SLOTS), 1024e-7 + ROUTING_OVERHEAD["Gather"]),
    "CapacitySlots": (
        routing_ops.CapacitySlots(value("y", "nc"), value("r", "nc", True), value("h", "tk"), POSITIONS),
        64e-7 + ROUTING_OVERHEAD["CapacitySlots"],
    ),
    "Gather": (routing_ops.Gather(value("y", "tki"), X, POSITIONS, "t"), 1024e-7 + ROUTING_OVERHEAD["Gather"]),
    "ScatterAdd": (
        routing_ops.ScatterAdd(X, value("y", "tki"), POSITIONS, "t"),
        1024e-7 + ROUTING_OVERHEAD["ScatterAdd"],
    ),
    "Spread": (routing_ops.Spread(value("y", "tn"), value("x", "tk"), POSITIONS, "n"), 128e-7 + 1e-7 * 4),
    # 64 rows, 4 experts: all are met (4 · (1 - (3/4)^64)), with 16 rows each; and the results are joined
    "GroupedContract": (
        GroupedContract(value("y", "so"), value("x", "si"), value("w", "nio"), None, value("c", "n", True)),
        ROUTING_OVERHEAD["grouped"]
        + 4 * (1 - 0.75**64) * (2 * 64 / (4 * (1 - 0.75**64)) * 16 * 8 / 1e9 + OVERHEAD["matmul"] + 10e-7)
        + 2 * 64 * 8 * 4 / 2e9
        + OVERHEAD["Permute"],
    ),
    "Select": (routing_ops.Select(value("y", "t"), value("x", "tn"), "n", 0), OVERHEAD["split"]),
    "LoadBalance": (routing_ops.LoadBalance(value("y", ""), value("x", "tn"), POSITIONS), None),  # beside the pass
    "ZLoss": (routing_ops.ZLoss(value("y", ""), value("x", "tn")), None),
    "Dropped": (routing_ops.Dropped(value("y", "", True), POSITIONS, value("r", "nc", True)), None),
    "Missed": (routing_ops.Missed(value("y", "", True), POSITIONS, "n"), None),
}

EXAMPLES |= ROUTED


def test_every_op_is_timed_or_refused_by_name() -> None:
    assert set(ROUTED) == {kind.__name__ for kind in typing.get_args(RoutingOp)}
    assert set(EXAMPLES) == {kind.__name__ for kind in typing.get_args(ops.Op)}
    for kind, (op, expected) in EXAMPLES.items():
        if expected is None:
            with pytest.raises(tnmoe.CostError, match=kind):
                op_seconds(op, SIZES, by_hand(), "float32")
        else:
            assert op_seconds(op, SIZES, by_hand(), "float32") == pytest.approx(expected, rel=1e-12), kind


def test_few_rows_are_multiplied_one_by_one_and_null_experts_not_at_all() -> None:
    """6 rows of 4 experts are 6 products of a row; where 2 of them are null, 3."""
    sizes = {**SIZES, "s": 6, "e": 4, "n": 2}
    rows_of, weight = value("x", "si"), value("w", "nio")
    one = 2 * 16 * 8 / 1e9 + OVERHEAD["matmul"] + OVERHEAD["bias"] + 4 * 8 / 2e9 + ROUTING_OVERHEAD["expert"]
    joined = 2 * 6 * 8 * 4 / 2e9 + OVERHEAD["Permute"]
    for index, products in (("e", 3), ("t", 6)):
        sizes["t"], bias = 4, value("b", "no")
        counts = value("c", index, True)
        if index == "t":
            sizes["n"] = 4
        op = GroupedContract(value("y", "so"), rows_of, weight, bias, counts)
        assert op_seconds(op, sizes, by_hand(), "float32") == pytest.approx(
            ROUTING_OVERHEAD["grouped"] + products * one + joined
        )


def test_touched_experts() -> None:
    """Against the mean of draws: 40 choices among 16 experts, and a single expert."""
    draws = random.Random(0)
    mean = sum(len({draws.randrange(16) for _ in range(40)}) for _ in range(4000)) / 4000
    assert touched_experts(16, 40) == pytest.approx(mean, rel=0.01)
    assert touched_experts(1, 7) == 1


def test_a_profile_without_routing_serves_other_layers() -> None:
    """As files of before routing was measured are; a routed layer is refused with what to do."""
    old = by_hand()
    old = replace(old, rates={"float32": replace(old.of("float32"), routing={}, routing_overhead={})})
    assert DeviceProfile.from_json(old.to_json()) == old
    assert "routing" not in json.loads(old.to_json())["rates"]["float32"]
    plan = tnmoe.plan(tnmoe.MLP(8, 16, 8), tokens=4)
    assert predict(plan.bound, old).seconds == predict(plan.bound, by_hand()).seconds
    with pytest.raises(tnmoe.CostError, match="TopK has no rate in it: run `tnmoe calibrate` again"):
        predict(tnmoe.plan(tnmoe.SparseMoE(8, 8, 4, 2), tokens=4).bound, old)


def test_the_working_set_has_the_chosen_experts_alone() -> None:
    """Of 64 experts of 8 · 8 weights, 2 tokens with one choice each meet two at most."""
    plan = tnmoe.plan(tnmoe.SparseMoE(8, 8, 64, 1, bias=False), tokens=2)
    intermediates = sum(
        math.prod(int(plan.bound.sizes[i]) for i in v.indices) for op in plan.bound.ops for v in ops.results(op)
    )
    assert working_set(plan.bound, "float32") == 4 * (2 * 8 + 8 * 64 + 2 * 64 + intermediates)


def test_batched_products_have_their_own_rate_and_views_their_own_time() -> None:
    batched = Contract(Value("y", ("t", "a", "o")), Value("x", ("t", "a", "b")), Value("w", ("t", "b", "o")))
    seconds = op_seconds(batched, SIZES, by_hand(), "float32")
    assert seconds == pytest.approx(2 * 32 * 4 * 2 * 8 / 5e8 + OVERHEAD["batched"])
    broadcast = Contract(Value("y", ("t", "a", "o")), Value("w", ("a", "b")), Value("x", ("t", "b", "o")))
    seconds = op_seconds(broadcast, SIZES, by_hand(), "float32")
    assert seconds == pytest.approx(2 * 32 * 4 * 2 * 8 / 5e8 + OVERHEAD["batched"] + OVERHEAD["merge"])  # its expansion
    # (a b) is merged in the weight, and split again in the result
    viewed = Contract(Value("y", ("t", "a", "b")), X, Value("w", ("i", "a", "b")))
    seconds = op_seconds(viewed, SIZES, by_hand(), "float32")
    expected = 2 * 32 * 16 * 8 / 1e9 + OVERHEAD["matmul"] + OVERHEAD["merge"] + OVERHEAD["split"]
    assert seconds == pytest.approx(expected)


def test_bandwidth_bounds_every_op() -> None:
    slow = by_hand()
    slow = replace(slow, rates={"float32": replace(slow.of("float32"), bandwidth=1e3)})
    moved = 4 * (32 * 16 + 16 * 8 + 32 * 8)
    assert op_seconds(EXAMPLES["Contract"][0], SIZES, slow, "float32") == pytest.approx(
        moved / 1e3 + OVERHEAD["matmul"]
    )
    for kind, (op, expected) in EXAMPLES.items():
        if expected is not None and kind not in ("Split", "Merge", "Select", "Noise"):  # views move nothing
            assert op_seconds(op, SIZES, slow, "float32") > expected, kind


def test_operands_are_fetched_from_where_the_working_set_lies() -> None:
    op = EXAMPLES["Contract"][0]
    alone = op_seconds(op, SIZES, by_hand(), "float32")
    assert op_seconds(op, SIZES, by_hand(), "float32", working_set=2000) == alone
    moved = 4 * (32 * 16 + 16 * 8 + 32 * 8)  # within 4096 bytes, read at 1 TB/s; in 1 MiB at 1 GB/s
    seconds = op_seconds(op, SIZES, by_hand(), "float32", working_set=2**21)
    assert seconds == pytest.approx(alone + moved / 1e9 - moved / 1e12)


def test_working_set_is_every_value_once() -> None:
    plan = tnmoe.plan(tnmoe.Linear(64, 48), tokens=4)
    assert working_set(plan.bound, "float32") == 4 * (4 * 64 + 64 * 48 + 48 + 4 * 48)


def test_grid_reproduces_its_points_and_is_geometric_between_them() -> None:
    grid = Grid(((1, 16), (4, 64)), (1.0, 2.0, 4.0, 8.0))
    assert [grid.at(a, b) for a in (1, 16) for b in (4, 64)] == pytest.approx([1, 2, 4, 8])
    assert grid.at(4, 4) == pytest.approx(2.0)  # half way from 1 to 4, in logarithms
    assert grid.at(4, 16) == pytest.approx(math.sqrt(8.0))
    assert grid.at(1000, 1000) == pytest.approx(8.0)  # the edge's value beyond it
    for point in ((1,), (0, 4), (1, 2, 3)):
        with pytest.raises(tnmoe.CostError):
            grid.at(*point)


@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.Linear(64, 48),
        tnmoe.MLP(32, 64, 32),
        tnmoe.MuMoE(32, 24, 8, tnmoe.CP(6)),
        tnmoe.MuMoEBlock(32, 64, 32, (4, 3), tnmoe.TensorRing((2, 2, 2, 5)), tnmoe.Gate("softmax", "layer")),
        tnmoe.SparseMoE(32, 32, 8, 2, 64, lowering="masked"),
        tnmoe.SparseMoE(32, 32, 8, 2, 64, block=1),
        tnmoe.SoftMoE(32, 32, 4, 2, 64),
        tnmoe.PEER(32, 32, 64, 2, 4, 8),
        tnmoe.MixtureOfHeads(32, 4, 2, 8),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_more_tokens_take_more_time(spec: Any) -> None:
    profile, found = by_hand(), []
    for tokens in (1, 2, 3, 17, 256, 4096):
        plan = tnmoe.plan(spec, tokens=tokens)
        prediction = predict(plan.bound, profile)
        assert len(prediction.per_op) == len(plan.bound.ops)
        assert prediction.seconds == pytest.approx(prediction.call + sum(prediction.per_op))
        found.append(prediction.seconds)
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_call_counts_ops_and_uses_of_parameters() -> None:
    prediction = predict(tnmoe.plan(tnmoe.Linear(64, 48), tokens=4).bound, by_hand())
    assert prediction.call == pytest.approx(OVERHEAD["call"] + 2 * OVERHEAD["parameter"] + OVERHEAD["switch"])


def test_a_result_beyond_the_grid_costs_what_a_fresh_one_costs_more() -> None:
    profile = by_hand()
    fresh = Grid(((512, 1024),), (1e9, 1e6))
    profile = replace(
        profile, rates={"float32": replace(profile.of("float32"), gemm=Grid(((16,), (16,), (8,)), (1e9,)), fresh=fresh)}
    )
    # 16·8 results of 4 bytes were measured, 32·8 are written
    seconds = op_seconds(EXAMPLES["Contract"][0], SIZES, profile, "float32")
    assert seconds == pytest.approx(8192e-9 + OVERHEAD["matmul"] + 1024 / 1e6 - 1024 / 1e9)


def test_products_of_the_flavour_fast_take_their_own_rates() -> None:
    """4 GFLOP/s, with the bias inside; batched ones, and those with a bias for each entry, are public ones."""
    product, biased = EXAMPLES["Contract"][0], EXAMPLES["ContractAdd"][0]
    for op in (product, biased):
        assert op_seconds(op, SIZES, by_hand(), "float32", fast=True) == pytest.approx(8192e-9 / 4 + FAST_OVERHEAD)
    batched = Contract(value("y", "tao"), value("x", "tai"), value("w", "tio"))
    whole = ContractAdd(Y, X, W, value("c", "to"))
    for op in (batched, whole):
        seconds = op_seconds(op, SIZES, by_hand(), "float32")
        assert op_seconds(op, SIZES, by_hand(), "float32", fast=True) == seconds


def test_only_the_function_of_a_module_is_fast() -> None:
    """The gate's product stays with autograd, and so with the public one."""
    plan = tnmoe.plan(tnmoe.MuMoE(16, 8, 4, tnmoe.CP(6)), tokens=32, memory="save", flavour="fast")
    assert (plan.flavour, tnmoe.plan(plan.layer, tokens=32).flavour) == ("fast", "portable")
    own = plan.adjoint
    assert own is not None
    public = predict(plan.bound, by_hand(), adjoint=own)
    fast = predict(plan.bound, by_hand(), adjoint=own, flavour=plan.flavour)
    faster = {op.out.name for op, a, b in zip(plan.bound.ops, fast.per_op, public.per_op, strict=True) if a != b}
    assert faster == {op.out.name for op in own.ops if isinstance(op, Contract | ContractAdd)}
    assert fast.call == pytest.approx(predict(plan.bound, by_hand()).call + GRAPH_OVERHEAD["apply"])


def test_profiles_without_fast_products_say_so() -> None:
    """Where the flavour calls public products, theirs are the rates."""
    old = replace(by_hand(), rates={"float32": replace(by_hand().of("float32"), fast=None)})
    op = EXAMPLES["Contract"][0]
    with pytest.raises(tnmoe.CostError, match="before the flavour 'fast' was measured: run `tnmoe calibrate` again"):
        op_seconds(op, SIZES, old, "float32", fast=True)
    for elsewhere in (replace(old, device="cuda"), replace(old, rates={"bfloat16": old.of("float32")})):
        (dtype,) = elsewhere.rates
        assert op_seconds(op, SIZES, elsewhere, dtype, fast=True) == op_seconds(op, SIZES, elsewhere, dtype)


def test_a_plan_by_time_knows_its_flavour() -> None:
    """Of the orders the best one by the rates of what will be emitted."""
    plan = tnmoe.plan(
        tnmoe.MuMoE(16, 8, 4, tnmoe.CP(6)),
        tokens=32,
        objective="time",
        profile=by_hand(),
        memory="save",
        flavour="fast",
    )
    seconds = predict(plan.executed, by_hand(), adjoint=plan.adjoint, flavour=plan.flavour).seconds
    assert plan.shortlist is not None
    assert plan.shortlist.considered[plan.shortlist.chosen].seconds == pytest.approx(seconds)


def test_table_names_the_profile_and_sums_up() -> None:
    prediction = predict(tnmoe.plan(tnmoe.Linear(64, 48), tokens=4).bound, by_hand())
    table = prediction.table()
    assert "slow machine (by hand)" in str(table)
    times = [row["nanoseconds"] for row in table.records()]
    assert times[-1] == round(1e9 * prediction.seconds)
    assert table.records()[-1]["share"] == "100.0%"


def test_symbols_and_missing_dtypes_are_errors() -> None:
    plan = tnmoe.plan(tnmoe.Linear(64, 48), tokens=4)
    with pytest.raises(tnmoe.CostError, match="bind the program first"):
        predict(plan.program, by_hand())
    profile = by_hand()
    both = replace(profile, rates={**profile.rates, "bfloat16": profile.of("float32")})
    with pytest.raises(tnmoe.CostError, match=r"no dtype 'float64'; it has float32, bfloat16\."):
        predict(plan.bound, both, "float64")


# ---- JSON ----------------------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    profile = by_hand()
    uneven = replace(profile.of("float32"), gemm=Grid(((1, 3), (5,), (7, 9)), (1.5, 1 / 3, 2e9, 1e12)))
    profile = replace(profile, rates={**profile.rates, "bfloat16": uneven})
    assert DeviceProfile.from_json(profile.to_json()) == profile
    old = replace(
        profile, rates={"float32": replace(uneven, fast=None, training=None, routing={}, routing_overhead={})}
    )
    assert DeviceProfile.from_json(old.to_json()) == old


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


GEMM = ("rates", "float32", "gemm")

CORRUPTIONS = {
    "another format": put("format", value="tnmoe-plan-1"),
    "no format": drop("format"),
    "an unknown key": put("colour", value="red"),
    "no name": drop("name"),
    "a blank name": put("name", value=" "),
    "a number as source": put("source", value=3),
    "rates are a list": put("rates", value=[]),
    "no rates": put("rates", value={}),
    "an unknown dtype": put("rates", "float31", value={}),
    "rates of a dtype are null": put("rates", "float32", value=None),
    "no gemm": drop(*GEMM),
    "a grid without axes": drop(*GEMM, "axes"),
    "too few axes": put(*GEMM, "axes", value=[[1], [1]]),
    "an empty axis": put(*GEMM, "axes", 0, value=[]),
    "a descending axis": put(*GEMM, "axes", 0, value=[2, 1]),
    "a size of zero": put(*GEMM, "axes", 0, value=[0]),
    "a size that is true": put(*GEMM, "axes", 0, value=[True]),
    "a size that is text": put(*GEMM, "axes", 0, value=["1"]),
    "an enormous size": put(*GEMM, "axes", 0, value=[10**4000]),
    "too many values": put(*GEMM, "values", value=[1.0, 2.0]),
    "values are text": put(*GEMM, "values", value="1"),
    "a rate of zero": put(*GEMM, "values", value=[0]),
    "a negative rate": put(*GEMM, "values", value=[-1.0]),
    "a rate that is not a number": put(*GEMM, "values", value=[math.nan]),
    "an infinite rate": put(*GEMM, "values", value=[math.inf]),
    "an enormous rate": put(*GEMM, "values", value=[10**4000]),
    "a rate that is text": put(*GEMM, "values", value=["fast"]),
    "a stream lacking": drop("rates", "float32", "streams", "Gelu"),
    "an unknown rowwise kind": put("rates", "float32", "rowwise", "Sort", value={}),
    "no bandwidth": put("rates", "float32", "bandwidth", value=None),
    "no memory": drop("rates", "float32", "memory"),
    "a negative overhead": put("rates", "float32", "overhead", "matmul", value=-1e-6),
    "routing without its overhead": drop("rates", "float32", "routing_overhead"),
    "a kind of routing lacking": drop("rates", "float32", "routing", "TopK"),
    "a grid of routing with one axis": put("rates", "float32", "routing", "Gather", "axes", value=[[1]]),
    "fast products without their overhead": drop("rates", "float32", "fast", "overhead"),
    "fast products over one size": put("rates", "float32", "fast", "gemm", "axes", value=[[1]]),
    "training without autograd": drop("rates", "float32", "training", "graph"),
    "a kind of gradient lacking": drop("rates", "float32", "training", "rowwise", "LayerNorm"),
    "a negative node": put("rates", "float32", "training", "graph", "node", value=-1),
    "overhead is a number": put("rates", "float32", "overhead", value=1e-6),
}


@pytest.mark.parametrize("fault", CORRUPTIONS)
def test_corrupted_profiles_are_refused(fault: str, tmp_path: Path) -> None:
    data = json.loads(by_hand().to_json())
    CORRUPTIONS[fault](data)
    text = json.dumps(data)
    with pytest.raises(tnmoe.TnmoeError) as caught:
        DeviceProfile.from_json(text)
    assert 10 < len(str(caught.value)) < 500
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="utf-8")
    assert load_cached(path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, "1" * 10_000, '{"format": "tnmoe'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(tnmoe.TnmoeError, match="a profile must be"):
        DeviceProfile.from_json(text)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path("cuda") == tmp_path / "tnmoe" / "profile-cuda.json"
    assert load_cached() is None
    default_path().parent.mkdir()
    tnmoe.save(by_hand().to_json(), default_path())
    assert load_cached() == by_hand()
    default_path().write_bytes(b"\xff\xfe")
    assert load_cached() is None
    assert load_cached(tmp_path) is None  # a directory
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "tnmoe" / "profile-cpu.json"


# ---- calibration ---------------------------------------------------------------------------------------------


def test_calibration_gives_a_valid_profile() -> None:
    calls: list[tuple[int, int]] = []
    profile = calibrate(budget=0.2, progress=lambda done, total: calls.append((done, total)))
    assert DeviceProfile.from_json(profile.to_json()) == profile
    assert profile.device == "cpu"
    assert list(profile.rates) == ["float32"]
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1
    plan = tnmoe.plan(tnmoe.MuMoEBlock(32, 64, 32, 8, tnmoe.TensorRing((2, 2, 5))), tokens=16)
    assert 0 < predict(plan.bound, profile).seconds < math.inf


def test_calibration_reads_the_clock_that_it_is_given() -> None:
    """By a clock that ticks a millisecond a look, whatever runs takes one."""
    ticks = itertools.count()
    profile = calibrate(budget=0.2, clock=lambda: next(ticks) * 1e-3)
    assert profile.of("float32").overhead["merge"] == pytest.approx(1e-3)
    assert profile.of("float32").overhead["call"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"dtypes": ("float31",)}, "unknown dtype 'float31'"),
        ({"dtypes": ("int8",)}, "unknown dtype 'int8'"),
        ({"dtypes": ()}, "at least one"),
        ({"budget": 0}, "budget must be"),
        ({"budget": math.nan}, "budget must be"),
        ({"budget": "long"}, "budget must be"),
    ],
)
def test_calibration_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tnmoe.CostError, match=message):
        calibrate(**arguments)


@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.SparseMoE(8, 8, 4, 2),
        tnmoe.SparseMoE(8, 8, 4, 2, block=1),
        tnmoe.SparseMoE(8, 8, 4, 2, capacity=125),
        tnmoe.SparseMoE(8, 8, 4, 2, lowering="masked", shares="normalised"),
        tnmoe.PEER(8, 8, 16, 2, 3, 4),
        tnmoe.ExpertChoice(8, 8, 4, 150),
    ],
    ids=str,
)
def test_calls_are_those_that_torch_sees(spec: Any) -> None:
    """Of the whole module, against a count of what torch dispatches besides views: half of it to a quarter more."""
    plan = tnmoe.plan(spec, tokens=24)
    module = tnmoe.build(plan)

    class Counter(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counter.seen += not (func.is_view or "view" in str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Counter():
        module(torch.randn(24, 8))
    counted = sum(torch_calls(op, plan.bound.sizes) for op in plan.bound.ops)
    assert 0.5 * Counter.seen <= counted <= 1.25 * Counter.seen
