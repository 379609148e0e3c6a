"""Memory: requests under budgets that they do not fit, peaks against plans, and large cases in processes with a limit.

A large case runs by itself: `python -m benchmarks.trust.memory CASE` prints what came of it as JSON.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.trust.endurance import OPTIMIZERS, train
from fisherviz.support.numbers import human
from fisherviz.support.peaks import peak_bytes

TITLE = "Memory"
SHARES = (0.5, 0.1)
"""Budgets, as shares of what a request takes where memory is large."""
TOLERANCE, BESIDE = 1.1, 2**20
"""A budget is kept where the peak is below so many times it and so many bytes: small arrays are not counted, and what
the model's own forward and backward pass holds of one example is the model's."""


# ---- networks --------------------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """A Linear at every position of a sequence, averaged, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(40, 60), nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.each(x)).mean(1))


class Tokens(nn.Module):
    """A token embedding, a feed-forward block with a LayerNorm, a head at every position, tied to the table or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(60, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 60, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


class Reads(nn.Module):
    """A GRU, which has no structure, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


@dataclass(frozen=True)
class Case:
    """A network with inputs, labels and the kind of its Fisher."""

    model: nn.Module
    x: Tensor
    y: Tensor
    kind: str = "exact"

    def fisher(self) -> Any:
        """A new Fisher."""
        return fv.Probe(self.model, "categorical").fisher((self.x, self.y), kind=self.kind)


def case(name: str) -> Case:
    """A network by name, with inputs."""
    torch.manual_seed(0)
    model, x, kind = NETWORKS[name]()
    z = model(x[:1])
    labels = torch.randint(z.shape[-1], (len(x), *z.shape[1:-1]))
    return Case(model.eval(), x, labels, kind)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, str]]] = {
    "wide": lambda: (
        nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)), torch.randn(100, 300), "exact",
    ),
    "deep": lambda: (
        nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 10)),
        torch.randn(300, 30), "exact",
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, groups=2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        ),
        torch.randn(60, 3, 12, 12), "exact",
    ),
    "sequences": lambda: (Sequences(), torch.randn(80, 60, 40), "exact"),
    "tokens": lambda: (Tokens(tied=False), torch.randint(0, 60, (40, 16)), "mc"),
    "tied": lambda: (Tokens(tied=True), torch.randint(0, 60, (40, 16)), "mc"),
    "recurrent": lambda: (Reads(), torch.randn(60, 6, 8), "exact"),
    "classes": lambda: (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 300)), torch.randn(20, 6), "exact"),
    "examples": lambda: (nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 2)), torch.randn(2500, 8), "exact"),
}  # fmt: skip


# ---- requests --------------------------------------------------------------------------------------------------------

Request = Callable[[Any], Any]


def _ones(f: Any) -> Tensor:
    return torch.ones(f.shape[0])


def _saved(f: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return fv.load_approximation(fv.approximate(f, "layer").save(Path(folder) / "factors.safetensors")) @ _ones(f)


REQUESTS: dict[str, Request] = {
    "diagonal": lambda f: f.diagonal(),
    "product": lambda f: f @ _ones(f),
    "product with 50 vectors": lambda f: f @ torch.ones(f.shape[0], 50),
    "quadratic": lambda f: f.quadratic(_ones(f)),
    "gradient": lambda f: f.gradient(),
    "block": lambda f: f.block(0),
    "block between layers": lambda f: f.block(0, len(f.space.layers) - 1),
    "unit blocks": lambda f: f.units(0),
    "to_dense": lambda f: f.to_dense(),
    "norm": lambda f: f.norm(),
    "norm of a block": lambda f: f.norm(block=(0, 0)),
    "spectral norm": lambda f: f.norm("spectral"),
    "example_gram": lambda f: f.example_gram(),
    "spectrum": lambda f: f.spectrum(),
    "solve": lambda f: f.solve(_ones(f), 0.1),
    "natural_gradient": lambda f: f.natural_gradient(0.1),
    "log_determinant": lambda f: f.log_determinant(0.1),
    "inverse": lambda f: f.inverse(0.1).diagonal(),
    "sample": lambda f: f.sample(1.0, 2),
    "2,000 samples": lambda f: f.sample(1.0, 2000),
    "cumulants": lambda f: fv.cumulants(f, [-1 % len(f.space.layers)], progress=False),
    **{f"fit {name}": partial(lambda name, f: fv.approximate(f, name), name) for name in fv.approximations()},
    "kfac block": lambda f: fv.approximate(f, "kfac").block(0),
    "kfac to_dense": lambda f: fv.approximate(f, "kfac").to_dense(),
    "kfac inverse": lambda f: fv.approximate(f, "kfac").inverse(0.1).block(0),
    "kfac samples": lambda f: fv.approximate(f, "kfac").sample(1.0, 2000),
    "layer solve": lambda f: fv.approximate(f, "layer").solve(_ones(f), 0.1),
    "layer saved, loaded": _saved,
    "compare": lambda f: fv.compare(f, ["kfac", "foof", "layer"], progress=False),
    "heat map": lambda f: fv.plot.heatmap(f.block(0)),
}


def _step(name: str, of: Case) -> None:
    train(of.model, OPTIMIZERS[name](of.model), of.x, of.y)


def _watched(of: Case) -> None:
    fv.Monitor(fv.Probe(of.model, "categorical"), ["kfac"], data=(of.x, of.y), kind=of.kind).measure(1)


@dataclass(frozen=True)
class Outcome:
    """What came of a request: its peak, and "" or what it was refused with."""

    peak: int
    refused: str


def outcome(work: Callable[[], Any]) -> Outcome:
    """Run, and say what was held at the peak, up to the refusal where there is one."""
    said: list[str] = []

    def run() -> None:
        try:
            work()
        except (MemoryError, NotImplementedError, torch.OutOfMemoryError) as error:
            said.append(f"{type(error).__name__}: {error}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peak = peak_bytes(run)
    return Outcome(peak, said[0] if said else "")


def under(budget: float | None, work: Callable[[], Any]) -> Outcome:
    """The outcome with a budget."""
    before = fv.config.memory_budget
    fv.config.memory_budget = budget
    try:
        return outcome(work)
    finally:
        fv.config.memory_budget = before


def works(name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that is asked of a network: each starts with a Fisher that has seen nothing."""
    for request, of in REQUESTS.items():
        yield request, lambda of=of: of(case(name).fisher())


def swept(name: str) -> Iterator[dict[str, Any]]:
    """Requests to a network without a budget, and with some that are too small."""
    for request, work in works(name):
        try:
            free = under(None, work)
        except Exception:
            yield {"network": name, "request": request, "error": traceback.format_exc(limit=-3)}
            continue
        if free.refused:
            continue
        for share in SHARES:
            budget = int(share * free.peak)
            if budget < BESIDE:
                continue
            row = {"network": name, "request": request, "peak": free.peak, "budget": budget}
            try:
                found = under(budget, work)
                yield row | {"held": found.peak, "refused": found.refused}
            except Exception:
                yield row | {"error": traceback.format_exc(limit=-3)}


def kept(row: dict[str, Any]) -> bool:
    """Whether a budget was kept."""
    return "held" in row and row["held"] <= TOLERANCE * row["budget"] + BESIDE


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    for what in sys.argv[1:] or NETWORKS:
        for each in swept(what):
            if not kept(each):
                print(
                    each["network"],
                    "|",
                    each["request"],
                    "|",
                    *(human(each[k]) if k in each else "" for k in ("peak", "budget", "held")),
                    "|",
                    each.get("refused", "")[:150],
                    each.get("error", ""),
                    flush=True,
                )
        print(what, time.perf_counter() - began, flush=True)
