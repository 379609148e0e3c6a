"""Sweeps: what they try, that they go on where they were stopped, and how the best are shown."""

import importlib.util
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.trust.injection import forked
from fisherviz import plotting
from fisherviz.cli import app
from fisherviz.datasets import load
from fisherviz.results.run import load_run
from fisherviz.support.errors import OptionError
from fisherviz.training import sweep, train
from fisherviz.training.config import make_config
from fisherviz.training.diagnosis import StoppedRun
from fisherviz.training.optimizers import check_options
from fisherviz.training.run import Session
from fisherviz.training.space import Choices, Range, configure, grid, load_preset, make_space, presets
from fisherviz.training.study import drawn
from fisherviz.training.sweep import Sweep

pytest.importorskip("optuna")

SMALL = {
    "limit": 60, "epochs": 1, "batch_size": 30, "model_options": {"hidden": [4]}, "tensorboard": False,
    "optimizer": "foof",
}  # fmt: skip


def test_names_are_fields_or_options_of_the_optimizer():
    space = make_space({"lr": [0.1], "batch_size": [20, 50], "model_options.hidden": [[4], [8, 8]]})
    assert list(space) == ["optimizer_options.lr", "batch_size", "model_options.hidden"]
    config = configure(SMALL, space, {"optimizer_options.lr": 0.1, "batch_size": 50, "model_options.hidden": "[8, 8]"})
    assert (config.batch_size, config.optimizer_options, config.model_options) == (50, {"lr": 0.1}, {"hidden": [8, 8]})


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("1e-3..1e0", Range(1e-3, 1.0, True, False)),
        ("-1.0..2.5", Range(-1.0, 2.5, False, False)),
        ("10..200", Range(10, 200, False, True)),
        ({"low": 1, "high": 100, "log": True}, Range(1, 100, True, True)),
        ([1, 2], Choices((1, 2))),
        (3, Choices((3,))),
    ],
)
def test_values_are_lists_or_ranges(given, made):
    assert make_space({"lr": given}) == {"optimizer_options.lr": made}


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({}, "name what is varied"),
        ({"lr": [0.1, 0.1]}, "values that differ"),
        ({"lr": []}, "values that differ"),
        ({"lr": [1, 1.0]}, "values that differ"),
        ({"lr": [0.1, math.nan]}, "NaN is none"),
        ({"T": [1, True]}, "values that differ"),
        ({"model_options.hidden": [[4], "[4]"]}, "values that differ"),
        ({"lr": "1.0..0.1"}, "low < high"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "above 0 for log"),
        ({"lr": {"low": 0}}, "needs low and high"),
        ({"optimiser_options.lr": [1]}, "did you mean 'optimizer_options'"),
        ({"out": ["a"]}, "cannot be varied"),
        ({"learning": [1]}, "no option of foof 'learning'"),
        ({"epochs": [0, 1]}, "epochs: "),
        ({"damping": [1, -1]}, "optimizer_options: .*damping"),
        ({"damping": [1.0, 2.0], "lr": [0.1, -0.1]}, "optimizer_options: .*lr"),
        ({"lr": [0.1], "optimizer_options.lr": [0.2]}, "optimizer_options.lr is varied twice"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_runs(tmp_path, over, told):
    with pytest.raises(ValueError, match=told):
        sweep(SMALL, over, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"metric": "validation_acuracy"}, "metric: .*did you mean 'validation_accuracy'"),
        ({"metric": "validation_squared_error"}, "metric: it must be one of train_loss, train_accuracy"),
        ({"metric": "average_train_loss"}, "metric: "),
        ({"sampler": "sobol"}, "sampler: it must be one of grid, random, tpe"),
        ({"trials": 0}, "trials: it must be a positive whole number"),
        ({"over": {"seed": [0, 1]}, "seeds": 2}, "seed is varied and seeds asks for several too"),
        ({"base": SMALL | {"seed": 2**63 - 1}, "seeds": 2}, "seed: "),
    ],
)
def test_a_wrong_option_of_a_sweep_is_refused_before_anything_runs(tmp_path, options, told):
    given = {"base": SMALL, "over": {"lr": [0.1]}} | options
    with pytest.raises(OptionError, match=told):
        sweep(out=tmp_path / "sweep", **given)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, {"loss", "accuracy"}),
        ({"averaging": 0.9}, {"loss", "accuracy"}),
        ({"task": "autoencoder", "model": "shrestha-mlp"}, {"loss", "squared_error"}),
    ],
)
def test_the_metrics_that_are_offered_are_those_at_the_end_of_a_run(tmp_path, fields, names):
    config = make_config(SMALL, fields)
    final = train(config, out=tmp_path / "run", quiet=True).summary["final"]
    assert set(Session(config).metrics) == set(final) - {"step", "epoch", "examples"}
    assert {f"train_{name}" for name in names} <= set(final)


@pytest.mark.parametrize("name", presets())
def test_the_shipped_grids_fit_their_optimizers(name):
    preset = load_preset(name)
    space = make_space(preset["over"])
    for optimizer in {"benzing": ("foof", "kfac"), "benzing-sgd": ("sgd",), "benzing-adam": ("adam",)}[name]:
        for point in grid(space):
            config = configure({"optimizer": optimizer}, space, point)
            check_options(config.optimizer, config.optimizer_options)
    for value in space["optimizer_options.lr"].values:
        mantissa = value / 10 ** np.floor(np.log10(value) + 1e-9)
        assert round(float(mantissa), 6) in (1.0, 3.0)
    assert preset["metric"] == "train_loss"


def test_benzings_dampings_go_from_1e_minus_6_to_1e6_in_steps_of_100():
    values = make_space(load_preset("benzing")["over"])["optimizer_options.damping"].values
    np.testing.assert_allclose(values, 10.0 ** np.arange(-6, 7, 2))


def test_a_grid_tries_every_point_once_and_ranks_them(tmp_path):
    over = {"lr": [0.01, 0.3], "damping": [0.1, 1.0]}
    found = sweep(SMALL, over, out=tmp_path / "sweep")
    names = ["optimizer_options.lr", "optimizer_options.damping"]
    points = {tuple(p.values()) for p in grid(make_space(over))}
    assert set(found.table[names].itertuples(index=False, name=None)) == points
    assert len(found.table) == 4
    assert found.table["value"].is_monotonic_increasing
    row = found.table.iloc[0]
    options = {"lr": row[names[0]], "damping": row[names[1]]}
    alone = train(SMALL, optimizer_options=options, out=tmp_path / "alone", quiet=True)
    assert alone.summary["final"]["train_loss"] == row["value"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "sweep" / "runs.csv")[names], found.table[names])
    assert repr(found).startswith("Sweep(4 points, best train_loss ")


def test_a_point_is_judged_by_the_mean_of_its_seeds(tmp_path):
    found = sweep(SMALL, {"lr": [0.1]}, seeds=3, metric="validation_accuracy", out=tmp_path / "sweep")
    runs = [
        load_run(tmp_path / "sweep" / "runs" / found.table["run"][0].split("/")[-1] / f"seed-{s}") for s in range(3)
    ]
    values = [run.summary["final"]["validation_accuracy"] for run in runs]
    assert len(set(values)) > 1
    row = found.table.iloc[0]
    assert (row["value"], row["low"], row["high"]) == (pytest.approx(np.mean(values)), min(values), max(values))
    assert found.maximise


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("sampler", ["grid", pytest.param("random", marks=pytest.mark.soak), "tpe"])
def test_an_interrupted_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path, sampler):
    over = {"lr": [0.01, 0.1, 0.3, 1.0]} if sampler == "grid" else {"lr": "1e-3..1e0"}
    options = {"sampler": sampler, "trials": 4}
    fields = SMALL | {"defaults": "paper"}  # a bound on the step makes rates alike, and ties come in any order
    reference = sweep(fields, over, out=tmp_path / "reference", **options)
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        sweep(fields, over, out=tmp_path / "sweep", study="reference", say=say, **options)
    again = sweep(fields, over, out=tmp_path / "sweep", study="reference", say=lines.append, **options)
    drop = ["seconds", "run"]
    pd.testing.assert_frame_equal(again.table.drop(columns=drop), reference.table.drop(columns=drop))
    assert len(again.table) == 4
    assert len(lines) == 5  # the point that was interrupted at its end is told again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sweeps are killed in forks")
@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.soak)])
def test_a_killed_sweep_draws_the_points_of_one_that_was_not(tmp_path, sampler):
    options = {"sampler": sampler, "trials": 4, "study": "reference"}
    reference = sweep(SMALL, {"lr": "1e-3..1e0"}, out=tmp_path / "reference", **options)
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = forked(lambda: str(sweep(SMALL, {"lr": "1e-3..1e0"}, out=tmp_path / "sweep", say=say, **options)))
    assert killed.how == "killed"
    again = sweep(SMALL, {"lr": "1e-3..1e0"}, out=tmp_path / "sweep", **options)
    drop = ["seconds", "run"]
    pd.testing.assert_frame_equal(again.table.drop(columns=drop), reference.table.drop(columns=drop))


class Clock:
    """Time that passes by sleeping alone."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sweeps are killed in forks")
@pytest.mark.parametrize(("sampler", "claim"), [("grid", None), ("tpe", None), ("tpe", ["another machine", 1, 7])])
def test_a_worker_that_was_killed_before_a_sign_of_life_is_not_waited_for_without_end(
    tmp_path, monkeypatch, sampler, claim
):
    """Optuna takes over trials whose signs have ended, but never one without any; retried ones bear others' claims."""
    import optuna

    options = {"sampler": sampler, "trials": 2, "heartbeat": 2, "out": tmp_path / "sweep"}
    over = {"lr": [0.1, 0.3]} if sampler == "grid" else {"lr": "1e-3..1e0"}

    def begun(study, *given, **how):
        trial = study.ask()
        if claim:
            trial.set_user_attr("worker", claim)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        monkeypatch.setattr(optuna.Study, "optimize", begun)
        sweep(SMALL, over, **options)

    assert forked(killed).how == "killed"
    clock = Clock()
    monkeypatch.setattr("fisherviz.training.study.time", clock)
    assert len(sweep(SMALL, over, **options).table) == 2
    assert 6 <= clock.now <= 8


def test_a_trials_end_that_cannot_be_stored_is_told_by_its_cause(tmp_path, monkeypatch):
    import optuna
    from sqlalchemy.exc import OperationalError

    def full(*given, **how):
        raise OperationalError("UPDATE trials", {}, Exception("database or disk is full"))

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", full)
    with pytest.raises(RuntimeError, match=r"study\.db cannot be used \(.*database or disk is full\); make room there"):
        sweep(SMALL, {"lr": [0.1]}, sampler="tpe", trials=1, out=tmp_path / "sweep")


def test_random_points_are_log_uniform_and_hang_on_the_seed_alone():
    space = make_space({"lr": "1e-3..1e0"})
    logs = np.log10([point["optimizer_options.lr"] for point in drawn(space, 300, 0)])
    assert drawn(space, 3, 0) == drawn(space, 5, 0)[:3] != drawn(space, 3, 1)
    deviation = np.sqrt(3 * 3 / 12 / 300)
    assert logs.min() >= -3
    assert logs.max() <= 0
    assert abs(logs.mean() + 1.5) < 4.5 * deviation


def test_a_trial_that_another_worker_took_over_is_left_to_it(tmp_path):
    import optuna

    from fisherviz.training.study import default_storage

    url, lines = default_storage(tmp_path / "sweep"), []

    def say(line):  # as if this worker had been silent during its first trial
        lines.append(line)
        if len(lines) == 1:
            study = optuna.load_study(study_name="sweep", storage=url)
            (trial,) = (t for t in study.trials if t.state == optuna.trial.TrialState.RUNNING)
            study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)

    found = sweep(SMALL, {"lr": [0.1, 0.3]}, out=tmp_path / "sweep", say=say)
    assert sorted(found.table["optimizer_options.lr"]) == [0.1, 0.3]
    assert len(lines) == 3  # the point that was taken away is tried again


def test_another_sweep_in_the_same_study_is_refused(tmp_path):
    sweep(SMALL, {"lr": [0.1]}, out=tmp_path / "sweep")
    with pytest.raises(ValueError, match="the study 'sweep' is one with over="):
        sweep(SMALL, {"lr": [0.2]}, out=tmp_path / "sweep")


@pytest.mark.parametrize("names", [("loss", "accuracy"), ("a/b", "a b")])
def test_two_studies_in_one_folder_keep_a_table_each(tmp_path, names):
    """The second replaced the first's; they share the runs."""
    out = tmp_path / "sweep"
    studies = {None: "train_loss", names[0]: "validation_loss", names[1]: "validation_accuracy"}
    found = {name: sweep(SMALL, {"lr": [0.1, 0.3]}, metric=m, study=name, out=out) for name, m in studies.items()}
    assert found[None].files == (out / "runs.csv", out / "sweep.png")
    assert len({one.files for one in found.values()}) == 3
    for one in found.values():
        table, picture = one.files
        assert (table.parent, picture.parent) == (out, out)
        pd.testing.assert_series_equal(pd.read_csv(table)["value"], one.table["value"])
    assert len(list((out / "runs").iterdir())) == 2


def made_data():
    """A loader of one's own, whose examples change with the file that it reads."""
    whole = load("digits", limit=60)
    return whole if FACTOR == 1.0 else replace(whole, train=whole.train._replace(inputs=FACTOR * whole.train.inputs))


FACTOR = 1.0


def test_a_sweep_says_that_it_goes_on_with_other_data(tmp_path, monkeypatch):
    """Points that were finished before were ranked beside those of the new data."""
    fields = {key: value for key, value in SMALL.items() if key != "limit"} | {"dataset": f"{__name__}:made_data"}
    sweep(fields, {"lr": [0.1]}, out=tmp_path / "sweep")
    assert len(sweep(fields, {"lr": [0.1]}, out=tmp_path / "sweep").table) == 1
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    with pytest.warns(UserWarning, match="the study 'sweep' was begun with other data") as told:
        sweep(fields, {"lr": [0.1]}, out=tmp_path / "sweep")
    assert [each.filename for each in told] == [__file__]


def test_a_study_that_was_begun_without_a_fingerprint_goes_on(tmp_path):
    import optuna

    from fisherviz.training.study import ATTRIBUTE, default_storage

    first = sweep(SMALL, {"lr": [0.1]}, out=tmp_path / "sweep")
    study = optuna.load_study(study_name="sweep", storage=default_storage(tmp_path / "sweep"))
    study.set_user_attr(ATTRIBUTE, {k: v for k, v in study.user_attrs[ATTRIBUTE].items() if k != "data"})
    again = sweep(SMALL, {"lr": [0.1]}, out=tmp_path / "sweep")
    pd.testing.assert_frame_equal(first.table, again.table)


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc/self/fd")
def test_a_sweep_that_has_ended_or_was_refused_has_no_file_open(tmp_path):
    def opened():
        descriptors = [each for each in Path("/proc/self/fd").iterdir() if os.path.lexists(each)]
        return [path for path in map(os.readlink, descriptors) if path.startswith(str(tmp_path.resolve()))]

    meanwhile = []
    sweep(SMALL, {"lr": [0.1]}, out=tmp_path / "sweep", say=lambda line: meanwhile.extend(opened()))
    assert any("study.db" in path for path in meanwhile)
    assert opened() == []
    with pytest.raises(ValueError, match="is one with over="):
        sweep(SMALL, {"lr": [0.2]}, out=tmp_path / "sweep")
    assert opened() == []


def test_runs_that_stop_are_last_and_say_so(tmp_path):
    fields = SMALL | {
        "model": "shrestha-mlp", "task": "autoencoder", "likelihood": "gaussian", "optimizer": "sgd", "epochs": 20,
    }  # fmt: skip
    found = sweep(fields, {"lr": [1e4, 1e-4]}, out=tmp_path / "sweep")
    assert found.table["optimizer_options.lr"].tolist() == [1e-4, 1e4]
    assert found.table["value"].tolist()[1] == np.inf
    assert "step" in found.table["stopped"][1]
    assert plotting.sweep_info(found).stopped == 1


class LosesSeedOne(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)

    def step(self, closure):
        loss = super().step(closure)
        if torch.initial_seed() == 1:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
        return loss


@pytest.mark.parametrize("metric", ["train_loss", "train_accuracy"])
def test_a_seed_that_stops_says_nothing_of_the_others(tmp_path, metric):
    fields = SMALL | {"optimizer": f"{__name__}:LosesSeedOne"}
    row = sweep(fields, {"lr": [0.1]}, seeds=3, metric=metric, out=tmp_path / "sweep").table.iloc[0]
    ended = [train(fields, seed=s, optimizer_options={"lr": 0.1}, out=tmp_path / f"{s}", quiet=True) for s in (0, 2)]
    values = [run.summary["final"][metric] for run in ended]
    if metric == "train_loss":
        assert (row["value"], row["low"], row["high"]) == (math.inf, min(values), math.inf)
    else:
        assert (row["value"], row["low"], row["high"]) == (-math.inf, -math.inf, max(values))
    assert "is not finite" in row["stopped"]


def test_where_every_point_diverges_none_is_the_best(tmp_path):
    fields = SMALL | {"optimizer": f"{__name__}:LosesSeedOne", "seed": 1}
    found = sweep(fields, {"lr": [0.1, 0.3]}, out=tmp_path / "sweep")
    assert len(found.table) == 2
    assert found.best == {}
    assert repr(found) == "Sweep(2 points, train_loss finite at none)"


def test_what_was_varied_keeps_its_values(tmp_path):
    over = {"evaluate_limit": [10, None], "model_options.hidden": [[4], [8, 8]], "defaults": ["training"]}
    found = sweep(SMALL, over, out=tmp_path / "sweep")
    points = {(limit, json.dumps(hidden)) for limit in (10, None) for hidden in ([4], [8, 8])}
    table = found.table[["evaluate_limit", "model_options.hidden"]]
    assert set(table.itertuples(index=False, name=None)) == points
    assert {type(limit) for limit in table["evaluate_limit"]} == {int, type(None)}
    best = make_config(SMALL, configure(SMALL, {}, {}).plain(), {
        "evaluate_limit": found.best["evaluate_limit"], "model_options": {"hidden": found.best["model_options.hidden"]},
    })  # fmt: skip
    alone = train(best, out=tmp_path / "alone", quiet=True)
    assert alone.summary["final"]["train_loss"] == found.table["value"].iloc[0]
    lines = plotting.sweep_info(found).lines
    assert {(label, *sorted(map(str, x))) for label, (x, *_) in lines.items()} == {
        ("hidden [4]", "10", "None"), ("hidden [8, 8]", "10", "None"),
    }  # fmt: skip


class Broken(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)

    def step(self, closure):
        if self.param_groups[0]["lr"] == 0.5:
            raise RuntimeError("a mistake")
        return super().step(closure)


def test_an_error_at_a_point_is_not_a_bad_value_but_ends_the_sweep(tmp_path):
    with pytest.raises(StoppedRun, match=r"step 1 .*a mistake"):
        sweep(SMALL | {"optimizer": f"{__name__}:Broken"}, {"lr": [0.1, 0.5]}, out=tmp_path / "sweep")


def test_a_storage_that_cannot_be_used_is_named_without_its_password(tmp_path):
    if not (importlib.util.find_spec("psycopg") or importlib.util.find_spec("psycopg2")):
        pytest.skip("there is no PostgreSQL driver")
    with pytest.raises(ValueError, match=r"^storage: 127\.0\.0\.1:1/none cannot be used") as told:
        sweep(SMALL, {"lr": [0.1]}, out=tmp_path / "s", storage="postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(told.value)


def test_a_picture_has_a_line_per_value_of_the_second_thing():
    table = pd.DataFrame(
        {"value": [1.0, 2.0, 3.0, 4.0], "low": [1.0, 2.0, 3.0, 3.5], "high": [1.0, 2.0, 3.0, 4.5],
         "optimizer_options.lr": [0.1, 0.1, 1.0, 10.0], "optimizer_options.damping": [1.0, 2.0, 1.0, 1.0],
         "seconds": 1.0, "stopped": "", "run": "x"}
    )  # fmt: skip
    ax = plotting.sweep(Sweep(None, "train_loss", False, table))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}
    assert lines == {"damping 1": ([0.1, 1.0, 10.0], [1.0, 3.0, 4.0]), "damping 2": ([0.1], [2.0])}
    assert ax.get_xlabel() == "lr"
    assert ax.get_xscale() == "log"


@pytest.mark.parametrize("values", [(1.0, 1.000000001), (None, 10), (None, "a"), (True, False), (None, 0.1, "auto")])
def test_a_picture_has_every_point_whatever_the_values(values):
    rows = [(lr, value) for lr in (0.1, 1.0) for value in values]
    table = pd.DataFrame(
        {"value": np.arange(1.0, len(rows) + 1), "optimizer_options.lr": [lr for lr, _ in rows],
         "x": pd.Series([value for _, value in rows], dtype=object), "seconds": 1.0, "stopped": "", "run": "x"}
    )  # fmt: skip
    table["low"] = table["high"] = table["value"]
    for shown in (table, table.drop(columns="optimizer_options.lr").iloc[: len(values)]):
        info = plotting.sweep_info(Sweep(None, "train_loss", False, shown))
        drawn = np.concatenate([y for _, y, _, _ in info.lines.values()])
        assert sorted(drawn) == shown["value"].tolist()
        assert all(len(set(x)) == len(x) for x, *_ in info.lines.values())
        plotting.sweep(Sweep(None, "train_loss", False, shown))


def test_the_command_writes_table_and_picture(tmp_path):
    done = CliRunner().invoke(
        app,
        ["sweep", "--limit", "60", "--epochs", "1", "--optimizer", "adam", "--over", "lr=[1e-3,1e-2]", "-M",
         "hidden=[4]", "--no-tensorboard", "--out", str(tmp_path / "sweep")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "best of 2 by train_loss" in done.output
    assert len(pd.read_csv(tmp_path / "sweep" / "runs.csv")) == 2
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["sweep", "--over", "lrr=[1]", "--out", str(tmp_path / "other")])
    assert wrong.exit_code == 2
    assert "did you mean 'lr'" in wrong.output
    given = CliRunner().invoke(app, ["sweep", "--over", "lr=[1]", "-O", "lr=2", "--out", str(tmp_path / "other")])
    assert "optimizer_options.lr is varied, and given by a flag as well" in " ".join(given.output.split())
    twice = CliRunner().invoke(app, ["sweep", "--over", "lr=[1]", "--over", "lr=[2]", "--out", str(tmp_path / "other")])
    assert twice.exit_code == 2
    assert "--over: lr is given twice" in twice.output
    assert not (tmp_path / "other").exists()
