"""What a configuration takes, and how it says what is wrong."""

import pytest

from fisherviz.commands.flags import assignments
from fisherviz.support.plain import from_yaml
from fisherviz.training import Config
from fisherviz.training.config import make_config, read_config
from fisherviz.training.optimizers import OPTIMIZERS, check_options


def test_every_field_has_a_default():
    assert make_config() == Config()


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no field 'epoch'; did you mean 'epochs'"):
        make_config({"epoch": 3})
    with pytest.raises(ValueError, match="did you mean 'optimizer'"):
        Config(optimiser="kfac")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", "many"),
        ("batch_size", -1),
        ("averaging", 1.0),
        ("dtype", "float16"),
        ("holdout", 1),
    ],
)
def test_a_value_that_a_field_cannot_take_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: .*{value}"):
        make_config({field: value})


def test_a_file_gives_fields_and_later_sources_come_first(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: foof\noptimizer_options: {lr: 1e-2, damping: 3}\nepochs: 4\n")
    config = make_config(read_config(path), {"epochs": 5, "optimizer_options": {"lr": 0.5}})
    assert (config.optimizer, config.epochs) == ("foof", 5)
    assert config.optimizer_options == {"lr": 0.5, "damping": 3}


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", None])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"^config: .*run\.yaml"):
        read_config(path)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3), ("true", True), ("[20, 20]", [20, 20])])
def test_numbers_are_read_as_people_write_them(text, value):
    found = from_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_an_assignment_needs_its_sign():
    assert assignments("-O", ["lr=1e-2", "inverse=block-tridiagonal"]) == {
        "lr": 0.01,
        "inverse": "block-tridiagonal",
    }
    with pytest.raises(ValueError, match="'lr' is no NAME=VALUE"):
        assignments("-O", ["lr"])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_refuses_options_that_it_lacks(name):
    assert check_options(name, {"lr": 0.5})["lr"] == 0.5
    if name != "natural-gradient":  # passes what it does not know on to the approximation
        with pytest.raises(ValueError, match=f"no option of {name} 'lrr'; did you mean 'lr'"):
            check_options(name, {"lrr": 0.5})


def test_rare_options_are_known_where_the_optimizer_takes_them():
    assert check_options("kfac", {"tau1": 0.5, "omega2": 0.9}) == {"tau1": 0.5, "omega2": 0.9}
    assert check_options("natural-gradient", {"rescale": True})["rescale"]
    with pytest.raises(ValueError, match="no option of kfac 'tau'; did you mean 'tau"):
        check_options("kfac", {"tau": 0.5})
    with pytest.raises(ValueError, match="no option of foof 'tau1'"):
        check_options("foof", {"tau1": 0.5})


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no optimizer 'kfca'; did you mean 'kfac'"):
        check_options("kfca", {})


def test_the_folder_is_named_after_the_run(tmp_path):
    assert str(Config(optimizer="foof", seed=3).directory) == "runs/digits-kfac-mlp-foof-3"
    assert Config(out=tmp_path).directory == tmp_path
