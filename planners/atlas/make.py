"""The plan atlas: which contraction orders matter when sizes are unknown within bounds, with a proof.

1. `symbolic_dp` leaves the candidates: no order outside them is ever cheaper than all of them.
2. `witness` finds integer sizes at which a candidate strictly wins: it is in.
3. `multipliers` proves of others that they never win: they are out.
4. What remains is undecided and stays in the list; the list is then a superset of what is needed, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from tnmoe.costing.objective import as_forward
from tnmoe.errors import PlanError
from tnmoe.ir.network import Network
from tnmoe.planners.atlas.atlas import Atlas
from tnmoe.planners.atlas.cache import AtlasRequest
from tnmoe.planners.atlas.dominance import Bounds, Domain
from tnmoe.planners.atlas.json_form import check_calls, constants
from tnmoe.planners.atlas.multipliers import INSTALLED, Multipliers, prove_out
from tnmoe.planners.atlas.order import Excluded, make_order
from tnmoe.planners.atlas.polynomial import Polynomial
from tnmoe.planners.atlas.symbolic_dp import MOST_WORK, Pricing, candidates, path_of
from tnmoe.planners.atlas.witness import Sizes, WitnessSearch

_ROUNDS = 60
_NEAR = 16
_WORTH_KEEPING = 1.0
"""Seconds; reading an atlas back takes a part of that."""


def atlas(
    network: Network,
    bounds: Mapping[str, tuple[int, int | None] | int],
    objective: str = "flops",
    *,
    frozen: Iterable[str] = (),
    calls: int = 1,
    seconds: float = 10.0,
    close: bool = False,
    most: int = MOST_WORK,
) -> Atlas:
    """Every contraction order that is the cheapest at some sizes within the bounds.

    Args:
        network: up to 11 tensors; hyperedges, batch indices and a folded bias included.
        bounds: (lowest, highest) of every index, highest None if it is open; or one integer. Lower bounds of 2
            instead of 1 leave several times fewer candidates.
        objective: "flops" or "macs", forward.
        frozen: names of data tensors that stay the same between calls, besides the weights.
        calls: steps that involve such tensors alone are done once in so many calls (inference with folding).
        seconds: roughly how long to try to decide the candidates that sampling leaves open.
        close: raise if some remain undecided.
        most: comparisons of corner numbers that finding the candidates may take, by default about half a minute.

    What took more than a second is kept in the cache (`tnmoe.io.cache`).

    Raises:
        PlanError: too many tensors, too many orders that matter within the bounds (more than `most` comparisons),
            faulty bounds, or `close` and some orders are undecided.
        DeclarationError: `frozen` names no tensor.
    """
    price = as_forward(objective)
    domain = Domain(_complete(network, bounds), check_calls(calls))
    pricing = Pricing(price, calls, constants(network, frozenset(frozen)))
    request = AtlasRequest(network, domain, pricing, seconds, most)
    made = request.kept()
    if made is None:
        start = time.monotonic()
        made = _made(network, domain, pricing, seconds, most)
        if time.monotonic() - start > _WORTH_KEEPING:
            request.keep(made)
    if close and not made.closed:
        remedy = "allow more seconds" if INSTALLED else "pip install 'tnmoe[atlas]' (proofs need scipy)"
        raise PlanError(f"{made.gap}; {remedy}, or narrow the bounds")
    return made


def _made(network: Network, domain: Domain, pricing: Pricing, seconds: float, most: int) -> Atlas:
    kept = candidates(network, domain, pricing, most)
    n = len(network.tensors)
    full = (1 << n) - 1
    costs = [k.cost for k in kept[full]]
    witnesses, proofs = _decide(costs, domain, seconds)
    listed = sorted(set(range(len(costs))) - set(proofs), key=lambda k: (k not in witnesses, k))
    place = {k: new for new, k in enumerate(listed)}
    orders = tuple(make_order(network, path_of(kept, full, k, n), costs[k], witnesses.get(k)) for k in listed)
    excluded = tuple(
        Excluded(costs[k], Multipliers(p.degree, tuple((place[s], t, w) for s, t, w in p.weights)))
        for k, p in proofs.items()
    )
    certificate = {s: tuple(k.cost for k in undominated) for s, undominated in kept.items() if n == 1 or s & (s - 1)}
    return Atlas(
        network, domain.bounds, pricing.objective, pricing.calls, pricing.constant, orders, excluded, certificate
    )


def _complete(network: Network, bounds: object) -> Bounds:
    if not isinstance(bounds, Mapping):
        raise PlanError(f'bounds must be a mapping such as {{"b": (1, 65536)}}, got {bounds!r}')
    for index in bounds:
        if index not in network.indices:
            raise PlanError(f"bounds name {index!r}, which is no index of {network.expression!r}")
    missing = [i for i in network.indices if i not in bounds]
    if missing:
        raise PlanError(f"index {missing[0]!r} has no bounds; give (lowest, highest), highest None if it is open")
    return {i: bounds[i] for i in network.indices}


def _decide(costs: list[Polynomial], domain: Domain, seconds: float) -> tuple[dict[int, Sizes], dict[int, Multipliers]]:
    """Witnesses and proofs by place; a place in neither is undecided."""
    if len(costs) == 1:
        return {0: {i: low for i, (low, _) in domain.bounds.items()}}, {}
    middle, end = time.monotonic() + seconds / 2, time.monotonic() + seconds
    search = WitnessSearch(costs, domain)
    witnesses = search.sample(range(len(costs)), _ROUNDS)
    proofs: dict[int, Multipliers] = {}
    needed: set[int] = set()  # orders that a proof refers to stay in the list
    for stage, efforts in enumerate(((30, 60, 120, 240), (120,))):
        # What is proven out competes no more, so that of two orders which always tie one can still win.
        rivals = [k for k in range(len(costs)) if k not in proofs]
        for effort in efforts:
            climbing = WitnessSearch([costs[k] for k in rivals], domain, seed=1000 * stage + effort)
            for own, place in enumerate(rivals):
                if place not in witnesses and time.monotonic() < (end if stage else middle):
                    sizes = climbing.climb(own, effort)
                    if sizes is not None:
                        witnesses[place] = sizes
        for own, place in enumerate(rivals):
            if place in witnesses or place in needed or time.monotonic() > end:
                continue
            near = [rivals[k] for k in climbing.nearest(own, _NEAR) if rivals[k] not in proofs]
            proof = prove_out(costs[place], costs, near, domain, end) if near else None
            if proof is not None:
                proofs[place] = proof
                needed |= {s for s, _, _ in proof.weights}
    return witnesses, proofs
