"""What is tried to be lost: tiny work of every kind that writes, and what of its result does not hang on the clock."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import fisherviz as fv
from fisherviz.commands.job import Job
from fisherviz.commands.report import run as run_report
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.records import load
from fisherviz.papers.ledger.registry import Exhibit, measure
from fisherviz.papers.trials import running
from fisherviz.papers.trials.problems import Method, Problem
from fisherviz.papers.trials.work import Run
from fisherviz.report import page
from fisherviz.report.against import comparisons_of
from fisherviz.results.comparison import Comparison, load_comparison
from fisherviz.support.sealing import read_sealed
from fisherviz.training import load_run, sweep, train

OLD, NEW = "old", "new"
FIELDS: dict[str, Any] = {
    "dataset": "digits", "limit": 60, "model_options": {"hidden": [4]}, "optimizer": "foof", "batch_size": 20,
    "tensorboard": False,
}  # fmt: skip
RUN = FIELDS | {"epochs": 3, "checkpoint_every": 2, "quiet": True}
PROBLEM = Problem("digits", "shrestha-mlp", (("hidden", (4,)),), batch=50, limit=100)
CLOCK = {
    "seconds",
    "seconds_total",
    "config",
    "run",
    "made",
    "core_hours",
    "metrics_bytes",
    "metrics_sha256",
    "created",
    "command",
    "forward_backward_seconds",
    "fits_timed",
}
"""Keys of what hangs on the clock or on the folder's name."""


@dataclass(frozen=True)
class Kept:
    """Work that leaves something in a folder.

    Args:
        name: of it, as the page has it.
        work: does it, or goes on with it.
        state: what it has left, as JSON holds it; equal for equal results.
        replaces: whether it replaces an earlier result, which must be readable until then.
        before: makes the earlier result.
    """

    name: str
    work: Callable[[Path], Any]
    state: Callable[[Path], Any]
    replaces: bool = False
    before: Callable[[Path], Any] = lambda folder: None


def plain(value: Any) -> Any:
    """Anything as JSON holds it: tensors and arrays by their digests, nothing that hangs on the clock."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, pd.DataFrame):
        dropped = value.drop(columns=[c for c in value.columns if c in CLOCK])
        return plain(dropped.to_dict("list"))
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items() if key not in CLOCK}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def names(folder: Path, but: tuple[str, ...] = ()) -> list[str]:
    """The files of a folder, those that somebody forgot among them."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in but)


# ---- runs and sweeps


def run_state(folder: Path) -> Any:
    """Metrics, summary, weights, optimizer and generators of a run."""
    run = load_run(folder / "run")
    checkpoint = read_sealed(folder / "run" / "checkpoint.pt")
    return plain([list(run.records), run.summary, checkpoint, names(folder)])


def _sweep(folder: Path) -> Any:
    return sweep(FIELDS | {"epochs": 1}, {"lr": [0.1, 0.3]}, out=folder / "sweep")


def sweep_state(folder: Path) -> Any:
    """The table of a sweep and its runs."""
    table = pd.read_csv(folder / "sweep" / "runs.csv", keep_default_na=False)
    runs = [load_run(path.parent) for path in sorted((folder / "sweep" / "runs").glob("*/*/config.yaml"))]
    ended = [[list(run.records), run.summary] for run in runs]
    # the log beside a SQLite file comes and goes with its readers
    return plain([table, ended, [name for name in names(folder) if not name.endswith(("-journal", "-wal", "-shm"))]])


# ---- comparisons, approximations, reports


def network() -> tuple[nn.Module, Tensor]:
    """A network of 30 parameters, and examples."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net, torch.randn(20, 4, generator=generator)


@cache
def comparison(which: str) -> Comparison:
    """A comparison of two methods; the old and the new one differ in a method and in all numbers."""
    net, x = network()
    fisher = fv.Probe(net, "categorical").fisher(x if which == NEW else 2 * x)
    found = fv.compare(fisher, ["kfac", "diagonal" if which == NEW else "foof"], progress=False)
    found.meta["created"] = ""
    return found


def comparison_state(folder: Path) -> Any:
    """Table, facts and arrays."""
    found = load_comparison(folder / "comparison")
    return plain([found.frame.to_dict("list"), found.meta, found.arrays, names(folder)])


@cache
def approximation(which: str) -> LayeredMatrix:
    """K-FAC of one data set or another."""
    net, x = network()
    return fv.approximate(fv.Probe(net, "categorical").fisher(x if which == NEW else 2 * x), "kfac")


def approximation_state(folder: Path) -> Any:
    """The matrix, entry by entry."""
    found = fv.load_approximation(folder / "kfac.safetensors")
    return plain([found.to_dense(), repr(found), names(folder)])


@cache
def drawn(which: str) -> tuple[str, list[Any]]:
    """A page and its pictures: drawing writes nothing, so that it is done once."""
    return page._render(page._sections(comparison(which)), page.TITLE)


def report(folder: Path, which: str) -> Any:
    """Write a report whose pictures are drawn already."""
    once = page._render
    page._render = lambda *rest, **options: drawn(which)  # type: ignore[assignment]
    try:
        return page.write_report(folder / "report", comparison(which))
    finally:
        page._render = once


def report_state(folder: Path) -> Any:
    """Comparisons, page, pictures."""
    found = comparisons_of(folder / "report")
    contents = [(name, (folder / name).read_bytes()) for name in names(folder) if (folder / name).is_file()]
    digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in contents]
    return plain([{title: [one.frame, one.meta, one.arrays] for title, one in found.items()}, digests])


# ---- what is measured for a report


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The same network, with targets."""
    net, x = network()
    return net, (x, torch.arange(len(x)) % 3)


def measured(folder: Path, *methods: str) -> Any:
    """A whole report of two layers, of three methods or others; what it draws is drawn already."""
    once, said = page._render, ("<!doctype html>", [])
    page._render = lambda *rest, **options: said  # type: ignore[assignment]
    here = "benchmarks.trust.keeping:small"
    job = Job(
        model=f"{here}_network", data=f"{here}_data", out=folder / "report", quiet=True, seed=len(methods),
        methods=methods or ("kfac", "foof", "diagonal"), metrics=("relative_frobenius", "direction_cosine", "passes"),
    )  # fmt: skip
    try:
        return bool(run_report(job, lambda line: None))
    finally:
        page._render = once


def small_network() -> nn.Module:
    """For a job."""
    return small()[0]


def small_data() -> tuple[Tensor, Tensor]:
    """For a job."""
    return small()[1]


def measured_state(folder: Path) -> Any:
    """Both comparisons of a report."""
    found = comparisons_of(folder / "report")
    return plain([{title: [one.frame, one.meta, one.arrays] for title, one in found.items()}, names(folder)])


# ---- papers


def exhibit(name: str) -> Exhibit:
    """An exhibit of one short training."""

    def found(run: Run) -> Outcome:
        running.SAVED = -1.0  # a state after every step
        one = running.trained(PROBLEM, Method("Adam", "adam"), {}, 6, 2, len(name), run)
        last = one["curve"][-1]["train_loss"]
        claim = Claim("It trains.", "none", f"{last:.3g}", "below 10", last < 10, values={"loss": last})
        return Outcome((claim,), "digits", "digits", "no picture", picture=name.encode())

    return Exhibit(name, "a figure", "nothing", {}, found)


def papers(folder: Path, name: str = "kfac.short") -> Any:
    """Measure and record it."""
    return measure(exhibit(name), Run("smoke", progress=False), folder / "figures")


def papers_state(folder: Path) -> Any:
    """Claims and kept measurements."""
    kept = [json.loads(path.read_text()) for path in sorted((folder / "figures" / ".runs").glob("*.json"))]
    curves = [[one["what"], [plain(line) for line in one["curve"]]] for one in kept]
    return plain([load(folder / "figures"), curves, names(folder)])


WORK = (
    Kept("run", lambda folder: train(RUN, out=folder / "run"), run_state),
    Kept("sweep", _sweep, sweep_state),
    Kept(
        "report", lambda folder: report(folder, NEW), report_state, True,
        lambda folder: report(folder, OLD),
    ),
    Kept(
        "comparison", lambda folder: comparison(NEW).save(folder / "comparison"), comparison_state, True,
        lambda folder: comparison(OLD).save(folder / "comparison"),
    ),
    Kept(
        "approximation", lambda folder: approximation(NEW).save(folder / "kfac.safetensors"), approximation_state, True,
        lambda folder: approximation(OLD).save(folder / "kfac.safetensors"),
    ),
    Kept("papers", papers, papers_state),
    Kept("whole report", measured, measured_state, True, lambda folder: measured(folder, "ekfac", "identity")),
)  # fmt: skip


def result_of(state: str) -> list[Any]:
    """A state in JSON without its list of files, to which work that was killed or interrupted may have added."""
    return json.loads(state)[:-1] if state else []


def warm() -> None:
    """Import and make once what every fork then has."""
    for which in (OLD, NEW):
        comparison(which), approximation(which), drawn(which)


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
