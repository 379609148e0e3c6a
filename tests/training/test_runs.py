"""What a run writes, what it says when it cannot go on, and that it leaves the process as it was."""

import json
import math
from itertools import pairwise

import pytest
import torch
import yaml

from fisherviz.training import NonFiniteLoss, load_run, train
from fisherviz.training.folder import Folder

SMALL = {
    "limit": 200,
    "epochs": 2,
    "batch_size": 60,
    "quiet": True,
    "model_options": {"hidden": [8]},
    "tensorboard": False,
}


def small(tmp_path, **fields):
    return train(SMALL | {"optimizer": "foof", "out": tmp_path / "run"}, **fields)


def test_metrics_hold_every_step_and_epoch(tmp_path):
    run = small(tmp_path)
    steps, epochs = run.frame("step"), run.frame("epoch")
    assert steps["step"].tolist() == list(range(1, 9))  # 4 steps an epoch, the last with 20 examples
    assert steps["batch"].tolist() == [60, 60, 60, 20] * 2
    assert epochs["epoch"].tolist() == [0, 1, 2]
    assert epochs["examples"].tolist() == [0, 200, 400]
    for column in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        assert epochs[column].notna().all()
    mean = (steps["loss"] * steps["batch"])[4:].sum() / 200
    assert epochs["running_loss"].iloc[2] == pytest.approx(mean, rel=1e-12)


def test_evaluations_are_those_of_the_network(tmp_path):
    from fisherviz import datasets, models

    run = small(tmp_path)
    data = datasets.load("digits", limit=200)
    model = models.build("kfac-mlp", dataset=data, hidden=[8])
    model.load_state_dict(torch.load(run.path / "checkpoint.pt", weights_only=True)["model"])
    with torch.no_grad():
        z = model(data.test.inputs)
    final = run.summary["final"]
    assert final["validation_accuracy"] == pytest.approx((z.argmax(1) == data.test.targets).double().mean().item())
    loss = torch.nn.functional.cross_entropy(z, data.test.targets).item()
    assert final["validation_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["foof", "kfac", "ekfac", "tengrad", "subsampled", "kbfgs", "hessian-free", "ksd", "sgd"]
)
def test_a_steps_time_is_split_into_parts_that_do_not_overlap(tmp_path, optimizer):
    parts = ["forward", "backward", "step"]
    if optimizer != "sgd":
        parts.append("statistics")
    if optimizer not in ("sgd", "kbfgs"):  # whose inverses are updated, never made
        parts.append("inversion")
    steps = train(SMALL, optimizer=optimizer, epochs=1, out=tmp_path / "run").frame("step")
    assert (steps[[f"seconds_{part}" for part in parts]].sum() > 0).all()
    assert {c.removeprefix("seconds_") for c in steps if c.startswith("seconds_")} == {*parts, "total"}
    total = steps["seconds_total"].diff().iloc[1:]
    assert (steps[[f"seconds_{part}" for part in parts]].iloc[1:].sum(axis=1) <= total).all()


def test_the_summary_says_how_it_ended(tmp_path):
    run = small(tmp_path)
    assert run.complete
    assert run.summary["steps"] == 8
    assert run.summary["config"] == run.config
    assert run.summary["best"]["train_loss"] == run.frame()["train_loss"].min()
    assert run.summary["optimizer_options"] == {}
    assert yaml.safe_load((run.path / "config.yaml").read_text())["optimizer"] == "foof"


def test_losses_fall_under_every_baseline(tmp_path):
    for optimizer in ("nesterov", "adam", "lbfgs", "sgd"):
        options = {"lr": 0.1} if optimizer == "sgd" else {}
        frame = train(SMALL, optimizer=optimizer, optimizer_options=options, out=tmp_path / optimizer).frame()
        assert frame["train_loss"].iloc[-1] < 0.99 * frame["train_loss"].iloc[0]


def test_regressions_and_autoencoders_report_squared_errors(tmp_path):
    auto = train(SMALL, optimizer="adam", task="autoencoder", model="shrestha-mlp", out=tmp_path / "auto", epochs=1)
    assert auto.frame()["train_squared_error"].iloc[-1] < 64
    assert "train_accuracy" not in auto.frame()


def test_growing_batches_and_the_averaged_iterate_are_options(tmp_path):
    run = small(tmp_path, batch_size=20, batch_full_at=5, epochs=6, averaging=0.5)
    steps = run.frame("step")
    assert steps["batch"].tolist()[:6] == [20, 36, 63, 112, 200, 200]
    ends = [now for before, now in pairwise([0.0, *steps["epoch"]]) if int(now) > int(before)]
    assert run.frame()["epoch"].tolist() == [0.0, *ends]  # each is evaluated, though none ends with a batch
    epochs = run.frame()
    assert epochs["average_train_loss"].iloc[0] == epochs["train_loss"].iloc[0]
    assert epochs["average_train_loss"].iloc[-1] != epochs["train_loss"].iloc[-1]


def test_a_held_out_share_validates(tmp_path):
    run = small(tmp_path, holdout=0.25)
    assert run.frame()["examples"].iloc[-1] == 300


@pytest.mark.parametrize("options", [{"lr": 1e4}, {"lr": 1e4, "damping": 7.5}])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, options):
    damped = "damping" in options
    fields = {"optimizer": "foof" if damped else "sgd", "optimizer_options": options, "checkpoint_every": 1}
    fields |= {"defaults": "paper"}
    fields |= {"model": "shrestha-mlp", "task": "autoencoder", "likelihood": "gaussian", "epochs": 20}
    with pytest.raises(NonFiniteLoss, match=r"step \d+ \(epoch \d+\): layer 'layer\d'") as told:
        small(tmp_path, **fields)
    assert ("damping λ 7.5" if damped else "learning rate 10000") in str(told.value)
    run = load_run(tmp_path / "run")
    assert run.summary["status"] == "stopped"
    assert run.summary["error"] == str(told.value)
    kept = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in kept["model"].values())
    assert all(math.isfinite(record["loss"]) for record in run.records if record["kind"] == "step")


def test_a_run_from_before_there_were_defaults_goes_on_with_the_paper_s(tmp_path):
    fields = {"optimizer": "foof", "optimizer_options": {}}
    reference = small(tmp_path / "reference", defaults="paper", epochs=3, **fields)
    run = small(tmp_path, defaults="paper", epochs=2, **fields)
    path = run.path / "config.yaml"
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert old.pop("defaults") == "paper"
    path.write_text(yaml.safe_dump(old), encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a run with defaults='paper', not 'training'.*give the same options"):
        small(tmp_path, epochs=3, **fields)
    run = small(tmp_path, defaults="paper", epochs=3, **fields)
    assert run.summary["final"] == reference.summary["final"]


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    small(tmp_path)
    with pytest.raises(ValueError, match="a run with seed=0, not 1"):
        small(tmp_path, seed=1)


def test_two_processes_do_not_share_a_folder(tmp_path):
    from fisherviz.training import Config

    folder = Folder(Config(out=tmp_path / "run"))
    with pytest.raises(RuntimeError, match="another process is at work"):
        Folder(Config(out=tmp_path / "run"))
    folder.close()
    Folder(Config(out=tmp_path / "run")).close()


def test_the_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("dataset", "digit", "dataset: there is no data set 'digit'; did you mean 'digits'"),
        ("model", "kfac-mpl", "model: there is no network 'kfac-mpl'; did you mean 'kfac-mlp'"),
        ("model_options", {"hiden": [3]}, "model_options: .*no option 'hiden'"),
        ("optimizer_options", {"damping": -1.0}, "optimizer_options: .*damping"),
        ("likelihood", "poisson", "likelihood: .*poisson"),
        ("limit", 10**6, "dataset: limit="),
        ("device", "cuda:99", "device: cuda:99 cannot be used"),
    ],
)
def test_a_wrong_field_is_named_before_anything_is_written(tmp_path, field, value, told):
    with pytest.raises(ValueError, match=told):
        small(tmp_path, **{field: value})
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no training run"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match="damaged"):
        load_run(tmp_path)


def test_a_line_that_is_not_whole_is_not_read(tmp_path):
    run = small(tmp_path)
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"kind": "step"})[:-3])
    assert load_run(run.path).records == run.records


def test_tensorboard_is_written_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small(tmp_path, tensorboard=True)
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("step/loss")] == list(range(1, 9))
