"""`fisherviz train` from flags and files, and its exit codes."""

import pytest
from typer.testing import CliRunner

from fisherviz.cli import app
from fisherviz.training import Config, load_run

RUNNER = CliRunner()
SMALL = [
    "--limit",
    "100",
    "--epochs",
    "1",
    "--batch-size",
    "50",
    "--quiet",
    "-M",
    "hidden=[6]",
    "--no-tensorboard",
]

DIVERGING = ["--model", "shrestha-mlp", "--task", "autoencoder", "--likelihood", "gaussian", "--epochs", "20"]


def call(*args):
    return RUNNER.invoke(app, ["train", *map(str, args)])


def test_every_field_has_a_flag_and_the_help_an_example():
    text = call("--help").output
    for name in Config.model_fields:
        assert f"--{name.removesuffix('s') if name.endswith('_options') else name}".replace("_", "-") in text
    assert "Example: fisherviz train" in text


def test_flags_make_a_run(tmp_path):
    done = call(*SMALL, "--optimizer", "adam", "-O", "lr=1e-2", "--seed", "3", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    run = load_run(tmp_path / "run")
    assert run.complete
    assert run.config["optimizer_options"] == {"lr": 0.01}
    assert run.config["seed"] == 3


def test_a_run_ends_with_its_pictures(tmp_path):
    monitored = ["--monitor", "--monitor-every", "1", "--monitor-examples", "20", "--monitor-methods", "kfac"]
    done = call(*SMALL, *monitored, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    for name in ("curves.png", "monitor.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_a_file_makes_a_run_and_flags_come_first(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: sgd\noptimizer_options: {lr: 0.5, momentum: 0.9}\nepochs: 3\n")
    done = call("--config", path, *SMALL, "-O", "lr=0.25", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    run = load_run(tmp_path / "run")
    assert run.config["optimizer_options"] == {"lr": 0.25, "momentum": 0.9}
    assert run.config["epochs"] == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--optimizer", "kfca"], "did you mean 'kfac'"),
        (["-O", "damp=1"], "--optimizer-option: there is no option of kfac 'damp'; did you mean 'damping'"),
        (["-O", "lr"], "is no NAME=VALUE"),
        (["--epochs", "0"], "--epochs: "),
        (["--config", "nowhere.yaml"], "--config: nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_option_leaves_with_two(tmp_path, args, told):
    done = call(*SMALL, "--out", tmp_path / "run", *args)
    assert done.exit_code == 2
    assert told in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_loss_that_is_not_finite_leaves_with_one(tmp_path):
    done = call(*SMALL, "--optimizer", "sgd", "-O", "lr=1e4", *DIVERGING, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "step" in done.output
    assert "layer 'layer" in done.output
