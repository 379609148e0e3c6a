"""What is damaged in a run's or a sweep's folder is named; what a continued run differs in is named, too."""

import importlib
import shutil
import sqlite3
import sys

import pandas as pd
import pytest
import torch

from fisherviz.support import versions
from fisherviz.training import continuing, load_run, sweep, train
from fisherviz.training.run import Session

SMALL = {
    "limit": 60, "batch_size": 20, "optimizer": "adam", "model_options": {"hidden": [4]}, "quiet": True,
    "tensorboard": False, "checkpoint_every": 2,
}  # fmt: skip
MODULE = """
from torch import nn
def build(width={width}):
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
"""


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of half its epochs."""
    return train(SMALL, out=tmp_path_factory.mktemp("half") / "run", epochs=1).path


@pytest.fixture
def run(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def flipped(path, place):
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_a_number_that_was_flipped_is_not_read(run, name):
    text = (run / name).read_bytes()
    for place in [i for i, byte in enumerate(text) if chr(byte).isdigit()][::7]:
        flipped(run / name, place)
        with pytest.raises(ValueError, match=rf"holds a damaged training run: {name}"):
            load_run(run)
        (run / name).write_bytes(text)
    assert load_run(run).complete


def test_metrics_that_lost_whole_lines_are_refused_after_the_runs_end(run):
    path = run / "metrics.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:2]) + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 2 whole lines where it had \d+ at the run's end"):
        load_run(run)


def test_a_run_does_not_go_on_with_metrics_that_its_checkpoint_did_not_see(run):
    before = (run / "metrics.jsonl").read_bytes()
    flipped(run / "metrics.jsonl", before.index(b"0."))
    damaged = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: its first \d+ bytes are not those"):
        train(SMALL, out=run, epochs=2)
    assert (run / "metrics.jsonl").read_bytes() == damaged  # and nothing of it is cut off


# Fingerprints


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"optimizer_options": {"lr": 0.5}}, r"out: .* holds a run with optimizer_options=\{\}, not \{'lr': 0.5\}"),
        ({"seed": 3}, "out: .* holds a run with seed=0, not 3"),
        ({"limit": 61}, "out: .* holds a run with limit=60, not 61"),
    ],
)
def test_another_configuration_is_named_by_its_field(run, fields, told):
    with pytest.raises(ValueError, match=told):
        train(SMALL, out=run, epochs=2, **fields)


def test_other_data_under_the_same_name_are_named(run, monkeypatch):
    once = Session.__init__

    def other(session, *given, **options):
        once(session, *given, **options)
        session.dataset.__dict__["fingerprint"] = "0" * 16

    monkeypatch.setattr(Session, "__init__", other)
    with pytest.raises(ValueError, match=r"dataset: the examples of digits are not those that the run in .*run was"):
        train(SMALL, out=run, epochs=2)


def test_another_network_under_the_same_name_is_named_with_the_weight(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    fields = {k: v for k, v in SMALL.items() if k != "model_options"} | {"model": "theirs:build"}
    for width in (3, 4):
        (tmp_path / "theirs.py").write_text(MODULE.format(width=width))
        sys.modules.pop("theirs", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        if width == 3:
            train(fields, out=tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"model: theirs:build does not make the network .*'0.bias' has the shapes"):
        train(fields, out=tmp_path / "run", epochs=2)


def test_another_version_is_named_and_noted(run, monkeypatch):
    lines = []
    monkeypatch.setattr(versions, "__version__", "99.0")
    found = train(SMALL, out=run, epochs=2, say=lines.append)
    assert any("may differ from an uninterrupted run's: fisherviz" in line and "and 99.0 now" in line for line in lines)
    assert found.summary["moves"][0]["fisherviz"][1] == "99.0"
    assert load_run(run).summary["versions"]["fisherviz"] == "99.0"


# Sweeps


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    return sweep(SMALL | {"epochs": 1}, {"lr": [0.01, 0.1]}, out=folder)


def again(found, folder):
    shutil.copytree(found.path, folder)
    return lambda: sweep(SMALL | {"epochs": 1}, {"lr": [0.01, 0.1]}, out=folder, study="sweep")


def test_a_trial_that_is_not_what_was_written_is_refused_and_the_runs_give_it_again(swept, tmp_path):
    go_on = again(swept, tmp_path / "sweep")
    path = tmp_path / "sweep" / "study.db"
    connection = sqlite3.connect(path)
    connection.execute("UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 1")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match=r"study.db is damaged \(trial 0 is not what was written\); remove it, and"):
        go_on()
    path.unlink()
    drop = ["seconds", "run"]
    pd.testing.assert_frame_equal(go_on().table.drop(columns=drop), swept.table.drop(columns=drop))


def test_a_study_whose_pages_are_damaged_is_refused_by_name(swept, tmp_path):
    go_on = again(swept, tmp_path / "sweep")
    path = tmp_path / "sweep" / "study.db"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100] + b"\xff" * 3000 + whole[3100:], b"nothing of SQLite's"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"storage: .*study.db"):
            go_on()


def test_an_error_at_a_point_is_told_once(tmp_path, monkeypatch, capfd):
    def full(session):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Session, "save", full)
    with pytest.raises(OSError, match="No space left"):
        sweep(SMALL | {"epochs": 1}, {"lr": [0.1]}, out=tmp_path / "sweep")
    assert "Traceback" not in capfd.readouterr().err


def test_weights_of_another_shape_are_told():
    ours, theirs = {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3), "b": torch.zeros(1)}
    assert continuing.differing(ours, theirs) == "the weight 'a' has the shapes (2,) and (3,)"
    assert continuing.differing(ours, {"b": torch.zeros(1)}) == "the weight 'a' is in one of them only"
    assert continuing.differing(ours, ours) == ""
