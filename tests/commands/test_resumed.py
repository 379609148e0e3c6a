"""A report that was killed and is started again measures nothing twice, and is the report of a process that was not."""

import json
import os
import random
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.trust.injection import forked
from fisherviz.approximations import approximations
from fisherviz.commands import report as reporting
from fisherviz.commands.job import Job
from fisherviz.comparison import keeping
from fisherviz.comparison.dense import DenseComparison
from fisherviz.comparison.keeping import Measured
from fisherviz.results.comparison import load_comparison
from fisherviz.support import versions
from fisherviz.support.pieces import PLACE, START, Pieces
from fisherviz.support.sealing import read_sealed, seal, unseal
from tests.pages import undrawn

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="reports are killed in forks")

MODULE = """
import os
import torch
from torch import nn
import fisherviz as fv

class Own(fv.Approximation):
    def statistics(self, layer):
        return {"d": fv.statistics.Diagonal(layer.name)}
    def operator_for(self, layer, values):
        return fv.operators.Diagonal(values["d"])

fv.register("own", Own)

class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * float(os.environ.get("FACTOR", "1"))

def build():
    torch.manual_seed(0)
    net = Net(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].bias += float(os.environ.get("SHIFT", "0"))
    return net

def batches():
    draws = torch.Generator().manual_seed(int(os.environ.get("DRAWN", "1")))
    return torch.randn(9, 4, generator=draws).double(), torch.randint(2, (9,), generator=draws)
"""
METHODS = ("kfac", "own", "foof", "diagonal")
LAYERS = ("0", "2")
PIECES = [f"method {name}" for name in METHODS] + ["all layers jointly"] + [f"layer {name}" for name in LAYERS]
"""In the order in which they are finished."""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """It registers an approximation when it is imported; afterwards that is gone."""
    path = tmp_path_factory.mktemp("nets") / "resumed_nets.py"
    path.write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximations, "_classes", dict(approximations._classes))
        yield path


def job_of(module, out):
    return Job(
        model=f"{module}:build", data=f"{module}:batches", methods=METHODS, kind="mc", out=out, quiet=True,
        metrics=("relative_frobenius", "direction_cosine", "kl", "off_unit_share", "passes", "bytes"),
    )  # fmt: skip


@pytest.fixture
def job(module, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    return job_of(module, tmp_path / "report")


@pytest.fixture(scope="module")
def whole(module, tmp_path_factory):
    """The state of a report that nobody has interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        return state_of(reported(job_of(module, tmp_path_factory.mktemp("whole") / "report")))


def reported(job, kill_at=0, say=lambda line: None):
    """Report, but be killed once so many pieces are kept."""
    kept = 0
    once = Pieces.keep

    def keep(pieces, name, state):
        nonlocal kept
        once(pieces, name, state)
        kept += 1
        if kept == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pieces, "keep", keep)
        reporting.run(job, say)
    return job.out


def killed(job, kill_at):
    assert forked(lambda: str(reported(job, kill_at))).how == "killed"


def again(job):
    """Start it again: what was said, the state of the report, methods measured by section, runs of the network."""
    said, measured, runs = [], [], 0
    rows = DenseComparison.rows

    def counted(self, label, *rest):
        measured.append((len(self.space.layers), label))
        return rows(self, label, *rest)

    def forward(model, *rest):
        nonlocal runs
        runs += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseComparison, "rows", counted)
        handle = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda model, *rest: forward(model) if type(model).__name__ == "Net" else None
        )
        try:
            reported(job, say=said.append)
        finally:
            handle.remove()
    return said, state_of(job.out), measured, runs


def state_of(folder):
    """All that a report holds, but for what the clock says and where it is."""
    found = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))]
    for part in ("", "layers"):
        one = load_comparison(folder / part)
        timed = one.frame["metric"] == "seconds"
        one.frame.loc[timed, ["value", "stderr"]] = 0.0
        clock = ("created", "command", "forward_backward_seconds", "fits_timed")
        facts = {key: value for key, value in one.meta.items() if key not in clock}
        arrays = {name: array.tobytes().hex() for name, array in one.arrays.items()}
        found.append([one.frame.to_csv(float_format="%.17g"), json.dumps(facts), arrays])
    return found


@pytest.mark.parametrize(
    "kill_at", [pytest.param(k, marks=[pytest.mark.soak] * (k not in (2, 6))) for k in range(1, len(PIECES) + 1)]
)
def test_what_is_finished_is_not_measured_again_and_the_report_is_the_same(job, whole, kill_at):
    killed(job, kill_at)
    left = {read_sealed(path)["name"] for path in (job.out / PLACE).glob("*.pt") if path.name != START}
    joined = kill_at > len(METHODS) + 1
    assert left == set(PIECES[len(METHODS) * joined : kill_at])
    said, state, measured, _ = again(job)
    assert state == whole
    assert [label for layers, label in measured if layers == 2] == list(METHODS)[kill_at:]
    assert sum(layers == 1 for layers, _ in measured) == len(METHODS) * (len(LAYERS) - max(0, kill_at - 5))
    methods = min(kill_at, len(METHODS))
    assert sum(f"{methods} of 4 methods taken from the interrupted report" in line for line in said) == 1
    layers = f"{kill_at - 5} of 2 layers taken from the interrupted report."
    assert (layers in said) == (kill_at > 5)


@pytest.mark.soak
def test_a_report_that_goes_on_runs_the_network_less(job, whole):
    _, state, measured, all_runs = again(job)
    assert state == whole
    assert len(measured) == len(METHODS) * (1 + len(LAYERS))
    runs = []
    for kill_at in (5, 6, 7):
        killed(job, kill_at)
        runs.append(again(job)[3])
    assert all_runs > runs[0] > runs[1] > runs[2]


def test_a_report_may_be_killed_twice_and_a_finished_one_is_made_anew(job, whole):
    killed(job, 2)
    killed(job, 1)  # the third of all
    said, state, measured, runs = again(job)
    assert (state, len(measured)) == (whole, 1 + 4 * 2)
    assert "3 of 4 methods taken from the interrupted report." in said
    said, state, measured, all_runs = again(job)
    assert (state, len(measured)) == (whole, 4 * 3)
    assert not any("taken from the interrupted" in line for line in said)
    assert runs < all_runs  # forward passes


def test_numbers_alone_go_on_too(job, tmp_path):
    job = job.model_copy(update={"compare_only": True})
    reported(job)
    before = load_comparison(job.out)
    killed(job, 3)
    assert load_comparison(job.out).frame.equals(before.frame)  # the old result stays until the new one is whole
    found = reported(job)
    keep = before.frame["metric"] != "seconds"
    assert load_comparison(found).frame[keep].equals(before.frame[keep])
    assert not (found / PLACE).exists()


@pytest.mark.soak
def test_the_pieces_are_gone_with_the_page(module, tmp_path):
    job = job_of(module, tmp_path / "report").model_copy(update={"metrics": None})
    killed(job, 5)
    again(job)
    assert "kfac" in (job.out / "index.html").read_text()
    assert not (job.out / PLACE).exists()


# ---- what is not used


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SHIFT": "1"}, r"weights \([0-9a-f]{16} before and [0-9a-f]{16} now\)"),
        ({"DRAWN": "2"}, r"data \([0-9a-f]{16} before and [0-9a-f]{16} now\)"),
        ({"FACTOR": "2"}, "outputs of the network"),
        ({"damping": 0.5}, r"configuration \(damping none before and 0.5 now\)"),
        ({"seed": 3}, r"configuration \(seed of labels \d+ before and \d+ now, seed 0 before and 3 now\)"),
        ({"methods": ("kfac", "own")}, r"configuration \(methods \['kfac', 'own', 'foof', 'diagonal'\] before and "),
        ({"version": "99.0"}, r"version \(fisherviz \S+ before and 99.0 now\)"),
        ({"code": "other"}, r"version \(code of fisherviz \w+ before and other now\)"),
    ],
)
def test_what_is_left_of_other_work_is_told_and_not_used(job, monkeypatch, change, named):
    killed(job, 1)
    for name, value in change.items():
        if name.isupper():
            monkeypatch.setenv(name, value)
        elif name == "version":
            monkeypatch.setattr(versions, "__version__", value)
        elif name == "code":
            monkeypatch.setattr(keeping, "code", value.lower)
        else:
            job = job.model_copy(update={name: value})
    said = begun(job)
    (told,) = [line for line in said if "is not used and measured anew" in line]
    assert re.search(rf"since something is another now: {named}", told), told
    assert not (job.out / PLACE).exists()


def begun(job):
    """What is said before anything is measured."""
    said = []

    def stop(*rest, **options):
        raise ValueError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "compare_in", stop)
        patch.setattr(reporting, "compare", lambda *rest, **options: SimpleNamespace(verdict=""))
        with pytest.raises(ValueError, match="stopped"):
            reporting.run(job, said.append)
    return said


def test_pieces_of_other_weights_leave_no_trace(job, monkeypatch):
    killed(job, 5)
    monkeypatch.setenv("SHIFT", "1")
    said, state, measured, _ = again(job)
    assert len(measured) == 4 * 3
    assert not any("taken from the interrupted" in line for line in said)
    assert state == state_of(reported(job.model_copy(update={"out": job.out.parent / "other"})))


def test_a_method_whose_own_code_was_changed_is_measured_anew(job, module, tmp_path, monkeypatch):
    monkeypatch.setattr(approximations, "_classes", dict(approximations._classes))
    other = tmp_path / "changed_nets.py"
    other.write_text(MODULE)
    job = job.model_copy(update={"model": f"{other}:build"})
    killed(job, 2)
    other.write_text(MODULE.replace('values["d"])', '2 * values["d"])'))
    assert any("configuration (method own " in line for line in begun(job))


@pytest.mark.soak
@pytest.mark.parametrize("piece", [START, *PIECES[:2], PIECES[5]])
@pytest.mark.parametrize("how", ["flipped", "cut", "another's"])
def test_a_damaged_piece_is_named_and_measured_anew(job, whole, piece, how):
    killed(job, 6 if piece == PIECES[5] else 4)
    names = {read_sealed(path).get("name", START): path for path in (job.out / PLACE).glob("*.pt")}
    path = names[piece]
    content = path.read_bytes()
    if how == "flipped":
        place = random.Random(piece).randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:  # whole, but not what its name says
        path.write_bytes(seal({"name": piece, "of": "another", "identity": 1}))
    said, state, measured, _ = again(job)
    assert state == whole
    assert any(str(path) in line and "measured anew" in line for line in said), said
    alone = 4 * len(LAYERS) - (4 if piece != PIECES[5] and len(names) > 5 else 0)
    assert len(measured) == alone + {START: 4, PIECES[5]: 0}.get(piece, 1)


def test_no_byte_of_a_piece_can_be_another(tmp_path):
    with Pieces(tmp_path, {"weights": "a"}, "work") as pieces:
        pieces.keep("one", {"values": [1.5, "text"]})
    (path,) = [path for path in (tmp_path / PLACE).iterdir() if path.name != START]
    content = path.read_bytes()
    for place in range(0, len(content), 41):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        said = []
        with Pieces(tmp_path, {"weights": "a"}, "work", say=said.append) as pieces:
            assert pieces.found("one", dict) is None, place
        assert len(said) == 1
        assert str(path) in said[0]
        with Pieces(tmp_path, {"weights": "a"}, "work") as pieces:
            pieces.keep("one", {"values": [1.5, "text"]})
        content = path.read_bytes()


MEASURED = Measured([("kfac", "all", "all", "kl", 1.0, 0.0)], None, ["a note"], {"x": np.ones(2)}, [], [0.5], "dense")


def test_a_piece_that_is_kept_is_what_was_measured():
    found = Measured.of_state(unseal(seal(MEASURED.to_state())))
    assert (found.rows, found.notes, found.seconds, found.way) == (MEASURED.rows, ["a note"], [0.5], "dense")
    assert np.array_equal(found.arrays["x"], MEASURED.arrays["x"])


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [("kfac", "all", "all", "kl", "much", 0.0)]}, {"rows": 3}, {"rows": [3]}, {"rows": None},
        {"notes": [1]}, {"arrays": [1]}, {"arrays": {"x": 1}}, {"seconds": ["a"]}, {"way": None}, {"remarks": "a"},
    ],
)  # fmt: skip
def test_a_piece_that_is_no_measurement_is_not_used(tmp_path, change):
    said = []
    with Pieces(tmp_path, {"weights": "a"}, "work") as pieces:
        pieces.keep("one", MEASURED.to_state() | change)
    with Pieces(tmp_path, {"weights": "a"}, "work", say=said.append) as pieces:
        assert pieces.found("one", Measured.of_state) is None
    assert [line for line in said if "is damaged" in line] == said != []


# ---- the folder


def test_a_second_process_is_refused_while_one_is_at_work(job):
    with (
        Pieces(job.out, {"weights": "a"}, "report"),
        pytest.raises(RuntimeError, match="another process is at work on"),
    ):
        reported(job)
    assert not job.out.exists()


def test_nothing_is_left_of_a_report_that_fails_before_it_has_measured(job, monkeypatch):
    def fails(*rest, **options):
        raise ValueError("nothing of it can be measured.")

    monkeypatch.setattr(reporting, "compare_in", fails)
    with pytest.raises(ValueError, match="nothing of it"):
        reported(job)
    assert not job.out.exists()
    job.out.mkdir()
    (job.out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="nothing of it"):
        reported(job)
    assert [path.name for path in job.out.iterdir()] == ["mine.txt"]


def test_a_process_that_was_killed_before_the_first_piece_leaves_nothing_to_tell(tmp_path):
    with Pieces(tmp_path, {"weights": "a"}, "work") as pieces:
        pieces.keep("one", {})
        for path in (tmp_path / PLACE).iterdir():
            path.rename(path.with_name(f".{path.name}-0123456789ab"))  # as a write that was not finished
    said = []
    with Pieces(tmp_path, {"weights": "a"}, "work", say=said.append) as pieces:
        assert pieces.found("one", dict) is None
    assert said == []
    assert not (tmp_path / PLACE).exists()


def test_a_link_in_the_place_of_the_pieces_is_refused(job, tmp_path):
    job.out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (job.out / PLACE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link, which no report leaves"):
        reported(job)


@pytest.mark.soak
def test_where_memory_allows_another_way_methods_are_measured_anew(job, whole):
    killed(job, 2)
    (path,) = (job.out / PLACE).glob("method-own*.pt")
    state = {key: value for key, value in read_sealed(path).items() if key != "sealed"}
    path.write_bytes(seal(state | {"way": "StructuredComparison"}))
    said, state, measured, _ = again(job)
    assert (state, len(measured)) == (whole, 3 + 4 * 2)
    assert any(line.startswith("own: what is finished is not used") for line in said)


@pytest.mark.soak
def test_killed_at_random_moments_it_comes_to_the_same_report(job, whole, monkeypatch):
    chance = random.Random(20261130)
    longest = forked(lambda: str(reported(job.model_copy(update={"out": job.out.parent / "timed"})))).seconds
    for _ in range(60):
        ends = [forked(lambda: str(reported(job)), kill_after=chance.uniform(0, longest)) for _ in range(3)]
        assert {end.how for end in ends} <= {"killed", "done"}, ends
        said, state, _, _ = again(job)
        assert state == whole
        assert not any("damaged" in line for line in said)


def test_pieces_of_one_name_are_replaced_and_others_told_apart(tmp_path):
    with Pieces(tmp_path, {"weights": "a"}, "work") as pieces:
        for name in ("a/b", "a.b", "a b", "A b", "ä", ""):
            pieces.keep(name, {"is": [name]})
        pieces.keep("ä", {"is": ["ä", "again"]})
    with Pieces(tmp_path, {"weights": "a"}, "work") as pieces:
        assert [pieces.found(name, lambda state: state["is"]) for name in ("a/b", "A b", "", "ä", "b")] == [
            ["a/b"], ["A b"], [""], ["ä", "again"], None,
        ]  # fmt: skip
        pieces.commit({"result.txt": "whole"})
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]
