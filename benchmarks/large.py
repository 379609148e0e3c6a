"""Jobs measured by wall seconds and memory, each in a process of its own: whole comparisons, and the report.

Comparisons are those of all methods with the default metrics, weights and inputs are random; one is of a block of 10¹²
entries alone, with its relative errors. The report runs as a user starts it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from torch import nn

GOALS = {
    "big": ("exact relative Frobenius errors of kfac, foof and cw-ngd on a 1000×1000 layer, N = 1000", 8.0, 3.0),
    "mlp": ("`fv.compare` of 784-1000³-10, N = 1000, exact kind, every method, default metrics", 90.0, 4.0),
    "resnet": ("the same of a ResNet-20 (272,000 parameters), 32 × 32 images, N = 256", 120.0, 4.0),
    "gpt": (
        "the same of a GPT-2 block (width 256, T = 64, vocabulary 2000), N = 64, one sampled label per position",
        120.0,
        4.0,
    ),
    "report": ("`fisherviz report`", 60.0, 2.0),
}
"""What, at most how many wall seconds on two threads, at most how many GiB."""


def big() -> dict[str, Any]:
    """Relative errors of a layer whose exact block has 10¹² entries; in a process of its own."""
    import fisherviz as fv

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    x = torch.randn(1000, 1000)
    before = _peak(resource.RUSAGE_SELF)
    start, cpu = time.perf_counter(), time.process_time()
    fisher = fv.Probe(model, "categorical", layers=["0"]).fisher(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comparison = fv.compare(fisher, ["kfac", "foof", "cw-ngd"], metrics=["relative_frobenius"])
    seconds = time.perf_counter() - start
    errors = comparison.summary()["relative_frobenius"].to_dict()
    peak = _peak(resource.RUSAGE_SELF)
    return {"wall": seconds, "cpu": time.process_time() - cpu, "gib": peak, "gib_before": before, "errors": errors}


def mlp() -> dict[str, Any]:
    """The comparison of W3's network."""
    from benchmarks.workloads import wide

    return _comparison(wide(), "exact")


def resnet() -> dict[str, Any]:
    """The comparison of a ResNet-20."""
    from benchmarks.networks import images

    return _comparison(images(256), "exact")


def gpt() -> dict[str, Any]:
    """The comparison of a block of GPT-2."""
    from benchmarks.networks import texts

    return _comparison(texts(64), "mc")


def _comparison(case: Any, kind: str) -> dict[str, Any]:
    """The comparison of a case's network on its batch; in a process of its own."""
    import fisherviz as fv

    torch.set_num_threads(2)
    before = _peak(resource.RUSAGE_SELF)
    start, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comparison = fv.compare(fv.Probe(case.model, "categorical").fisher((case.x, case.y), kind=kind), progress=False)
    seconds, spent, peak = time.perf_counter() - start, time.process_time() - cpu, _peak(resource.RUSAGE_SELF)
    errors = comparison.summary()["relative_frobenius"].to_dict()
    return {"wall": seconds, "cpu": spent, "gib": peak, "gib_before": before, "errors": errors}


def report() -> dict[str, Any]:
    """The report with no argument; in a process of its own, whose children's memory is read."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        start_it = "from fisherviz.cli import main; main()"
        command = [sys.executable, "-c", start_it, "report", "--out", f"{folder}/report"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": seconds, "cpu": spent.ru_utime + spent.ru_stime, "gib": _peak(resource.RUSAGE_CHILDREN)}


def _peak(who: int) -> float:
    """Largest resident set in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(who).ru_maxrss / unit
