"""The choice between programs of one mixture: what is compared, what is chosen, and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.device_by_hand import by_hand
from support.families import built, canonical, rows
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.planning.candidates import other_lowerings
from tnmoe.timing.device_profile import DeviceProfile
from tnmoe.timing.predict import predict

SPEC = tnmoe.SparseMoE(16, 16, 4, 2, hidden=32)


def machine(**overhead: float) -> DeviceProfile:
    """The slow machine of `test_hardware`, with other costs of routing."""
    rates = by_hand().of("float32")
    kinds = {kind: overhead.get(kind, 0.0) for kind in rates.routing_overhead}
    return replace(by_hand(), rates={"float32": replace(rates, routing_overhead=kinds)})


MANY = tnmoe.SparseMoE(64, 64, 64, 1, hidden=64)


@pytest.mark.parametrize(("overhead", "chosen"), [({}, "gathered"), ({"expert": 1.0}, "masked")])
def test_the_least_predicted_time_is_chosen(overhead: dict[str, float], chosen: str) -> None:
    """Where one more expert in a loop costs a second, all experts run at once; else the chosen ones alone."""
    profile = machine(**overhead)
    plan = tnmoe.plan(MANY, tokens=512, objective="time", profile=profile)
    assert plan.layer.declaration["lowering"] == chosen
    pinned = {
        name: tnmoe.plan(replace(MANY, lowering=name), tokens=512, objective="time", profile=profile)
        for name in ("gathered", "masked")
    }
    times = {name: predict(p.bound, profile).seconds for name, p in pinned.items()}
    assert times[chosen] == min(times.values())
    assert predict(plan.bound, profile).seconds == times[chosen]
    assert plan.bound == pinned[chosen].bound


def test_a_plan_says_what_was_compared_and_round_trips() -> None:
    plan = tnmoe.plan(SPEC, tokens=64, objective="time", profile=machine(expert=1.0))
    assert plan.shortlist is not None
    assert plan.shortlist.lowerings == ("gathered", "masked")
    text = " ".join(str(plan).split())
    assert "in each of 2 lowerings (gathered, masked)" in text
    for name in ("gathered", "masked"):
        (line,) = [note for note in plan.table().notes if f"of the {name} form" in note]
        best = min(c.seconds for c in plan.shortlist.considered if c.lowering == name and c.seconds is not None)
        assert f"{1e6 * best:,.1f}" in line
        assert ("(chosen)" in line) == (name == "masked")
    again = tnmoe.Plan.from_json(plan.to_json())
    assert again.bound == plan.bound
    assert again.shortlist == plan.shortlist
    assert again.layer.declaration["lowering"] == "masked"


def test_the_explanation_names_what_was_compared_or_why_nothing_was() -> None:
    """Times are those of the shortlist; each reason for a single program is given, and other layers need none."""
    plan = tnmoe.plan(SPEC, tokens=64, objective="time", profile=machine(expert=1.0))
    (said,) = [line for line in tnmoe.explain(plan).splitlines() if line.startswith("Lowerings: ")]
    assert plan.shortlist is not None
    for name in ("gathered", "masked"):
        best = min(c.seconds for c in plan.shortlist.considered if c.lowering == name and c.seconds is not None)
        assert f"{name} {1e6 * best:,.1f} µs" in said
    assert "the masked one was chosen" in said
    again = tnmoe.Plan.from_json(plan.to_json())
    assert said in tnmoe.explain(again)
    for spec, why in (
        (SPEC, "knows no time of a program"),
        (replace(SPEC, lowering="masked"), "the declaration asks for the masked one"),
        (replace(SPEC, capacity=125), "slots bound what runs"),
        (replace(SPEC, null=2, shares="normalised"), "null experts"),
        (replace(SPEC, block=8), "blocks of rows"),
        (tnmoe.SMILE(16, 16, 16, 2, 2), "knows no time of a program"),
        (tnmoe.PEER(16, 16, 16, 1, 2, 4), "all experts"),
        (tnmoe.ExpertChoice(16, 16, 4, hidden=8), "all tokens"),
        (tnmoe.MLP(16, 16, 16), ""),
        (tnmoe.MoLoRA(16, 16, 4, 2), ""),
    ):
        text = tnmoe.explain(tnmoe.plan(spec, tokens=64))
        assert why in text
        assert ("Lowerings: " in text) == bool(why)


EVERY = {
    "sparse": SPEC,
    "SMILE": tnmoe.SMILE(16, 32, 16, 2, 3, 1, 2),
    "multi-head": tnmoe.MultiHeadMoE(16, 32, 4, 2, 2),
    "CartesianMoE": tnmoe.CartesianMoE(16, 32, 4, 2),
    "MoEfied": tnmoe.MoEfied(16, 32, 16, 4, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_chosen_by_time(name: str) -> None:
    spec = EVERY[name]
    for overhead, chosen in ((0.0, "gathered"), (1.0, "masked")):
        profile = machine(expert=overhead)
        plan = tnmoe.plan(spec, tokens=512, objective="time", profile=profile)
        times = {
            lowering: predict(
                tnmoe.plan(replace(spec, lowering=lowering), tokens=512, objective="time", profile=profile).bound,
                profile,
            ).seconds
            for lowering in ("gathered", "masked")
        }
        assert plan.layer.declaration["lowering"] == min(times, key=times.__getitem__)
        assert predict(plan.bound, profile).seconds == min(times.values())
        assert plan.layer.declaration["lowering"] == chosen or not overhead


@pytest.mark.parametrize("name", EVERY)
def test_masked_and_gathered_costs(name: str) -> None:
    """Executed FLOPs are torch's count; the ideal ones of both are those of the chosen experts alone."""
    spec = EVERY[name]
    reports = {}
    for lowering in ("gathered", "masked"):
        plan, module = built(replace(spec, lowering=lowering), 24)
        with FlopCounterMode(display=False) as counter:
            module(rows(plan, 24))
        reports[lowering] = tnmoe.cost(plan)
        assert reports[lowering].matmul_flops == counter.get_total_flops()
    gathered, masked = reports["gathered"], reports["masked"]
    assert gathered.parameters == masked.parameters
    assert masked.ideal is not None
    assert gathered.ideal is not None
    assert masked.ideal.flops == gathered.ideal.flops < gathered.flops
    assert masked.matmul_flops > gathered.matmul_flops


def test_without_times_the_chosen_experts_run_alone() -> None:
    for objective in ("flops", "training", "saved", "layout"):
        plan = tnmoe.plan(SPEC, tokens=64, objective=objective)
        assert plan.bound.ops == tnmoe.plan(replace(SPEC, lowering="gathered"), tokens=64).bound.ops
        assert plan.layer.declaration["lowering"] == "auto"


def test_both_lowerings_are_one_function_of_the_same_parameters() -> None:
    (gathered, first), (masked, second) = (built(replace(SPEC, lowering=name), 20) for name in ("gathered", "masked"))
    weights = canonical(gathered, first)
    with torch.no_grad():
        for name, p in canonical(masked, second).items():
            p.copy_(weights[name])
    x = rows(gathered, 20)
    assert torch.allclose(first(x), second(x), rtol=0, atol=1e-13)


def test_other_lowerings_are_offered_for_measurement() -> None:
    plan = tnmoe.plan(SPEC, tokens=64)
    (other,) = other_lowerings(plan)
    assert other.layer.declaration["lowering"] == "masked"
    assert other.values == plan.values
    (back,) = [p for p in other_lowerings(plan) if p.bound.ops != plan.bound.ops]
    assert back.bound == other.bound
    pinned = tnmoe.plan(replace(SPEC, lowering="masked"), tokens=64)
    assert other_lowerings(pinned) == ()
    assert other_lowerings(tnmoe.plan(tnmoe.MLP(4, 8, 4), tokens=2)) == ()


@pytest.mark.parametrize(
    "options",
    [{"capacity": 125}, {"null": 2, "shares": "normalised"}, {"block": 8}, {"lowering": "gathered"}],
    ids=str,
)
def test_what_has_one_program_is_not_compared(options: dict[str, object]) -> None:
    spec = replace(SPEC, **options)
    plan = tnmoe.plan(spec, tokens=64, objective="time", profile=machine(expert=1.0))
    assert plan.shortlist is not None
    assert plan.shortlist.lowerings == ("",)
    assert plan.layer.declaration == spec.declaration()


def test_symbols_keep_their_values() -> None:
    spec = tnmoe.SparseMoE("d", "d", "N", 2, hidden="2*d")
    plan = tnmoe.plan(spec, tokens=64, sizes={"d": 16, "N": 4}, objective="time", profile=machine(expert=1.0))
    assert plan.layer.declaration["lowering"] == "masked"
    assert plan.values["d"] == 16
