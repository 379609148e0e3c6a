"""Memory: requests under budgets that they do not fit, peaks against plans, and large cases in processes with a limit.

A large case runs by itself: `python -m benchmarks.trust.memory CASE` prints what came of it as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.markdown import table
from benchmarks.running import in_own_process
from benchmarks.trust.endurance import train
from fisherviz.support.numbers import human
from fisherviz.support.peaks import peak_bytes

TITLE = "Memory"
SHARES = (0.3,)
"""Budgets, as shares of what a request takes where memory is large."""
TOLERANCE, BESIDE = 1.1, 2**20
"""A budget is kept where the peak is below so many times it and so many bytes, since small arrays are not counted, or
below what nothing can do without: a first look at the network, which is a few examples' gradients, or a gradient of the
user's batch."""


# ---- networks --------------------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """A Linear at every position of a sequence, averaged, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(40, 60), nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, T, 40)."""
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
        """Tokens (N, T)."""
        x = self.table(tokens)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


class Reads(nn.Module):
    """A GRU, which has no structure, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, T, 8)."""
        return self.head(self.rnn(x)[0].mean(1))


@dataclass(frozen=True)
class Case:
    """A network with inputs, labels and the kind of its Fisher."""

    model: nn.Module
    x: Tensor
    y: Tensor
    kind: str = "exact"

    def gradient(self) -> None:
        """A forward and a backward pass of all inputs, by autograd."""
        loss = fv.Categorical().nll(self.model(self.x), self.y).sum()
        torch.autograd.grad(loss, list(self.model.parameters()))

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


@cache
def _vectors(size: int, *columns: int) -> Tensor:
    """What a user comes with, as with model and data: made once."""
    return torch.ones(size, *columns)


def _ones(f: Any, *columns: int) -> Tensor:
    return _vectors(f.shape[0], *columns)


def _saved(f: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return fv.load_approximation(fv.approximate(f, "layer").save(Path(folder) / "factors.safetensors")) @ _ones(f)


REQUESTS: dict[str, Request] = {
    "diagonal": lambda f: f.diagonal(),
    "product": lambda f: f @ _ones(f),
    "product with 50 vectors": lambda f: f @ _ones(f, 50),
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
    """All that is asked of a network: each starts with a Fisher that has seen nothing; all that a user has is there."""
    there = case(name)
    for columns in ((), (50,)):
        _ones(there.fisher(), *columns)
    for request, of in REQUESTS.items():
        yield request, lambda of=of: of(there.fisher())


def swept(name: str) -> Iterator[dict[str, Any]]:
    """Requests to a network without a budget, and with some that are too small."""
    of = case(name)
    looked = under(1, lambda: of.fisher().diagonal()).peak  # what is refused has looked
    least = max(looked, peak_bytes(of.gradient))
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
            row = {"network": name, "request": request, "peak": free.peak, "budget": budget, "least": least}
            try:
                found = under(budget, work)
                yield row | {"held": found.peak, "refused": found.refused}
            except Exception:
                yield row | {"error": traceback.format_exc(limit=-3)}


def kept(row: dict[str, Any]) -> bool:
    """Whether a budget was kept."""
    return "held" in row and row["held"] <= max(TOLERANCE * row["budget"] + BESIDE, row["least"])


# ---- peaks against plans ---------------------------------------------------------------------------------------------

PLANNED = ("diagonal", "product", "norm", "example_gram", "solve", "spectrum", "to_dense")
WRITTEN_OUT = 3000
"""Parameters up to which the whole matrix is asked for."""


def planned(name: str) -> Iterator[dict[str, Any]]:
    """What requests take beside the captures, which are there, and what `Fisher.plan` said of them."""
    for request in PLANNED:
        fisher = case(name).fisher()
        if request == "to_dense" and fisher.shape[0] > WRITTEN_OUT:
            continue
        captured = sum(capture.bytes for capture in fisher.example_space().values())
        said = fisher.plan(request).bytes
        held = captured + peak_bytes(lambda request=request, fisher=fisher: REQUESTS[request](fisher))
        yield {"network": name, "request": request, "planned": said, "held": held}


# ---- large cases, in processes with a limit --------------------------------------------------------------------------

ROOM = 3 * 2**29
"""Bytes of address space that a large case may take beside what its process has when it begins."""


def _wide(width: int, n: int, out: int | None = None) -> Any:
    x = torch.randn(n, width)
    return fv.Probe(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out or width)), "gaussian"), x


def _fisher(width: int, n: int, out: int | None = None, kind: str = "mc") -> Any:
    probe, x = _wide(width, n, out)
    return probe.fisher(x, torch.zeros(n, out or width), kind=kind)


def _classes(n: int) -> Any:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 50_000))
    return fv.Probe(model, "categorical").fisher(torch.randn(n, 8), kind="exact")


def _sequences() -> Any:
    torch.manual_seed(0)
    return fv.Probe(Sequences(), "categorical").fisher(torch.randn(2000, 200, 40), kind="mc")


def _many() -> Any:
    return fv.Probe(nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 2)), "categorical").fisher(
        torch.randn(100_000, 10), torch.randint(2, (100_000,))
    )


def _subsampled() -> None:
    model, x = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 2)), torch.randn(20_000, 200)
    opt = fv.optim.SubsampledNaturalGradient(model, "categorical", fisher_data=x)
    train(model, opt, x, torch.randint(2, (20_000,)))


def _loaded() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = fv.approximate(_fisher(80, 4), "layer").save(Path(folder) / "factors.safetensors")
        fv.load_approximation(path).to_dense()


LARGE: dict[str, tuple[str, bool, Callable[[], Any]]] = {
    "units": ("unit blocks of a layer of 4,096 x 4,096", True, lambda: _fisher(4096, 2).units(0)),
    "block": ("block between two layers of 2,048 x 2,048", True, lambda: _fisher(2048, 2).block(0, 1)),
    "kfac-block": ("K-FAC's block of a layer of 300 x 300", True,
                   lambda: fv.approximate(_fisher(300, 8), "kfac").block(0)),
    "kfac-dense": ("K-FAC's whole matrix of two such layers", True,
                   lambda: fv.approximate(_fisher(300, 8), "kfac").to_dense()),
    "kfac-inverse": ("a block of its inverse", True,
                     lambda: fv.approximate(_fisher(300, 8), "kfac").inverse(0.1).block(0)),
    "unit-block": ("an exact block of such a layer in unit order", True, lambda: _fisher(300, 8).unit_block(0, 0)),
    "inverse": ("a block of the exact inverse of two such layers", True, lambda: _fisher(300, 8).inverse(0.1).block(0)),
    "sample": ("a million samples of 180,600 parameters", True, lambda: _fisher(300, 8).sample(1.0, 10**6)),
    "kfac-sample": ("the same from K-FAC", True,
                    lambda: fv.approximate(_fisher(300, 8), "kfac").sample(1.0, 10**6)),
    "dense-compare": ("metrics that need matrices of two such layers", True,
                      lambda: fv.compare(_fisher(300, 8), ["kfac"], metrics=["relative_nuclear"], progress=False)),
    "gram": ("Gram matrix of 100,000 examples", True, lambda: _many().example_gram()),
    "classes-gram": ("Gram matrix of two examples of 50,000 classes", True, lambda: _classes(2).example_gram()),
    "subsampled": ("a step by the Gram matrix of a batch of 20,000", True, _subsampled),
    "loaded": ("a saved matrix of 12,960 parameters, loaded and written out", True, _loaded),
    "sequences": ("diagonal of 2,000 sequences of 200 positions", False, lambda: _sequences().diagonal()),
    "sequences-units": ("their unit blocks", False, lambda: _sequences().units(0)),
    "examples": ("solve, spectrum and diagonal of 100,000 examples", False,
                 lambda: [f := _many(), f.diagonal(), f.solve(_ones(f), 0.1), f.spectrum(3)]),
    "product": ("product with two layers of 2,048 x 2,048", False, lambda: [f := _fisher(2048, 2), f @ _ones(f)]),
}  # fmt: skip
"""What is asked in words, whether it cannot fit, and the work."""


def large(name: str) -> dict[str, Any]:
    """One large case, in this process, which may take `ROOM` more than it has."""
    import resource

    fv.approximate(case("wide").fisher(), "kfac").solve(torch.ones(62_210), 0.1)  # what is imported on the way is there
    pages = resource.getpagesize()
    with open("/proc/self/statm") as line:
        size = int(line.read().split()[0]) * pages
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused = error = ""
    try:
        LARGE[name][2]()
    except MemoryError as found:
        refused = str(found)
    except Exception as found:  # such as torch's own, from an allocator that has nothing left
        error = f"{type(found).__name__}: {found}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"refused": refused, "error": error[:300], "grown": grown, "seconds": time.perf_counter() - began}


# ---- the paragraph ---------------------------------------------------------------------------------------------------

FEW = ("deep", "classes")
"""Networks of the short half."""


def measure(long: bool) -> dict[str, Any]:
    """Budgets, plans, and large cases; the short half takes two networks and a few of these."""
    names = tuple(NETWORKS) if long else FEW
    sweep = [row for name in names for row in swept(name)]
    plans = [row for name in names for row in planned(name)]
    some = tuple(LARGE) if long else ("units", "kfac-block", "gram", "sequences")
    found = {name: in_own_process("benchmarks.trust.memory", [name]) for name in some}
    return {"sweep": sweep, "plans": plans, "large": found, "networks": len(names)}


def broken(found: dict[str, Any]) -> list[str]:
    """Budgets that were not kept, peaks above their plan, large cases that were neither answered nor refused."""
    out = []
    for row in found["sweep"]:
        if "error" in row:
            out.append(f"{row['request']} of {row['network']} ends in {row['error'].splitlines()[-1]}")
        elif not kept(row):
            held, budget = human(row["held"]), human(row["budget"])
            out.append(f"{row['request']} of {row['network']} holds {held} where {budget} may be taken.")
    for row in found["plans"]:
        if row["held"] > 1.25 * row["planned"] + BESIDE:
            out.append(
                f"{row['request']} of {row['network']} holds {human(row['held'])}, planned {human(row['planned'])}."
            )
    for name, row in found["large"].items():
        what, refused, _ = LARGE[name]
        if row["error"] or refused != bool(row["refused"]) or row["grown"] > ROOM:
            out.append(f"{what}: {row['error'] or row['refused'] or 'answered'} after {human(row['grown'])}.")
    return out


def words(found: dict[str, Any]) -> list[str]:
    """What was tried, and the three tables."""
    rows = [row for row in found["sweep"] if "held" in row]
    fine = [row for row in rows if kept(row)]
    refused = sum(bool(row["refused"]) for row in fine)
    by_network: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_network.setdefault(row["network"], []).append(row)
    body = [
        [name, str(len(own)), str(sum(bool(r["refused"]) for r in own)), str(sum(not kept(r) for r in own)),
         f"{max(r['held'] / r['budget'] for r in own):.2f}"]
        for name, own in by_network.items()
    ]  # fmt: skip
    plans = [
        [name, *(
            f"{row['held'] / row['planned']:.2f}" if (row := plan.get(request)) else "" for request in PLANNED
        )]
        for name in by_network
        if (plan := {row["request"]: row for row in found["plans"] if row["network"] == name})
    ]  # fmt: skip
    cases = [
        [LARGE[name][0], row["refused"] or "answered", human(row["grown"]), f"{row['seconds']:.1f} s"]
        for name, row in found["large"].items()
    ]
    return [
        f"{len(rows)} requests to {found['networks']} networks ran with `fv.config.memory_budget` at "
        f"{' and '.join(f'{share:.0%}' for share in SHARES)} of what each takes where memory is large. {len(fine)} "
        f"kept within it, {refused} of these by refusing in a sentence, the others in smaller pieces; kept means a "
        f"peak of tensors below {TOLERANCE:g} times the budget and {human(BESIDE)}, or below that of a first look at "
        "the network, which takes a few examples' gradients, or of autograd's gradient of the whole batch.",
        table(["network", "requests", "refused", "over the budget", "largest peak / budget"], body),
        "Peaks over what `Fisher.plan` says, captures included:",
        table(["network", *PLANNED], plans),
        f"Large cases, each in a process whose address space may grow by {human(ROOM)} (`ulimit -v`):",
        table(["asked", "outcome", "memory taken", "after"], cases),
        *([found["aside"]] if "aside" in found else []),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1] in LARGE:
        print(json.dumps(large(sys.argv[1])))
    else:
        print(json.dumps([list(swept(sys.argv[1])), list(planned(sys.argv[1]))]))
