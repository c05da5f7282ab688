"""What an atlas holds and the questions it answers: the best order at given sizes, thresholds, diagrams, regret."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import sympy

from tnmoe.costing.objective import ForwardPrice, as_forward
from tnmoe.errors import PlanError
from tnmoe.io.json_fields import Field, read_json
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath, read_steps
from tnmoe.planners.atlas.conditions import condition, rounded_up
from tnmoe.planners.atlas.diagram import Diagram, Segment, lower_envelope
from tnmoe.planners.atlas.dominance import Bounds, Domain
from tnmoe.planners.atlas.json_form import (
    FORMAT,
    plain_network,
    plain_proof,
    read_bounds,
    read_kept,
    read_polynomial,
    read_proof,
    read_sizes,
)
from tnmoe.planners.atlas.order import Excluded, Order, tree_text
from tnmoe.planners.atlas.polynomial import Polynomial
from tnmoe.planners.atlas.regret import Regret, worst
from tnmoe.planners.atlas.symbolic_dp import Pricing, path_cost
from tnmoe.planners.atlas.witness import wins


class Region(NamedTuple):
    """Where an order is cheaper than the one it is compared with."""

    order: Order
    condition: str


@dataclass(frozen=True)
class Atlas:
    """Every contraction order that is the cheapest somewhere within bounds of the sizes, with a proof.

    Attributes:
        network, bounds, objective: what was asked.
        calls: how many calls share one evaluation of the steps that no data reaches.
        constant: names of the tensors that stay the same between calls.
        orders: those with a witness first. At any sizes within the bounds one of them is a cheapest order.
        excluded: candidates proven never to win.
        kept: the certificate: for every subset of the tensors (a bit mask) the costs that may be optimal.
    """

    network: Network
    bounds: Bounds
    objective: ForwardPrice
    calls: int
    constant: frozenset[str]
    orders: tuple[Order, ...]
    excluded: tuple[Excluded, ...] = field(repr=False)
    kept: Mapping[int, tuple[Polynomial, ...]] = field(repr=False)

    @property
    def undecided(self) -> tuple[Order, ...]:
        """Orders that are neither witnessed nor proven never to win."""
        return tuple(o for o in self.orders if o.witness is None)

    @property
    def closed(self) -> bool:
        """True if every listed order wins somewhere: the list is exactly the orders that matter."""
        return not self.undecided

    @property
    def gap(self) -> str:
        """What is not known, in a sentence; empty if nothing."""
        if self.closed:
            return ""
        return (
            f"{len(self.undecided)} of {len(self.orders)} orders are undecided: the list holds every optimum, but "
            f"these may never be needed"
        )

    # ---- questions -------------------------------------------------------------------------------------------

    def best(self, sizes: Mapping[str, int]) -> Order:
        """The cheapest order at sizes within the bounds; of equals, the first.

        Raises:
            PlanError: if a size is missing, unknown or out of bounds.
        """
        self._require(sizes)
        return min(self.orders, key=lambda order: order.cost.at(sizes))

    def cost_of(self, path: ContractionPath) -> Polynomial:
        """The cost of any order of the network."""
        return path_cost(self.network, path, self._pricing)

    def threshold(self, first: Order, second: Order, index: str) -> sympy.Expr:
        """The size of `index` at which two orders cost the same, as an exact formula in the other sizes.

        Raises:
            PlanError: if `index` is unknown or does not decide between them.
        """
        self._require_index(index)
        a, b = first.cost.minus_common(second.cost)
        (p, q), (r, s) = a.affine(index), b.affine(index)
        if q == s:
            raise PlanError(f"the size of {index!r} does not decide between {first.tree} and {second.tree}")
        return sympy.factor(sympy.cancel((r.to_sympy() - p.to_sympy()) / (q.to_sympy() - s.to_sympy())))

    def along(self, index: str, at: Mapping[str, int]) -> Diagram:
        """The cheapest order for every size of `index` within its bounds, the other sizes being `at`; exact.

        Raises:
            PlanError: if a size is missing, unknown or out of bounds.
        """
        self._require_index(index)
        low, high = self.bounds[index]
        sizes = {**at, index: low}
        self._require(sizes)
        lines = []
        for order in self.orders:
            offset, slope = order.cost.affine(index)
            lines.append((offset.at(sizes), slope.at(sizes)))
        pieces = lower_envelope(lines, low, high)
        return Diagram(index, tuple(Segment(a, b, k, self.orders[k].tree) for a, b, k in pieces))

    def regret(self, path: ContractionPath | Order, bounds: Bounds | None = None) -> Regret:
        """The worst factor lost by keeping one order at all sizes within `bounds` (by default the atlas's own).

        Exact: f · (cheapest) - (kept) is non-negative on a box if and only if it is in every corner.

        Raises:
            PlanError: if `bounds` leave those of the atlas, or the path does not fit.
        """
        domain = Domain({**self.bounds, **(bounds or {})}, self.calls)
        self._require_within(domain.bounds)
        own = path.cost if isinstance(path, Order) else self.cost_of(path)
        return worst(domain.corners(own, domain.free), self._least(domain), domain)

    def steadiest(self) -> Order:
        """The order whose worst factor within the bounds is the smallest."""
        domain = Domain(self.bounds, self.calls)
        least = self._least(domain)
        return min(self.orders, key=lambda o: worst(domain.corners(o.cost, domain.free), least, domain).factor)

    def _least(self, domain: Domain) -> list[int]:
        """The smallest of each corner number."""
        return [min(c) for c in zip(*(domain.corners(o.cost, domain.free) for o in self.orders), strict=True)]

    def regions(self, than: Order | None = None, index: str | None = None) -> tuple[Region, ...]:
        """When each other order is cheaper than one of them, as an exact condition.

        Args:
            than: the order to compare with, by default the steadiest.
            index: the size to solve for, by default the first index of the output (the tokens of a layer).
        """
        base = self.steadiest() if than is None else than
        solved = (self.network.output or self.network.indices or ("",))[0] if index is None else index
        others = (o for o in self.orders if o is not base)
        return tuple(Region(o, condition(o.cost, base.cost, solved)) for o in others)

    def __str__(self) -> str:
        shown = ", ".join(
            f"{i} = {low}" if low == high else f"{i} from {low:,}" + ("" if high is None else f" to {high:,}")
            for i, (low, high) in self.bounds.items()
        )
        count = len(self.orders)
        lines = [f"Atlas of {self.network.expression}, objective {self.objective}; {shown}."]
        if self.calls > 1:
            lines.append(f"Steps on {', '.join(sorted(self.constant))} alone are done once in {self.calls:,} calls.")
        if count == 1:
            return "\n".join([*lines, f"One order wins everywhere: {self.orders[0].tree}, cost {self.orders[0].cost}."])
        proven = "each of them somewhere" if self.closed else self.gap
        lines.append(f"{count} orders hold every optimum; {proven}.")
        base = self.steadiest()
        factor, _ = self.regret(base)
        loss = "without bound" if factor == math.inf else f"at most {rounded_up(factor)}×"
        lines += [f"Unless said otherwise: {base.tree}, cost {base.cost}; kept everywhere, it loses {loss}."]
        lines += [f"  {r.order.tree} is cheaper than that if {r.condition}" for r in self.regions(base)[:20]]
        return "\n".join(lines + ([f"  … and {count - 21} more in regions()"] if count > 21 else []))

    # ---- JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The atlas with its certificate; `atlas_verifier.py` checks it."""
        places = [{"cost": e.cost.to_list(), **plain_proof(e.proof)} for e in self.excluded]
        data = {
            "format": FORMAT,
            "network": plain_network(self.network),
            "bounds": {i: list(b) for i, b in self.bounds.items()},
            "objective": self.objective,
            "calls": self.calls,
            "constant": sorted(self.constant),
            "closed": self.closed,
            "orders": [
                {
                    "steps": [list(s) for s in o.path.steps],
                    "tree": o.tree,
                    "cost": o.cost.to_list(),
                    "witness": None if o.witness is None else dict(o.witness),
                }
                for o in self.orders
            ],
            "certificate": {
                "kept": {str(subset): [p.to_list() for p in costs] for subset, costs in self.kept.items()},
                "out": places,
            },
        }
        return json.dumps(data, ensure_ascii=False)  # not indented: the certificate may hold thousands of polynomials

    @classmethod
    def from_json(cls, text: str) -> Atlas:
        """The atlas that `to_json` wrote. Costs and witnesses are checked again; for the whole proof run the verifier.

        Raises:
            PlanError: if it is no such text, or a cost or a witness is wrong.
            DeclarationError: if its network is faulty.
        """
        return cls.read(read_json(text, "an atlas", FORMAT, PlanError))

    @classmethod
    def read(cls, data: Field) -> Atlas:
        """The atlas in parsed JSON; errors as in `from_json`."""
        fields = data.keys(
            "network", "bounds", "objective", "calls", "constant", "orders", "certificate", optional=("closed",)
        )
        network = Network.from_mapping(fields["network"].value)
        bounds = Domain({i: read_bounds(b) for i, b in fields["bounds"].entries().items()}).bounds
        if set(bounds) != set(network.indices):
            raise PlanError("the bounds of the atlas are not those of its network's indices")
        constant = frozenset(fields["constant"].texts(t.name for t in network.tensors))
        pricing = Pricing(as_forward(fields["objective"].text()), fields["calls"].integer(1), constant)
        rows = [row.keys("steps", "cost", "witness", optional=("tree",)) for row in fields["orders"].items(of="orders")]
        costs = [read_polynomial(row["cost"]) for row in rows]
        orders = []
        for k, row in enumerate(rows):
            path = ContractionPath(read_steps(row["steps"]), "atlas")
            if path_cost(network, path, pricing) != costs[k]:
                raise PlanError(f"order {k} of the atlas does not cost {costs[k]}; the file was changed")
            witness = row["witness"].maybe(read_sizes)
            if witness is not None:
                if Domain(bounds).outside(witness) is not None or not wins(k, costs, witness):
                    raise PlanError(f"order {k} of the atlas does not win at its witness; the file was changed")
            orders.append(Order(path, tree_text(network, path), costs[k], witness))
        if not orders:
            raise PlanError("the atlas lists no order")
        certificate = fields["certificate"].keys("kept", "out")
        proofs = [proof.keys("cost", "degree", "weights") for proof in certificate["out"].items(of="proofs")]
        excluded = tuple(Excluded(read_polynomial(p["cost"]), read_proof(p["degree"], p["weights"])) for p in proofs)
        kept = read_kept(certificate["kept"])
        return cls(network, bounds, pricing.objective, pricing.calls, pricing.constant, tuple(orders), excluded, kept)

    # ---- checks ----------------------------------------------------------------------------------------------

    @property
    def _pricing(self) -> Pricing:
        return Pricing(self.objective, self.calls, self.constant)

    def _require(self, sizes: Mapping[str, int]) -> None:
        for index, size in sizes.items():
            self._require_index(index)
            if type(size) is not int:
                raise PlanError(f"the size of {index!r} must be an integer, got {size!r}")
        fault = Domain(self.bounds).outside(sizes)
        if fault is not None:
            raise PlanError(
                f"{fault}; the atlas says nothing there: make one with wider bounds, or plan at these sizes"
            )

    def _require_index(self, index: str) -> None:
        if index not in self.bounds:
            raise PlanError(f"the network has no index {index!r}; its indices are {', '.join(self.bounds)}")

    def _require_within(self, bounds: Bounds) -> None:
        for index, (low, high) in bounds.items():
            self._require_index(index)
            own_low, own_high = self.bounds[index]
            if low < own_low or (own_high is not None and (high is None or high > own_high)):
                raise PlanError(
                    f"the bounds {(low, high)} of {index!r} leave those of the atlas, {(own_low, own_high)}; "
                    f"make an atlas with wider bounds"
                )
