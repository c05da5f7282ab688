"""Train a CP μMoE, a tensor-ring μMoE and an MLP of equal size on scikit-learn's digits, from emitted files alone.

Run: `python benchmarks/digits.py` (needs `pip install "tnmoe[demo]"`). The files are written first; training then
imports those files and torch, never tnmoe. Prints test accuracy, parameters and FLOPs for one image.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import tnmoe
from tnmoe.measuring.timer import Timer

EPOCHS = 40
BATCH = 64
SEEDS = (0, 1, 2)


def declarations() -> dict[str, tnmoe.MuMoEBlock | tnmoe.MLP]:
    """Two-layer classifiers 64 → hidden → 10 with close to 13,500 parameters each."""
    gate = tnmoe.Gate("entmax15", "layer")
    return {
        "CP": tnmoe.MuMoEBlock(64, 64, 10, 16, tnmoe.CP(52), gate),
        "TensorRing": tnmoe.MuMoEBlock(64, 64, 10, 16, tnmoe.TensorRing((2, 2, 30)), gate),
        "MLP": tnmoe.MLP(64, 180, 10),
    }


def import_file(path: Path, name: str) -> type[nn.Module]:
    """The class `name` of an emitted file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    emitted: type[nn.Module] = getattr(module, name)
    return emitted


def train(model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Test accuracy after a few epochs of AdamW."""
    inputs, test_inputs, labels, test_labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(test_inputs).argmax(-1) == test_labels).float().mean())


def trained(made: type[nn.Module], data: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[float]:
    """Test accuracy by seed."""
    reached = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        reached.append(train(made(), data))
    return reached


def main() -> int:
    """Print the table; the exit code is 1 if a model stays below 95 %."""
    timer = Timer()
    start = timer.clock()
    torch.set_num_threads(1)  # the models are too small to share out
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    data = tuple(torch.tensor(p, dtype=torch.float32 if k < 2 else torch.long) for k, p in enumerate(parts))
    print(f"digits: {len(data[0])} training and {len(data[1])} test images, {EPOCHS} epochs, seeds {SEEDS}")
    print(f"{'model':<12}{'test accuracy':>24}{'parameters':>12}{'FLOPs an image':>16}{'seconds':>9}")
    accuracies = []
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in declarations().items():
            plan = tnmoe.plan(spec, tokens=1)
            report = tnmoe.cost(plan)
            path = tnmoe.save(tnmoe.emit(plan, name=name), Path(folder) / f"{name.lower()}_digits.py")
            made = import_file(path, name)
            reached, took = timer.once(partial(trained, made, data))
            accuracies += reached
            shown = " ".join(f"{100 * a:.1f} %" for a in reached)
            print(f"{name:<12}{shown:>24}{report.parameters:>12,}{report.flops:>16,}{took:>9.1f}")
    print(f"total {timer.clock() - start:.0f} s, lowest accuracy {100 * min(accuracies):.1f} %")
    return 0 if min(accuracies) > 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
