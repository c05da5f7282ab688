"""The timer, by a clock that is made up: what lies between two looks, how often, and in what order."""

from __future__ import annotations

import random

import pytest
import torch

from tnmoe.measuring.timer import SHORTEST, Timer, of_device, passes_for, turns, wall_clock


class Machine:
    """Its clock stands still but for what runs: each pass takes 3 seconds, of which the device does 2 later."""

    def __init__(self) -> None:
        self.now, self.pending, self.seen = 0.0, 0.0, list[str]()

    def run(self) -> None:
        self.now += 1
        self.pending += 2
        self.seen.append("run")

    def wait(self) -> None:
        self.now += self.pending
        self.pending = 0
        self.seen.append("wait")


def test_the_work_of_the_device_counts() -> None:
    machine = Machine()
    timer = Timer(lambda: machine.now, machine.wait)
    assert timer.passes(machine.run, 4) == 3
    assert machine.seen == ["run"] * 4 + ["wait"]
    machine.seen.clear()
    assert timer.passes(machine.run, 2, apart=True) == 3
    assert machine.seen == ["run", "wait"] * 2


def test_what_only_warms_is_done_before_the_next_look() -> None:
    machine = Machine()
    timer = Timer(lambda: machine.now, machine.wait)
    timer.warm(machine.run)
    assert (machine.now, machine.pending) == (3, 0)


def test_one_pass_gives_its_result_and_its_seconds() -> None:
    machine = Machine()

    def run() -> str:
        machine.run()
        return "done"

    assert Timer(lambda: machine.now, machine.wait).once(run) == ("done", 3)
    assert Timer(lambda: 7.0).once(run) == ("done", SHORTEST)


def test_a_device_that_works_beside_the_caller_is_waited_for() -> None:
    clock = iter([2.0, 5.0]).__next__
    assert of_device("cpu", clock) == Timer(clock, None)
    assert of_device("cuda") == Timer(wall_clock, torch.cuda.synchronize)


def test_without_a_device_nobody_waits() -> None:
    machine = Machine()
    assert Timer(lambda: machine.now).passes(machine.run, 5) == 1
    assert Timer(lambda: 7.0).passes(lambda: None) == SHORTEST  # a clock too coarse to tell


@pytest.mark.parametrize(
    ("once", "least", "most", "count"),
    [(2.0, 1.0, None, 1), (0.25, 1.0, None, 4), (0.3, 1.0, None, 3), (1e-3, 1.0, 200, 200)],
)
def test_short_passes_are_taken_together(once: float, least: float, most: int | None, count: int) -> None:
    assert passes_for(once, least, most) == count


def test_rounds_take_turns() -> None:
    """Each once a round; over many rounds every order of three is met."""
    order = list(turns("abc", 60, random.Random(0)))
    assert [number for number, _ in order] == sorted([*range(60)] * 3)
    each = ["".join(run for number, run in order if number == k) for k in range(60)]
    assert {"".join(sorted(r)) for r in each} == {"abc"}
    assert len(set(each)) == 6
