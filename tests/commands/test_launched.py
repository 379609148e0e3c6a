"""`torchrun -m fisherviz report`: the page of one process, written by one; a process that fails ends all."""

import subprocess
import sys

import numpy as np
import pytest

from fisherviz.approximations import approximations
from fisherviz.commands.job import Job
from fisherviz.commands.report import run
from fisherviz.results.comparison import load_comparison
from fisherviz.support.pieces import PLACE
from tests.pages import undrawn

MODULE = """
import os, signal
import torch
from torch import nn

if os.environ.get("UNDRAWN"):  # drawing takes long; that of a page is the first process's alone
    from fisherviz.report import page
    page._render = lambda *rest, **options: ("<!doctype html>", [])

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

def batches():
    draws = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(11, 6, generator=draws).double(), torch.randint(3, (11,), generator=draws)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4)

if os.environ.get("FATE") == "killed later" and os.environ["RANK"] == "1":
    from fisherviz.support.pieces import Pieces
    once = Pieces.keep
    def keep(self, name, state):
        once(self, name, state)
        os.kill(os.getpid(), signal.SIGKILL)
    Pieces.keep = keep

def failing():
    model = build()
    def hook(module, inputs, output):
        if os.environ["RANK"] == "1" and os.environ["FATE"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == "1":
            raise ValueError("a layer of mine is gone.")
    model[0].register_forward_hook(hook)
    return model
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "launched_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def torchrun(model, *more, count=2, out="several"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    options = ["--model", f"launched_nets:{model}", "--data", "launched_nets:batches", "--kind", "mc", "--out", out]
    return subprocess.run(
        [*command, "-m", "fisherviz", "report", *options, *more],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods", [["kfac", "ekfac", "kfac-tridiagonal"], pytest.param(list(approximations), marks=pytest.mark.soak)]
)
def test_two_processes_write_the_page_of_one(here, methods, monkeypatch):
    if len(methods) == 3:
        undrawn(monkeypatch)  # here it ends with the test; the module does the same in the processes
        monkeypatch.setenv("UNDRAWN", "1")
    done = torchrun("build", "--methods", ",".join(methods))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote several/index.html") == done.stdout.count("Probe of Sequential") == 1
    options = {"model": "launched_nets:build", "data": "launched_nets:batches", "kind": "mc", "methods": methods}
    run(Job(**options, out="one", quiet=True))
    for part in ("", "layers"):
        one, several = (load_comparison(here / folder / part) for folder in ("one", "several"))
        keys = ["method", "row", "col", "metric"]
        frames = [
            c.frame[~c.frame["metric"].isin(["seconds", "passes"])].reset_index(drop=True) for c in (one, several)
        ]
        assert frames[0][keys].equals(frames[1][keys])
        gap = (frames[0]["value"] - frames[1]["value"]).abs()
        assert (gap <= 1e-6 * frames[0]["value"].abs() + 1e-7).all()
        assert one.notes == several.notes


@pytest.mark.soak  # of processes without torchrun: tests/exact/test_processes.py
@pytest.mark.parametrize("fate", ["failed", "killed"])
def test_a_process_that_ends_ends_all_and_nothing_is_written(here, monkeypatch, fate):
    monkeypatch.setenv("FATE", fate)
    done = torchrun("failing")
    assert done.returncode != 0
    if fate == "failed":  # where one is killed, torchrun may end the other before it has said so
        assert "fisherviz: process 1 of 2: a layer of mine is gone." in done.stderr
    assert not (here / "several").exists()


@pytest.mark.soak
def test_processes_that_were_killed_go_on_to_the_same_report(here, monkeypatch):
    assert torchrun("build", out="whole").returncode == 0
    monkeypatch.setenv("FATE", "killed later")
    assert torchrun("build").returncode != 0
    assert list((here / "several" / PLACE).glob("method-*.pt"))
    monkeypatch.delenv("FATE")
    done = torchrun("build")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" methods taken from the interrupted report.") == 1
    assert not (here / "several" / PLACE).exists()
    for part in ("", "layers"):
        whole, found = (load_comparison(here / folder / part) for folder in ("whole", "several"))
        keep = whole.frame["metric"] != "seconds"
        assert whole.frame[keep].equals(found.frame[keep])
        assert whole.notes == found.notes
        assert all(np.array_equal(array, found.arrays[name]) for name, array in whole.arrays.items())
