"""What is kept of measurements: damage and other circumstances are named, and no process loses another's rows."""

import os
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.records import load, record
from fisherviz.papers.trials import running
from fisherviz.papers.trials.problems import Method, Problem
from fisherviz.papers.trials.states import kept_state
from fisherviz.papers.trials.work import Run, kept
from fisherviz.support.sealing import read_sealed, seal

PROBLEM = Problem("digits", "shrestha-mlp", (("hidden", (4,)),), batch=50, limit=100)
ADAM = Method("Adam", "adam")


def flip(path, place):
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


def test_a_measurement_that_was_damaged_is_refused_by_its_name(tmp_path):
    run = Run("smoke", work=tmp_path)
    found = kept({"a": 1}, lambda: {"loss": 0.25, "curve": [1.5]}, run)
    assert kept({"a": 1}, dict, run) == found
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 5):
        flip(path, place)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged .*; remove it, and it is measured again"):
            kept({"a": 1}, dict, run)
        path.write_bytes(whole)
    path.rename(tmp_path / "other")
    kept({"a": 2}, lambda: {"loss": 1.0}, run)
    (other,) = (p for p in tmp_path.iterdir() if p.suffix)
    other.write_bytes(whole)
    with pytest.raises(ValueError, match="it is not the measurement of its name"):
        kept({"a": 2}, dict, run)


def test_a_state_that_was_damaged_is_refused_by_its_name(tmp_path):
    run = Run("smoke", work=tmp_path)
    kept_state({"a": 1}, lambda: ({"loss": 1.0}, {"weights": torch.ones(3)}), run)
    (path,) = tmp_path.glob("*.state")
    flip(path, len(path.read_bytes()) // 2)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read: it is damaged"):
        kept_state({"a": 1}, lambda: ({}, {}), run)


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A run that was left after its third step, and the call that goes on with it."""
    run, step = Run("smoke", progress=False, work=tmp_path), running._Training._step
    monkeypatch.setattr(running, "SAVED", -1.0)

    def breaks(training, x, y, number):
        if number == 4:
            raise KeyboardInterrupt
        step(training, x, y, number)

    def go_on():
        return running.trained(PROBLEM, ADAM, {}, 6, 2, 1, run)

    with monkeypatch.context() as once:
        once.setattr(running._Training, "_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    (path,) = tmp_path.glob("*.part")
    return path, go_on


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "0" * 16}, r"was begun with other examples of digits \(data\)"),
        ({"model": {"layer1.weight": torch.ones(3)}}, r"was begun with another shrestha-mlp \(model\): the weight"),
    ],
)
def test_a_training_that_other_circumstances_began_names_them(part, change, told):
    path, go_on = part
    path.write_bytes(seal({k: v for k, v in read_sealed(path).items() if k != "sealed"} | change))
    with pytest.raises(ValueError, match=rf"{path.name} {told}.*; remove it to begin again"):
        go_on()


def test_a_training_that_another_version_began_notes_it(part):
    path, go_on = part
    state = {k: v for k, v in read_sealed(path).items() if k != "sealed"}
    path.write_bytes(seal(state | {"versions": {**state["versions"], "torch": "1.0"}}))
    moves = go_on()["moves"]
    assert [(move["step"], move["torch"][0]) for move in moves] == [(3, "1.0")]


def _records(folder, name):
    claim = Claim("It is.", "none", "1", "below 2", True, values={"a": 1.0})
    for count in range(12):
        outcome = Outcome((replace(claim, values={"a": float(count)}),), "s", "d", "c")
        record(folder, f"{name}.fig{count}", "Somebody, a figure", "nothing", outcome, Run("smoke"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_that_record_at_once_keep_all_rows(tmp_path):
    context = get_context("fork")
    both = [context.Process(target=_records, args=(tmp_path, name)) for name in ("kfac", "sang")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(load(tmp_path)) == 24
