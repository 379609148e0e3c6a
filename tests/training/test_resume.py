"""A run that is stopped at any moment ends as one that was not: bit for bit, wall-clock fields aside."""

import os
import random
import time

import pytest
import torch

from benchmarks.trust.injection import forked
from fisherviz.training import load_run, train
from fisherviz.training.optimizers import OPTIMIZERS
from fisherviz.training.run import Session

SMALL = {
    "limit": 150, "epochs": 2, "batch_size": 40, "quiet": True, "model_options": {"hidden": [6]},
    "tensorboard": False, "checkpoint_every": 3, "averaging": 0.9,
}  # fmt: skip
OPTIONS = {
    "kfac": {"damping": 1.0, "T1": 2, "T2": 4, "T": 2},
    "natural-gradient": {"lr": 0.05, "damping": 0.1},
}


def told(run):
    """Everything in the metrics but what the clock says."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.records]


def weights(run):
    return torch.load(run.path / "checkpoint.pt", weights_only=True)["model"]


def assert_same(run, reference):
    assert told(run) == told(reference)
    for name, value in weights(reference).items():
        assert torch.equal(weights(run)[name], value)
    ends = [{k: v for k, v in r.summary.items() if k not in ("seconds", "config")} for r in (run, reference)]
    assert ends[0] == ends[1]


class Interrupted(Exception):
    pass


@pytest.mark.covering
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, optimizer, stop):
    fields = SMALL | {"optimizer": optimizer, "optimizer_options": OPTIONS.get(optimizer, {})}
    reference = train(fields, out=tmp_path / "reference")
    step = Session.step

    def failing(session):
        found = step(session)
        if session.steps == stop:
            raise Interrupted
        return found

    monkeypatch.setattr(Session, "step", failing)
    with pytest.raises(Interrupted):
        train(fields, out=tmp_path / "run")
    monkeypatch.undo()
    assert load_run(tmp_path / "run").summary == {}
    assert_same(train(fields, out=tmp_path / "run"), reference)


def test_a_finished_run_can_be_made_longer(tmp_path):
    fields = SMALL | {"optimizer": "foof"}
    reference = train(fields, out=tmp_path / "reference", epochs=3)
    train(fields, out=tmp_path / "run", epochs=1)
    assert_same(train(fields, out=tmp_path / "run", epochs=3), reference)


def test_a_finished_run_is_not_run_again(tmp_path):
    fields = SMALL | {"optimizer": "foof", "out": tmp_path / "run"}
    first = train(fields)
    lines = []
    again = train(fields, say=lines.append)
    assert lines == [f"The run in {tmp_path / 'run'} is complete."]
    assert again.records == first.records
    assert again.summary == first.summary


def test_metrics_that_are_shorter_than_the_checkpoint_saw_are_refused(tmp_path):
    fields = SMALL | {"optimizer": "foof", "out": tmp_path / "run"}
    run = train(fields, epochs=1)
    (run.path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes where the checkpoint saw"):
        train(fields)


@pytest.fixture
def stopped(tmp_path):
    """A run with a checkpoint, and the fields that continue it."""
    run = train(SMALL, out=tmp_path / "run", quiet=True, epochs=1)
    return run, SMALL | {"out": run.path, "quiet": True, "epochs": 2}


@pytest.mark.parametrize("last", [8, pytest.param(80, marks=pytest.mark.soak)])
def test_no_flipped_byte_of_a_checkpoint_loads(stopped, last):
    run, fields = stopped
    path = run.path / "checkpoint.pt"
    whole = path.read_bytes()
    places = {*range(0, len(whole), 2 * len(whole) // last), *range(len(whole) - last, len(whole))}
    for place in sorted(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
            train(fields)
    path.write_bytes(whole)
    assert train(fields).complete


def test_a_checkpoint_without_a_checksum_loads(stopped, tmp_path):
    run, fields = stopped
    path = run.path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["sealed"]
    torch.save(state, path)
    reference = train(SMALL, out=tmp_path / "reference", quiet=True, epochs=2)
    assert_same(train(fields), reference)


@pytest.mark.parametrize("longest", [0, 3000])
def test_a_full_disk_is_told_with_the_path(tmp_path, longest):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(.*\); make room or give another path") as told:
            train(SMALL, out=tmp_path / "run", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "run") in str(told.value)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    fields = SMALL | {"optimizer": "foof", "out": tmp_path / "run"}
    run = train(fields, epochs=1)
    path = run.path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        train(fields)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed after a fork")
@pytest.mark.parametrize("optimizer", ["adam", pytest.param("kfac", marks=pytest.mark.soak)])
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, monkeypatch, optimizer):
    options = {"optimizer": optimizer, "optimizer_options": OPTIONS.get(optimizer, {})}
    fields = SMALL | options | {"epochs": 12, "checkpoint_every": 2}
    reference = train(fields, out=tmp_path / "reference")
    seed, steps, kills, longest = random.randrange(10**6), reference.summary["steps"], 8, 0.4
    chance, step = random.Random(seed), Session.step

    def work():
        return str(train(fields, out=tmp_path / "run").path)

    def slowly(session):  # the attempts together are shorter than the steps of one run
        time.sleep((kills + 0.5) * longest / steps)
        return step(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", slowly)
        ends = [forked(work, kill_after=chance.uniform(0, longest)) for _ in range(kills)]
    assert [end.how for end in ends] == ["killed"] * kills, f"seed {seed}: {ends}"
    end = forked(work)
    assert end.how == "done", f"seed {seed}: {end}"
    assert_same(load_run(tmp_path / "run"), reference)
    assert not list((tmp_path / "run").glob(".checkpoint.pt-*"))
