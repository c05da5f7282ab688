"""Choice by measurement: build candidates of a layer, time them side by side, keep the winner.

Candidates are orders × layouts of weights × flavours of products × memory policies × chunks of tokens. Their whole
product is never measured: orders are compared in one variant, then all variants of the best orders with one chunk, then
the chunks of the best ones; at last what is left, for as many rounds as are asked for. What was measured is cached: for
the same layer, sizes and settings on the same device, with the same torch and number of threads, nothing is run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tnmoe._version import __version__
from tnmoe.autodiff.backward_plan import FLOAT32_BYTES, plan_function
from tnmoe.autodiff.rematerialise import Memory
from tnmoe.costing.backward import gradient_names
from tnmoe.costing.traffic import forward_traffic, total
from tnmoe.errors import PlanError, unknown
from tnmoe.io import cache
from tnmoe.io.json_fields import Field
from tnmoe.io.progress import bar
from tnmoe.measuring.calibrate import processor
from tnmoe.measuring.harness import Bench
from tnmoe.measuring.race import Race, Runner
from tnmoe.measuring.tuned import Measured, Tuned, winner
from tnmoe.measuring.variants import Choices, Variant, choices, variant_of
from tnmoe.planners.effort import check_budget
from tnmoe.planning.candidates import diverse
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import symbol_sizes, with_tokens
from tnmoe.planning.request import DEFAULT_TOKENS, Planable

FORMAT = "tnmoe-tuned-2"
DTYPES = ("float32", "float64", "bfloat16", "float16")

BUDGET = 120.0
"""Seconds for a whole measurement, by default."""

STAGE = 5
"""Rounds of a stage that shortens the list, at most."""

KEPT = 2
"""Candidates that go on to the next stage, besides the first."""

SHARES = (0.2, 0.6, 0.75, 1.0)
"""Of the budget, at which the stages of orders, variants and chunks, and the last one, end early."""


MOST_MOVED = 4
"""Times the elements of the order that moves the fewest: one that moves more is not tried, since a single pass would
take most of the budget; see docs/decisions/moved-elements.md."""


def tune(
    what: Plan | Planable,
    *,
    tokens: int | None = None,
    sizes: dict[str, int] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    training: bool = False,
    count: int = 4,
    layouts: Iterable[str | Iterable[str]] | None = None,
    flavours: Iterable[str] | None = None,
    chunks: Iterable[int | None] | None = None,
    memory: Iterable[Memory] | None = None,
    rounds: int = 15,
    budget: float | None = BUDGET,
    fresh: bool = False,
) -> Tuned:
    """Time orders of a layer, and the ways to emit them, on this machine, interleaved; choose the fastest.

    All candidates compute the same on the same weights, which is checked before they are timed; what differs is listed
    in the four arguments that follow `count`, and naming them narrows what may be chosen. The chosen plan emits exactly
    what was measured. Second derivatives need autograd's backward pass: `flavours=["portable"], chunks=[None],
    memory=[None]`.

    Args:
        what: a plan, whose own order and setting take part; or anything that `plan` takes.
        tokens, sizes: as in `plan`; by default those of the plan.
        device: "cpu" or "cuda"; on a CPU with as many threads as torch now uses.
        dtype: of weights and activations.
        training: forward and backward pass instead of the forward pass alone.
        count: orders to measure; the cheapest by FLOPs of what is measured, and between them the cheapest where each
            element moved counts as well, without those that move more than four times as many as another of them.
        layouts: as in `plan`; by default the plan's, "auto", "rows" and "columns".
        flavours: as in `plan`; by default all that make a difference on the device in that dtype.
        chunks: as in `plan`; by default None and the powers of two from 256 to 2048 below the number of tokens.
        memory: as in `plan`; by default what the plan keeps (for other orders: at most as many bytes) if it has a
            backward pass of its own, else None, and "save" too in training. None is "save" where flavour or chunk need
            a backward pass of its own.
        rounds: of the last stage; those before take up to five.
        budget: seconds for all of it; when they are over, the stages end early. None for no limit.
        fresh: measure anew, even if the cache knows.

    Raises:
        PlanError: a faulty device, dtype, count, budget or number of rounds; something to choose from that is
            unknown, or that no candidate can be made of.
        EmitError: a layer that cannot be built, or candidates that do not agree, which is a fault of tnmoe.
        DeclarationError: as `plan`.
    """
    import torch  # planning and costing do without

    if device not in ("cpu", "cuda"):
        raise PlanError(unknown("device", device, ["cpu", "cuda"]))
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError("torch finds no CUDA device here; tune with device='cpu'")
    if dtype not in DTYPES:
        raise PlanError(unknown("dtype", dtype, DTYPES))
    if type(rounds) is not int or not 1 <= rounds <= 10_000:
        raise PlanError(f"rounds must be an integer from 1 to 10,000, got {rounds!r}")
    check_budget(budget)
    plans, moving = _bounded(_orders(what, tokens, sizes, training, count), what)
    layer = plans[0].layer
    allowed = choices(
        variant_of(what) if isinstance(what, Plan) else Variant(),
        tokens=plans[0].values[layer.token_symbol] if layer.batched else None,
        device=device,
        dtype=dtype,
        training=training,
        layouts=layouts,
        flavours=flavours,
        chunks=chunks,
        memory=memory,
    )
    setting = _setting(device, dtype, training)
    question = {
        "format": FORMAT,
        "version": __version__,
        "setting": setting,
        "plans": [json.loads(p.to_json()) for p in plans],
        "choices": [list(allowed.layouts), list(allowed.flavours), list(allowed.chunks), list(allowed.memory)],
        "rounds": rounds,
        "budget": budget,
    }
    key = cache.key("tuned", question)
    result = None if fresh else _read(cache.get(key), plans)
    cached = result is not None
    if result is None:
        result = _measure(plans, allowed, Bench(plans[0], device, dtype, training), rounds, budget)
        cache.put(key, result.to_mapping())
    return Tuned(result.measured, winner(result.measured, result.decided), setting, cached, (*result.notes, *moving))


def _setting(device: str, dtype: str, training: bool) -> str:
    """What is measured, and where, in a few words."""
    import torch  # planning and costing do without

    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"
    return f"{'forward and backward' if training else 'forward'}, {dtype}, {where}, torch {torch.__version__}"


def _orders(
    what: Plan | Planable, tokens: int | None, sizes: dict[str, int] | None, training: bool, count: int
) -> list[Plan]:
    """The orders to measure as plans, the cheapest first; what differs in its program alone is different."""
    if not isinstance(what, Plan):
        tokens = DEFAULT_TOKENS if tokens is None else tokens
        return diverse(what, count=count, training=training, tokens=tokens, sizes=sizes)
    if tokens is not None and what.layer.batched:
        what = with_tokens(what, tokens)
    plans = diverse(
        what.layer,
        count=count,
        training=training,
        tokens=what.values[what.layer.token_symbol] if what.layer.batched else DEFAULT_TOKENS,
        sizes={**symbol_sizes(what), **(sizes or {})},
        input_gradients=what.input_gradients,
    )
    what = replace(what, values=plans[0].values)
    own = next((k for k, p in enumerate(plans) if p.bound.ops == what.store("auto").bound.ops), None)
    plans = [*plans, what] if own is None else [*plans[:own], what, *plans[own + 1 :]]
    return [lean for p in plans if (lean := _as_lean(p, what)) is not None]


def _bounded(plans: Sequence[Plan], own: object) -> tuple[list[Plan], list[str]]:
    """The orders that move at most `MOST_MOVED` times what the leanest does, and the given plan; what is left out."""

    def moved(planned: Plan) -> int:
        elements = total(
            t.read + t.written for t in (forward_traffic(op, planned.bound.sizes) for op in planned.bound.ops)
        )
        return int(elements)

    amounts = [moved(p) for p in plans]
    given = own.orders if isinstance(own, Plan) else None
    kept = [a <= MOST_MOVED * min(amounts) or p.orders == given for a, p in zip(amounts, plans, strict=True)]
    notes = [
        f"Left out: an order of {p.flops:,} FLOPs that moves {a / min(amounts):.0f} times as many elements as another."
        for a, p, k in zip(amounts, plans, kept, strict=True)
        if not k
    ]
    return [p for p, k in zip(plans, kept, strict=True) if k], list(dict.fromkeys(notes))


def _as_lean(planned: Plan, given: Plan) -> Plan | None:
    """An order with a backward pass that keeps at most as many bytes as the given plan's; None if it cannot."""
    if planned is given or given.function is None:
        return planned
    requires_grad = gradient_names(planned.bound, planned.input_gradients)
    try:
        function = plan_function(planned.bound, requires_grad, FLOAT32_BYTES * given.saved)
    except PlanError:
        return None
    return replace(planned, function=function)


def _read(entry: Mapping[str, Any] | None, plans: Sequence[Plan]) -> Result | None:
    """Times from the cache, if they are what `tune` wrote."""
    try:
        return Field(entry, "measured times", PlanError).maybe(lambda data: Result.read(data, plans))
    except PlanError:
        return None


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was timed, the number of the first round of the last stage, and what there is to say."""

    measured: tuple[Measured, ...]
    decided: int
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """The result as plain data, for the cache."""
        return {"measured": [m.to_mapping() for m in self.measured], "decided": self.decided, "notes": list(self.notes)}

    @classmethod
    def read(cls, data: Field, plans: Sequence[Plan]) -> Result:
        """What `to_mapping` wrote; `PlanError` if it is something else."""
        fields = data.keys("measured", "decided", "notes")
        measured = tuple(Measured.read(row, plans) for row in fields["measured"].items(of="candidates"))
        decided = fields["decided"].integer()
        if not measured or not all({decided, *m.rounds} <= {*measured[0].rounds} for m in measured):
            raise fields["decided"].fault("a round of the first candidate, which is in every round")
        return cls(measured, decided, fields["notes"].texts())


@dataclass(slots=True)
class _Candidate:
    order: int
    variant: Variant
    plan: Plan
    runner: Runner


@dataclass(slots=True)
class _Field:
    """All candidates that were entered so far; what emits the same is one."""

    plans: Sequence[Plan]
    bench: Bench
    entered: dict[Any, _Candidate] = field(default_factory=dict)
    left_out: dict[str, PlanError] = field(default_factory=dict)

    def enter(self, order: int, variants: Iterable[Variant]) -> list[Runner]:
        """The candidates of an order that can be made, those that were there before included."""
        runners: dict[int, Runner] = {}
        for variant in variants:
            try:
                plan = variant.of(self.plans[order])
            except PlanError as error:
                self.left_out.setdefault(str(error), error)
                continue
            key = order, tuple(p.indices for p in plan.program.parameters), plan.function
            if key not in self.entered:
                self.entered[key] = _Candidate(order, variant, plan, self.bench.runner(plan))
            runner = self.entered[key].runner
            runners[id(runner)] = runner
        return list(runners.values())

    def of(self, runner: Runner) -> _Candidate:
        """The candidate that a runner is of."""
        return next(c for c in self.entered.values() if c.runner is runner)


def _measure(plans: Sequence[Plan], allowed: Choices, bench: Bench, rounds: int, budget: float | None) -> Result:
    """The stages: orders, their variants, chunks, and the rounds that decide."""
    field_ = _Field(plans, bench)
    with bar("tuning") as progress:
        race = Race(budget, progress, 3 * STAGE + rounds)
        start = next((v for v in allowed.all() if field_.enter(0, [v])), None)
        if start is None:
            raise next(iter(field_.left_out.values()))

        def stage(runners: Iterable[Runner], share: float) -> list[Runner]:
            unique = list({id(r): r for r in runners}.values())
            return race.stage(unique, STAGE, keep=KEPT, share=share) if len(unique) > 1 else unique

        left = [r for k in range(len(plans)) for r in field_.enter(k, [start])]
        left = stage(left, SHARES[0])
        best = {field_.of(r).order: None for r in left}
        left = stage([*left, *(r for k in best for r in field_.enter(k, allowed.wide(start.chunk)))], SHARES[1])
        pairs = [(field_.of(r).order, field_.of(r).variant) for r in left]
        left = stage([*left, *(r for k, v in pairs for r in field_.enter(k, allowed.deep(v)))], SHARES[2])
        decided = race.round
        if len(left) > 1 or not decided:
            race.stage(left, rounds, keep=None, share=SHARES[3])
    measured = tuple(
        Measured(c.plan, c.order, c.variant, tuple(c.runner.seconds), tuple(c.runner.seconds.values()))
        for c in field_.entered.values()
        if c.runner.seconds
    )
    decides = race.round - decided
    notes = [f"The last {decides} round(s), of {len(left)}, decided." if decides else "No other one came close."]
    if race.over(1.0):
        notes.append(f"The budget of {budget:g} s ended it early: with more, further candidates may come out ahead.")
    notes += [f"Left out: {reason}" for reason in field_.left_out]
    return Result(measured, min(decided, race.round - 1), tuple(notes))
