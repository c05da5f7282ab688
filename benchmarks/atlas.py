"""Atlases against concrete planning: does the cheapest listed order cost the optimum at random sizes?

Run: `python benchmarks/atlas.py [--points 1000] [--seconds 2] [FAMILY …]` (needs `pip install "tnmoe[test]"`).

For each factorization with one and with two levels of experts, and for realistic and for open bounds: an atlas is made
(its candidates are timed alone; the cache is off), then sizes are drawn on a logarithmic scale within the bounds, and
the cost of the cheapest listed order is compared with that of the order which the exact planner finds there.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from functools import partial

from rich.console import Console
from rich.progress import track
from rich.table import Table

import tnmoe
from tnmoe.costing.objective import FLOPS
from tnmoe.measuring.timer import Timer
from tnmoe.planners import subset_dp
from tnmoe.planners.atlas.atlas import Atlas
from tnmoe.planners.atlas.dominance import Domain
from tnmoe.planners.atlas.symbolic_dp import MOST_WORK, Pricing, candidates
from tnmoe.planners.splits import Steps, splits_of

FAMILIES = {
    "dense": "bn,nio,bi->bo",
    "dense 2": "bn,bm,nmio,bi->bo",
    "cp": "bn,nr,bi,ir,or->bo",
    "cp 2": "bn,bm,nr,mr,bi,ir,or->bo",
    "tensor ring": "bn,anc,bi,cid,doa->bo",
    "tensor ring 2": "bn,bm,anc,cmd,bi,die,eoa->bo",
    "tensor train": "bn,na,bi,aic,co->bo",
    "tensor train 2": "bn,bm,na,amc,bi,cid,do->bo",
    "tucker": "bn,nx,bi,iy,oz,xyz->bo",
    "tucker 2": "bn,bm,nx,mw,bi,iy,oz,xwyz->bo",
    "hierarchical tucker": "bn,nx,bi,iy,oz,xyt,tz->bo",
    "hierarchical tucker 2": "bn,bm,nx,mw,xwv,bi,iy,oz,yzt,vt->bo",
}
REALISTIC = {"b": (1, 65536), "n": (8, 4096), "m": (8, 4096), "i": (256, 16384), "o": (256, 16384)}
NARROW = {"b": (256, 65536), "n": (16, 512), "m": (4, 64), "i": (512, 4096), "o": (512, 4096)}
NARROW |= {"x": (8, 64), "w": (4, 16), "v": (8, 64), "y": (64, 512), "z": (64, 512), "t": (16, 128)}
"""For ten tensors, where wider bounds leave more orders than the default work compares."""


def bounds_of(network: tnmoe.Network, kind: str) -> dict[str, tuple[int, int | None]]:
    """Bounds of every index: ranks from 8 to 2048, narrower ones, or everything from 2 up."""
    if kind == "narrow":
        return {i: NARROW[i] for i in network.indices}
    if kind == "realistic":
        return {i: REALISTIC.get(i, (8, 2048)) for i in network.indices}
    return dict.fromkeys(network.indices, (2, None))


def wrong(atlas: Atlas, points: int, rng: random.Random, label: str) -> int:
    """At how many of the points the cheapest listed order is not an optimum."""
    count = 0
    for _ in track(range(points), label, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()):
        sizes = {}
        for index, (low, high) in atlas.bounds.items():
            top = 5000 * low if high is None else high
            sizes[index] = min(top, max(low, round(low * (top / low) ** rng.random())))
        path = subset_dp.plan(atlas.network, sizes)
        best = Steps(atlas.network, sizes, FLOPS).total(splits_of(path, len(atlas.network.tensors)))
        count += atlas.best(sizes).cost.at(sizes) != best
    return count


def main() -> int:
    """Print a row for each family and kind of bounds; the exit status is 1 if any point is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="to decide what sampling leaves open")
    options = parser.parse_args()
    os.environ["TNMOE_CACHE"] = "off"
    table = Table("family", "tensors", "bounds", "candidates", "CPU s", "orders", "undecided", "points", "wrong")
    failed, timer = 0, Timer(time.process_time)
    for name in options.families or FAMILIES:
        network = tnmoe.Network.parse(FAMILIES[name])
        large = len(network.tensors) > 9
        most = 20 * MOST_WORK if large else MOST_WORK
        for kind in ("narrow",) if large else ("realistic", "open from 2"):
            bounds = bounds_of(network, kind)
            try:
                kept, spent = timer.once(partial(candidates, network, Domain(bounds), Pricing("flops"), most))
            except tnmoe.PlanError as refusal:
                print(f"{name}, {kind}: {refusal}", file=sys.stderr)
                continue
            atlas = tnmoe.atlas(network, bounds, seconds=options.seconds, most=most)
            bad = wrong(atlas, options.points, random.Random(name + kind), f"{name}, {kind}")
            failed += bad
            every = len(kept[2 ** len(network.tensors) - 1])
            row = (len(network.tensors), kind, every, f"{spent:.2f}", len(atlas.orders), len(atlas.undecided))
            table.add_row(name, *map(str, row), str(options.points), str(bad))
    Console(width=120).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
