"""What runs say of a network: losses, accuracies and squared errors by their definitions, of targets in any form."""

import math

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz import datasets
from fisherviz.datasets.catalogue import Dataset, Split, Standard
from fisherviz.support.errors import OptionError
from fisherviz.training import data as training_data
from fisherviz.training.config import Config
from fisherviz.training.evaluation import evaluate
from tests.oracles import nets

REAL = {
    "as outputs": lambda y: y,
    "without the dimension of one": lambda y: y.squeeze(1),
    "with another dimension of one": lambda y: y.unsqueeze(2),
    "float32": lambda y: y.float(),
}
BINARY = {**REAL, "bool": lambda y: y > 0, "uint8": lambda y: y.byte(), "int64": lambda y: y.long()}


@pytest.mark.parametrize(
    ("likelihood", "form"), [("gaussian", form) for form in REAL] + [("bernoulli", form) for form in BINARY]
)
def test_the_squared_error_is_that_of_each_output_with_its_own_target(likelihood, form):
    """Targets (N,) beside outputs (N, 1) gave all N × N differences; whole numbers gave an "accuracy" above 1."""
    net, x = nets.mlp(3, 4, 1), nets.vectors(7, 3)
    y = (torch.rand(7, 1) > 0.5).double() if likelihood == "bernoulli" else torch.randn(7, 1).double()
    found = evaluate(net, {"gaussian": fv.Gaussian(), "bernoulli": fv.Bernoulli()}[likelihood], (x, BINARY[form](y)))
    z = net(x).detach()
    predicted = z.sigmoid() if likelihood == "bernoulli" else z
    assert set(found) == {"loss", "squared_error"}
    assert found["squared_error"] == pytest.approx(float((predicted - y).square().sum(1).mean()), rel=1e-6)


def test_whole_numbers_of_a_regression_have_no_accuracy():
    found = evaluate(nets.mlp(3, 4, 2), fv.Gaussian(), (nets.vectors(5, 3), torch.arange(10).reshape(5, 2)))
    assert set(found) == {"loss", "squared_error"}


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_accuracy_is_the_share_of_the_labels_that_count(axis):
    class Tokens(nn.Module):
        def forward(self, x):
            return x.movedim(-1, axis)

    z, y = torch.randn(6, 4, 3, dtype=torch.float64), torch.randint(3, (6, 4))
    left_out = torch.rand(6, 4) < 0.4
    likelihood = fv.Categorical(class_axis=axis)
    right = (z.argmax(-1) == y).double()
    assert evaluate(Tokens(), likelihood, (z, y))["accuracy"] == pytest.approx(float(right.mean()))
    found = evaluate(Tokens(), likelihood, (z, y.masked_fill(left_out, -100)))
    assert found["accuracy"] == pytest.approx(float(right[~left_out].mean()))


def test_predictions_that_are_no_numbers_have_no_accuracy():
    found = evaluate(nn.Identity(), fv.Categorical(), (torch.full((4, 3), math.nan), torch.zeros(4).long()))
    assert all(math.isnan(value) for value in found.values())


def own(task="classification", test=8):
    """A data set of the user's, and where a configuration finds it."""
    x, y, none = torch.randn(20, 3), torch.arange(20) % 3, Standard(torch.zeros(()), torch.ones(()))
    parts = Split(x, y), Split(x[:test], y[:test])
    return Dataset("mine", *parts, task, "categorical", (3,), (), ("a", "b", "c"), none, none, ())


def loaded(monkeypatch, dataset, **fields):
    monkeypatch.setattr(training_data, "imported", lambda name: lambda: dataset)
    config = Config(dataset="mine:load", quiet=True, **fields)
    return training_data.split(config, training_data.load_dataset(config))


@pytest.mark.parametrize(
    ("given", "said"),
    [({"size": 8}, "size: "), ({"standardise": True}, "standardise: "), ({"standardise": False}, "standardise: "),
     ({"task": "regression"}, "task: "), ({"limit": 21}, "limit: ")],
)  # fmt: skip
def test_what_a_loader_leaves_unread_is_refused(monkeypatch, given, said):
    with pytest.raises(OptionError, match=f"^{said}"):
        loaded(monkeypatch, own(), **given)


def test_a_loaders_data_set_is_looked_at_before_the_run(monkeypatch):
    with pytest.raises(OptionError, match=f"one of {', '.join(datasets.TASKS)}"):
        loaded(monkeypatch, own(task="guessing"))
    with pytest.raises(OptionError, match=r"^holdout: the data set has no test part"):
        loaded(monkeypatch, own(test=0))
    training, validation = loaded(monkeypatch, own(test=0), holdout=0.25)
    assert (len(training[0]), len(validation[0])) == (15, 5)
