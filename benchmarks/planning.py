"""Time exact planning side by side with opt_einsum and cotengra, and count how often their paths cost more.

Run: `python benchmarks/planning.py [--rounds 15] [--networks 10] [--judged 100]` (needs `pip install "tnmoe[test]"`).

Every planner gets its own input objects, made beforehand, so only the search is timed: no parsing, no lowering. All
run in one process, interleaved in a new random order each round, so that a busy machine slows them alike. A figure is
the median over rounds of one network, and of those the median over networks. The random networks are connected, with
hyperedges, batch indices and indices that are summed alone; the μMoE networks are those of declared layers for 1,024
tokens, bias included (the peers, which know no folded bias, plan them without it).

Paths are judged by the MACs of the program they lower to. All planners minimise products per step, but "cotengra
optimal, outer" (`search_outer=True, simplify=False`) does not sum an index that one tensor alone has beforehand, and
so misprices it; "without private indices" repeats the judgement on the same networks with those indices removed.
`optimal` of opt_einsum is left out above seven tensors, where it takes seconds. cotengra uses its Rust core if
cotengrust is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import cotengra
import opt_einsum
from rich.console import Console
from rich.table import Table

import tnmoe
from tnmoe.costing.objective import MACS
from tnmoe.costing.op_cost import op_cost
from tnmoe.ir.layer import Contraction
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Value
from tnmoe.lowering.lower import lower_network
from tnmoe.measuring.timer import Timer, turns
from tnmoe.planners import subset_dp
from tnmoe.planners.pairs import pairwise

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.networks import random_network

TOKENS = 1024
OURS = "tnmoe subset_dp"
LARGEST_FOR_OPTIMAL = 7

Search = Callable[[], Iterable[tuple[int, ...]]]


@dataclass(frozen=True)
class Problem:
    """A network to plan, with an integer for each of its indices."""

    group: str
    network: Network
    sizes: Mapping[str, int]

    def searches(self) -> dict[str, tuple[Search, bool]]:
        """For each planner by name: a call that searches, and whether it returns an SSA path (or a linear one)."""
        network = self.network
        letter = {i: opt_einsum.get_symbol(k) for k, i in enumerate(network.indices)}  # as cotengra's Rust core demands
        terms = [tuple(letter[i] for i in t.indices) for t in network.tensors]
        kept = tuple(letter[i] for i in network.output)
        sizes = {letter[i]: n for i, n in self.sizes.items()}
        sets, output = [frozenset(t) for t in terms], frozenset(kept)
        exact = opt_einsum.DynamicProgramming(minimize="flops", search_outer=True)
        quick = cotengra.OptimalOptimizer(minimize="flops")
        outer = cotengra.OptimalOptimizer(minimize="flops", search_outer=True, simplify=False)
        searches: dict[str, tuple[Search, bool]] = {
            OURS: (lambda: subset_dp.plan(network, self.sizes, MACS).steps, True),
            "opt_einsum DP, outer": (lambda: exact(sets, output, sizes), False),
        }
        if len(terms) <= LARGEST_FOR_OPTIMAL:
            searches["opt_einsum optimal"] = (lambda: opt_einsum.paths.optimal(sets, output, sizes), False)
        searches["cotengra optimal"] = (lambda: quick.ssa_path(terms, kept, sizes), True)
        searches["cotengra optimal, outer"] = (lambda: outer.ssa_path(terms, kept, sizes), True)
        return searches

    def macs(self, path: Iterable[tuple[int, ...]], ssa: bool) -> int:
        """MACs of the program that a path lowers to."""
        count = len(self.network.tensors)
        steps = pairwise(path if ssa else opt_einsum.paths.linear_to_ssa(path), count)
        node = Contraction(Value("result", self.network.output), self.network)
        return sum(int(op_cost(op, self.sizes).macs) for op in lower_network(node, ContractionPath(steps)))


def random_problems(tensors: int, count: int) -> list[Problem]:
    """Random connected networks; the seed is the position."""
    made = (random_network(random.Random(f"planning {tensors} {k}"), tensors, connected=True) for k in range(count))
    return [Problem(f"random, {tensors} tensors", network, sizes) for network, sizes in made]


def without_private(problem: Problem) -> Problem:
    """The same network, less the indices that one tensor alone has and the output has not."""
    network = problem.network
    holders = Counter(i for t in network.tensors for i in t.indices)
    lost = {i for i, count in holders.items() if count == 1 and i not in network.output}
    tensors = tuple(replace(t, indices=tuple(i for i in t.indices if i not in lost)) for t in network.tensors)
    sizes = {i: n for i, n in problem.sizes.items() if i not in lost}
    return Problem(f"{problem.group}, without private indices", Network(tensors, network.output), sizes)


def layer_problems() -> list[Problem]:
    """The mixture of a 768 → 3072 μMoE with one, two and three levels of experts."""
    problems = []
    for experts, word in (((256,), "one level"), ((64, 8), "two levels"), ((16, 8, 4), "three levels")):
        ring = tnmoe.TensorRing((4,) * (len(experts) + 1) + (149,))
        for name, factorization in (("CP", tnmoe.CP(556)), ("TR", ring)):
            layer = tnmoe.MuMoE(768, 3072, experts, factorization).layer()
            sizes = layer.bound_sizes({layer.token_symbol: TOKENS})
            network = layer.contractions[-1].network
            label = f"{name} μMoE, {word}, {len(network.tensors)} tensors"
            problems.append(Problem(label, network, {i: sizes[i] for i in network.indices}))
    return problems


def measure(problems: list[Problem], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by group and planner."""
    jobs = [(k, name, search) for k, p in enumerate(problems) for name, (search, _) in p.searches().items()]
    for _, _, search in jobs:
        search()  # imports and caches are filled before the clock runs
    times: dict[tuple[int, str], list[float]] = {(k, name): [] for k, name, _ in jobs}
    timer = Timer()
    for _, (k, name, search) in turns(jobs, rounds, random.Random(0)):
        times[k, name].append(1e3 * timer.passes(search))
    medians: dict[str, dict[str, list[float]]] = {}
    for (k, name), millis in times.items():
        medians.setdefault(problems[k].group, {}).setdefault(name, []).append(statistics.median(millis))
    return {group: {name: statistics.median(m) for name, m in row.items()} for group, row in medians.items()}


def judge(problems: list[Problem]) -> dict[str, dict[str, tuple[int, int, int, float]]]:
    """By group and planner: paths that cost more than ours, less than ours, all, and the worst ratio."""
    verdict: dict[str, dict[str, tuple[int, int, int, float]]] = {}
    for problem in problems:
        costs = {name: problem.macs(search(), ssa) for name, (search, ssa) in problem.searches().items()}
        row = verdict.setdefault(problem.group, {})
        for name, macs in costs.items():
            more, less, total, worst = row.get(name, (0, 0, 0, 1.0))
            ours = costs[OURS]
            ratio = macs / ours if ours else 1.0
            row[name] = more + (macs > ours), less + (macs < ours), total + 1, max(worst, ratio)
    return verdict


def show(console: Console, title: str, names: list[str], rows: Mapping[str, Mapping[str, str]]) -> None:
    """A table with one row a group and one column a planner."""
    table = Table(title=title, title_justify="left")
    table.add_column("network")
    for name in names:
        table.add_column(name, justify="right")
    for group, row in rows.items():
        table.add_row(group, *(row.get(name, "–") for name in names))
    console.print(table)


def main() -> None:
    """Measure, judge and print."""
    parser = argparse.ArgumentParser(description="Time exact planners side by side.")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each planner on each network")
    parser.add_argument("--networks", type=int, default=10, help="random networks of each size that are timed")
    parser.add_argument("--judged", type=int, default=100, help="random networks of each size whose paths are judged")
    args = parser.parse_args()
    console = Console(width=160)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, tnmoe {tnmoe.__version__}, "
        f"opt_einsum {opt_einsum.__version__}, cotengra {cotengra.__version__} "
        f"({'with' if find_spec('cotengrust') else 'without'} its Rust core)"
    )
    layers = layer_problems()
    names = list(layers[0].searches())
    timed = [p for n in (5, 7, 9) for p in random_problems(n, args.networks)] + layers
    medians = measure(timed, args.rounds)
    title = f"Planning time, ms, median of {args.rounds} rounds (random: of {args.networks} networks)"
    show(console, title, names, {g: {name: f"{ms:.2f}" for name, ms in row.items()} for g, row in medians.items()})
    judged = [p for n in (5, 7, 9) for p in random_problems(n, args.judged)]
    verdict = judge(judged + [without_private(p) for p in judged] + layers)
    cells = {
        group: {
            name: f"{more} of {total}" + (f", worst {worst:.4g}×" if more else "") + (f", {less} below" if less else "")
            for name, (more, less, total, worst) in row.items()
            if name != OURS
        }
        for group, row in verdict.items()
    }
    show(console, "Paths with more MACs than ours", names[1:], cells)


if __name__ == "__main__":
    main()
