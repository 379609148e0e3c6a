"""What one step of each optimizer costs, as a ratio to one SGD step of the same network in the same run.

One thread and CPU time. The network is 784-1000-1000-1000-10 (ReLU, no biases), batch 100, float32; CW-NGD's
step is that of one Linear 128→64 at batch 1024. Run: `OMP_NUM_THREADS=1 python benchmarks/optim.py [name ...]`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from fisherviz import optim

GOALS = {
    "kfac T=1": 5.5,
    "kfac T=100": 3.0,
    "kfac T=100 eigenvalues": None,
    "foof T=1": 4.0,
    "foof T=100": 1.7,
    "subsampled T=1": 2.6,
    "subsampled T=100": 2.0,
    "adaptive kfac": None,
    "plain kfac T=20": None,
    "ekfac T=100": None,
    "tengrad": None,
}


def network() -> nn.Sequential:
    """Benzing's network."""
    torch.manual_seed(0)
    widths = (784, 1000, 1000, 1000, 10)
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a row."""
    plain = {"rescale": False, "adapt": False, "lr": 1e-3, "damping": 1.0}
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-3),
        "kfac T=1": lambda: optim.KFAC(model, "categorical", T=1, **plain),
        "kfac T=100": lambda: optim.KFAC(model, "categorical", T=100, **plain),
        "kfac T=100 eigenvalues": lambda: optim.KFAC(model, "categorical", T=100, heuristic_damping=False, **plain),
        "plain kfac T=20": lambda: optim.KFAC(model, "categorical", T=20, **plain),
        "foof T=1": lambda: optim.FOOF(model, "categorical", lr=1e-3, T=1),
        "foof T=100": lambda: optim.FOOF(model, "categorical", lr=1e-3, T=100),
        "subsampled T=1": lambda: optim.SubsampledNaturalGradient(model, "categorical", lr=1e-5, damping=1e-2, T=1),
        "subsampled T=100": lambda: optim.SubsampledNaturalGradient(model, "categorical", lr=1e-5, damping=1e-2, T=100),
        "adaptive kfac": lambda: optim.KFAC(model, "categorical"),
        "ekfac T=100": lambda: optim.EKFAC(model, "categorical", lr=1e-4, T=100),
        "tengrad": lambda: optim.TENGraD(model, "categorical", lr=1e-4),
    }
    return made[name]()


class Trainer:
    """One network with its optimizer on fixed batches."""

    def __init__(self, name: str) -> None:
        self.model = network()
        self.opt = make(name, self.model)
        generator = torch.Generator().manual_seed(1)
        self.data = [
            (torch.randn(100, 784, generator=generator), torch.randint(10, (100,), generator=generator))
            for _ in range(4)
        ]
        self.k = 0
        self.closure = name == "adaptive kfac"

    def step(self) -> None:
        """One training step."""
        x, y = self.data[self.k % len(self.data)]
        self.k += 1

        def closure() -> torch.Tensor:
            self.opt.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            return loss

        if self.closure:
            self.opt.step(closure)
        else:
            closure()
            self.opt.step()


def seconds(trainer: Trainer, steps: int) -> list[float]:
    """CPU seconds of single steps."""
    out = []
    for _ in range(steps):
        start = time.process_time()
        trainer.step()
        out.append(time.process_time() - start)
    return out


def ratios(names: list[str], rounds: int = 5) -> dict[str, float]:
    """Median over rounds of (mean step)/(mean SGD step), interleaved with SGD."""
    sgd = Trainer("sgd")
    seconds(sgd, 5)
    found: dict[str, float] = {}
    for name in names:
        trainer = Trainer(name)
        # a cycle holds one factorisation for every T steps, so that an amortised cost is the whole cost
        period = {"T=100": 100, "adaptive kfac": 20, "plain kfac T=20": 20}
        cycle = next((steps for key, steps in period.items() if key in name), 1)
        seconds(trainer, 3)
        values = []
        if cycle > 1:
            while trainer.k % cycle:
                trainer.step()
            per_sgd = sum(seconds(sgd, 10)) / 10
            each = seconds(trainer, cycle)
            per_sgd = (per_sgd + sum(seconds(sgd, 10)) / 10) / 2
            values.append(sum(each) / cycle / per_sgd)
        else:
            for _ in range(rounds):
                base = sum(seconds(sgd, 3)) / 3
                values.append(sum(seconds(trainer, 3)) / 3 / base)
        found[name] = median(values)
        goal = GOALS.get(name)
        print(f"{name:26s} {found[name]:6.2f} x SGD{'' if goal is None else f'   (goal {goal})'}", flush=True)
    return found


def cwngd(kind: str) -> float:
    """Milliseconds of CW-NGD's step on Linear 128→64 at batch 1024, forward and backward included."""
    torch.manual_seed(0)
    model = nn.Linear(128, 64)
    opt = optim.CWNGD(model, "categorical", damping=1e-2, lr=1e-3, kind=kind)
    x, y = torch.randn(1024, 128), torch.randint(64, (1024,))
    times = []
    for _ in range(8):
        start = time.process_time()
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        times.append(time.process_time() - start)
    return 1e3 * median(times[2:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*GOALS, "cwngd"]
    ratios([name for name in wanted if name in GOALS])
    if "cwngd" in wanted:
        print(f"cw-ngd, Linear 128→64, batch 1024: empirical {cwngd('empirical'):.1f} ms   (goal 65)")
