"""Gradients under DistributedDataParallel equal those without; run as a script, in a process of its own.

A DDP module lies in a reference cycle, and its process group's threads want the interpreter's lock when the garbage
collector destroys it, which then waits for them: a deadlock at some later allocation (pytorch#56297). So this process
collects nothing and ends without destructors.
"""

import copy
import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import tnmoe
from support import oracle
from support.modules import SPECS, draw


def main(names: list[str]) -> None:
    """One process suffices to see every parameter take part and every buffer broadcast."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name in names:
        for way in ({}, {"memory": "recompute", "flavour": "fast", "chunk": 5}):
            agree(name, oracle.randomise(tnmoe.build(tnmoe.plan(SPECS[name], tokens=16, **way)), 0).train())
        print(name, "agrees", flush=True)


def agree(name: str, module: nn.Module) -> None:
    """Two steps give the same gradients with and without DistributedDataParallel."""
    plain = copy.deepcopy(module)
    parallel = nn.parallel.DistributedDataParallel(module)
    for step in range(2):
        x = draw(7, 6, seed=step)
        for m in (parallel, plain):
            m.zero_grad()
            m(x).square().sum().backward()
        for (key, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=f"{name}: {key}")


if __name__ == "__main__":
    gc.disable()
    main(sys.argv[1:])
    os._exit(0)
