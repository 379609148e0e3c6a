"""Leaks: thousands of cycles of everything that is made again and again, in a process each, with what is left counted.

A row's process runs itself: `python -m benchmarks.trust.endurance NAME CYCLES SECONDS` prints it as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import json
import os
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.markdown import table
from benchmarks.running import in_own_process
from fisherviz.support.memory import at_once
from fisherviz.support.numbers import human

TITLE = "Long runs"
SAMPLES = 20
"""Times that what is left is counted after the first."""
FEWEST = 6
"""Times that it is counted at least, however long that takes."""
WARM = 20
"""Of the cycles one in so many comes before the first count, at least two periods: caches fill, threads start."""
PER_CYCLE = 100
"""Bytes of resident memory by which a cycle may grow, or `NOISE` in all: pages that the allocator keeps."""
NOISE = 4 * 2**20
FEW = 20
"""Cycles that may bring one object more: dictionaries come and go from the collector's list by what they hold."""
SHORT, LONG, BESIDE = (200, 5.0), (10_000, 3600.0), (10_000, 300.0)
"""Cycles, and seconds after which a row ends although it has not reached them: in the short half; in the long one, of
what has to be repeated ten thousand times, `REPEATED`; there, of the others."""
HOUR = (10**9, 3600.0)
"""The same of training with a monitor in the long half: as many steps as an hour has."""

Cycle = Callable[[int], None]


@dataclass(frozen=True)
class Left:
    """What a process holds.

    Attributes:
        resident: bytes of memory.
        objects: that the collector knows.
        tensors: among them.
        tensor_bytes: held by these tensors.
        cached: entries of the package's module-level tables and caches.
        files: open descriptors.
        threads: of Python.
        hooks: on the modules that live.
    """

    resident: int
    objects: int
    tensors: int
    tensor_bytes: int
    cached: int
    files: int
    threads: int
    hooks: int


COUNTS = tuple(field.name for field in fields(Left) if field.name != "resident")


def left() -> tuple[int, ...]:
    """Count, after the collector has run: what `Left` names, as plain numbers that the next count does not see."""
    gc.collect()
    resident = _resident()  # before the list of all objects, which takes megabytes of its own
    found = gc.get_objects()
    tensors = [each for each in found if issubclass(type(each), Tensor)]
    modules = [each for each in found if issubclass(type(each), nn.Module)]
    tables = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return (
        resident, len(found), len(tensors), sum(_storages(tensors).values()), _cached(),
        len(os.listdir("/proc/self/fd")), threading.active_count(),
        sum(len(getattr(module, name)) for module in modules for name in tables),
    )  # fmt: skip


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes by address; wrappers of functorch and tensors of a compiler have none."""
    found = {}
    for tensor in tensors:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _resident() -> int:
    """Bytes, after the allocator has given back what it keeps for later, where it is one that can be asked."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cached() -> int:
    """Entries of what the package's modules hold by name: dictionaries, sets, lists, caches of functions."""
    total = 0
    for name, module in list(sys.modules.items()):
        if name == "fisherviz" or name.startswith("fisherviz."):
            for value in list(vars(module).values()):
                if isinstance(value, dict | set | list | weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
                    total += len(value)
                elif isinstance(value, functools._lru_cache_wrapper):
                    total += value.cache_info().currsize
    return total


# ---- what is repeated ------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Sequential:
    """A small network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data() -> tuple[Tensor, Tensor]:
    """Twelve examples of three classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randint(3, (12,), generator=generator)


def probes() -> Cycle:
    """Probe, Fisher of each kind, diagonal, product, K-FAC, detach; every fourth network is new, every eighth fails."""
    model, given = network(), data()

    def cycle(i: int) -> None:
        of = network(i) if i % 4 == 3 else model
        with fv.Probe(of, "categorical") as probe:
            fisher = probe.fisher(given, kind=("exact", "mc", "empirical")[i % 3])
            fisher.diagonal(), fisher @ torch.ones(fisher.shape[0]), fv.approximate(fisher, "kfac")
            if i % 8 == 7:
                try:
                    probe.fisher(torch.full((4, 6), torch.nan)).diagonal()
                except ValueError:
                    return
                raise AssertionError("NaN was not refused")

    return cycle


def requests() -> Cycle:
    """The other requests, and an approximation, to a new Fisher each time."""
    probe, given = fv.Probe(network(), "categorical"), data()

    def cycle(i: int) -> None:
        fisher = probe.fisher(given)
        fisher.block(0, 1), fisher.units(0), fisher.norm(), fisher.natural_gradient(0.1), fisher.sample(1.0, 2)
        fisher.to_dense(), fisher.spectrum(2), fisher.solve(fisher.gradient(), 0.1), fisher.inverse(0.1).block(0)
        fv.approximate(fisher, ("kfac", "ekfac", "foof", "layer")[i % 4]).solve(fisher.gradient(), 0.1)

    return cycle


def generic() -> Cycle:
    """The same of a recurrent layer and attention, which have no structure or run inside a function."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.attend = nn.GRU(6, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found, _ = self.rnn(x)
            return self.head(self.attend(found, found, found, need_weights=False)[0].mean(1))

    model, x = Reads(), torch.randn(4, 5, 6)

    def cycle(i: int) -> None:
        with fv.Probe(model, "categorical") as probe:
            fisher = probe.fisher(x, kind="mc")
            fisher.diagonal(), fisher @ torch.ones(fisher.shape[0]), fisher.norm()

    return cycle


def comparisons() -> Cycle:
    """`fv.compare` with all methods, saved and loaded."""
    fisher_of, folder = fv.Probe(network(), "categorical"), Path(tempfile.mkdtemp())

    def cycle(i: int) -> None:
        found = fv.compare(fisher_of.fisher(data()), progress=False)
        fv.load_comparison(found.save(folder / "comparison"))

    return cycle


def files() -> Cycle:
    """Approximations saved and loaded."""
    fisher, path = fv.Probe(network(), "categorical").fisher(data()), Path(tempfile.mkdtemp()) / "factors.safetensors"

    def cycle(i: int) -> None:
        name = ("kfac", "ekfac", "diagonal", "layer", "kfac-tridiagonal")[i % 5]
        fv.load_approximation(fv.approximate(fisher, name).save(path)) @ torch.ones(fisher.shape[0])

    return cycle


def reports() -> Cycle:
    """Pictures drawn and closed by their owner, and the page written."""
    found, folder = fv.compare(fv.Probe(network(), "categorical").fisher(data()), progress=False), tempfile.mkdtemp()

    def cycle(i: int) -> None:
        draw: Sequence[Callable[[], Any]] = (
            lambda: fv.plot.comparison(found), lambda: fv.plot.pareto(found), lambda: fv.plot.spectrum(found),
            lambda: fv.plot.block_means(found), lambda: fv.plot.heatmap(found),
        )  # fmt: skip
        figure = getattr(drawn := draw[i % len(draw)](), "figure", drawn)
        figure.savefig(Path(folder) / "picture.svg")
        plt.close(figure)
        if i % 5 == 0:
            found.to_html(Path(folder) / "page.html")

    return cycle


def watched() -> Cycle:
    """Training by Adam with a monitor that looks at every second step."""
    model, (x, y) = network(), data()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = fv.Monitor(fv.Probe(model, "categorical"), ["kfac", "foof"], every=2, data=(x, y), optimizer=opt)

    def cycle(i: int) -> None:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        monitor.step()
        monitor._rows.clear()  # its table grows by what it reports, which is what it is for

    return cycle


def copied() -> Cycle:
    """The model copied under an optimizer that watches it; copies run."""
    model, (x, y) = network(), data()
    opt = fv.optim.FOOF(model, "categorical")

    def cycle(i: int) -> None:
        copy.deepcopy(model)(x)
        train(model, opt, x, y)

    return cycle


def replaced() -> Cycle:
    """An optimizer after the other on one model, without being told to let go."""
    model, (x, y) = network(), data()
    made = tuple(OPTIMIZERS.values())

    def cycle(i: int) -> None:
        opt = made[i % len(made)](model)
        train(model, opt, x, y)

    return cycle


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step, by a closure where the optimizer asks for one."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    if isinstance(opt, fv.optim.KBFGS | fv.optim.HessianFree | fv.optim.KSD | fv.optim.KFAC):
        opt.step(closure)
    else:
        closure()
        opt.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "KFAC": lambda m: fv.optim.KFAC(m, "categorical"),
    "KFAC, plain": lambda m: fv.optim.KFAC(m, "categorical", rescale=False, adapt=False),
    "EKFAC": lambda m: fv.optim.EKFAC(m, "categorical"),
    "FOOF": lambda m: fv.optim.FOOF(m, "categorical"),
    "CWNGD": lambda m: fv.optim.CWNGD(m, "categorical"),
    "TENGraD": lambda m: fv.optim.TENGraD(m, "categorical"),
    "SubsampledNaturalGradient": lambda m: fv.optim.SubsampledNaturalGradient(m, "categorical", fisher_data=data()[0]),
    "NaturalGradient": lambda m: fv.optim.NaturalGradient(m, "categorical", "kfac-tridiagonal"),
    "KBFGS": lambda m: fv.optim.KBFGS(m, "categorical"),
    "HessianFree": lambda m: fv.optim.HessianFree(m, "categorical"),
    "KSD": lambda m: fv.optim.KSD(m, "categorical"),
}


def trained(name: str) -> Cycle:
    """Steps of one optimizer on mini-batches."""
    model, (x, y) = network(), data()
    opt = OPTIMIZERS[name](model)

    def cycle(i: int) -> None:
        part = torch.randperm(12)[: 8 + i % 5]
        train(model, opt, x[part], y[part])

    return cycle


ROWS: dict[str, tuple[str, Callable[[], Cycle], int]] = {
    "probes": ("probe, Fisher, diagonal, product, K-FAC, detach", probes, 24),
    "requests": ("ten other requests, an approximation, a solve", requests, 4),
    "generic": ("probe, Fisher, three requests, of a GRU and attention", generic, 1),
    "comparisons": ("comparison of all methods, saved, loaded", comparisons, 1),
    "files": ("approximation saved, loaded", files, 5),
    "reports": ("picture drawn, page written", reports, 5),
    "watched": ("training step with a monitor", watched, 2),
    "copied": ("model copied under an optimizer, step", copied, 1),
    "replaced": ("optimizer replaced by another, step", replaced, 10),
    **{name: (f"step of {name}", functools.partial(trained, name), 5) for name in OPTIMIZERS},
}
"""What is repeated in words, what gives it, and after how many cycles it does the same again."""
REPEATED = ("probes", "requests", *OPTIMIZERS)


# ---- how it is judged ------------------------------------------------------------------------------------------------


def row(make: Callable[[], Cycle], period: int, cycles: int, seconds: float) -> dict[str, Any]:
    """Repeat, and count what is left on the way.

    Args:
        make: gives what is repeated.
        period: cycles after which it does the same again; what is left is counted at multiples of it.
        cycles: after the warm-up.
        seconds: after which it ends all the same.
    """
    at_once(1, torch.empty(0))  # asks the machine for its memory, once for each process
    cycle, began = make(), time.perf_counter()
    warm = 0
    while warm < 2 * period or (warm < cycles // WARM and time.perf_counter() - began < seconds / 5):
        for i in range(warm, warm + period):
            cycle(i)
        warm += period
    step, samples, at = period * -(-cycles // SAMPLES // period), [left()], [0]
    while len(samples) <= SAMPLES and (len(samples) < FEWEST or time.perf_counter() - began < seconds):
        done, start = at[-1], time.perf_counter()
        while done - at[-1] < step and (done == at[-1] or time.perf_counter() - start < seconds / SAMPLES):
            for i in range(done, done + period):
                cycle(warm + i)
            done += period
        samples.append(left())
        at.append(done)
    found = judged([Left(*each) for each in samples], at)
    return found | {"cycles": at[-1], "seconds": round(time.perf_counter() - began, 1)}


def judged(samples: Sequence[Left], at: Sequence[int]) -> dict[str, Any]:
    """Growth: of memory by a line through the samples, in bytes; of counts between the halves' largest.

    Args:
        samples: in order.
        at: the cycles after which they were taken.
    """
    resident = torch.tensor([float(each.resident) for each in samples], dtype=torch.float64)
    cycles = torch.tensor(at, dtype=torch.float64)
    centred = cycles - cycles.mean()
    slope = float((centred * resident).sum() / centred.square().sum())
    half = (len(samples) + 1) // 2
    grown = {
        name: max(getattr(s, name) for s in samples[half:]) - max(getattr(s, name) for s in samples[:half])
        for name in COUNTS
    }
    return {"resident": samples[-1].resident, "memory": slope * at[-1], "per_cycle": slope,
            "grown": {name: grew for name, grew in grown.items() if grew > 0}}  # fmt: skip


def measure(long: bool) -> dict[str, Any]:
    """All rows, each in a process of its own."""
    rows = {}
    for name in ROWS:
        cycles, seconds = limits(name) if long else SHORT
        rows[name] = in_own_process("benchmarks.trust.endurance", [name, str(cycles), str(seconds)])
    return {"rows": rows}


def limits(name: str) -> tuple[int, float]:
    """Cycles and seconds of a row of the long half."""
    if name == "watched":
        return HOUR
    return LONG if name in REPEATED else BESIDE


def broken(found: dict[str, Any]) -> list[str]:
    """What has grown."""
    out = []
    for name, row in found["rows"].items():
        if row["memory"] > max(NOISE, PER_CYCLE * row["cycles"]):
            out.append(f"{ROWS[name][0]}: memory grows by {row['per_cycle']:.0f} bytes a cycle.")
        leaked = {what: grew for what, grew in row["grown"].items() if what != "objects" or grew > row["cycles"] / FEW}
        out += [f"{ROWS[name][0]}: {grew} more {what} in the second half." for what, grew in leaked.items()]
    return out


def words(found: dict[str, Any]) -> list[str]:
    """A table of what was repeated and what grew."""
    body = []
    for name, row in found["rows"].items():
        grown = ", ".join(f"{grew} {what}" for what, grew in row["grown"].items()) or "none"
        memory = f"{row['memory'] / 2**20:+.1f} MiB of {human(row['resident'])}"
        body.append([ROWS[name][0], f"{row['cycles']:,}", f"{row['seconds']:.0f} s", memory, grown])
    total = sum(row["cycles"] for row in found["rows"].values())
    return [
        f"{total:,} cycles of what a long run repeats, a process for each row. After a warm-up, live tensors and their "
        "bytes, all objects that the collector knows, hooks on modules, entries of module-level caches, open files "
        f"and threads are counted at up to {SAMPLES + 1} moments; more of anything in the second half than in the "
        f"first would be a leak, but for an object in {FEW} cycles. Resident memory is a line through the "
        "moments: its growth from first to last may be "
        f"{NOISE // 2**20} MiB, which the allocator keeps or gives back as it likes, or {PER_CYCLE} bytes a cycle.",
        table(["repeated", "cycles", "in", "growth of resident memory", "growth of counts"], body),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    what, most, limit = sys.argv[1:]
    print(json.dumps(row(*ROWS[what][1:], int(most), float(limit))))
