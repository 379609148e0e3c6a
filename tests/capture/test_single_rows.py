"""Layers that are called with one row or image by itself: for all examples at once, or example by example."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.training_runs import half_squares, trained

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*chain", "ignore:.*exact 2 x 2", "ignore:.*no structure", "ignore:.*recursion"
)

D = 4


class Joined(nn.Module):
    """What is read of each example, and what a layer makes of one vector that all of them share."""

    def __init__(self, layer, vector, join):
        super().__init__()
        self.read, self.layer, self.head = nn.Linear(3, D), layer, nn.Linear(D, 2)
        self.vector, self.join = vector, join

    def forward(self, x):
        return self.head(torch.tanh(self.join(self.read(x), self.layer(self.vector))))


def ramp(*shape):
    return torch.linspace(-1, 2, D, dtype=torch.float64).reshape(*shape, D)


SHARED = {
    "row of a table": (lambda: nn.Embedding(3, D), torch.tensor(2)),
    "linear": (lambda: nn.Linear(D, D), ramp()),
    "linear without bias": (lambda: nn.Linear(D, D, bias=False), ramp()),
    "layer norm": (lambda: nn.LayerNorm(D), ramp()),
    "rms norm": (lambda: nn.RMSNorm(D), ramp()),
    "one number": (lambda: nn.PReLU(), torch.tensor(-1.5, dtype=torch.float64)),
    "image": (lambda: nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.Flatten(0)), ramp(1)),
}
shared = pytest.mark.parametrize(("layer", "vector"), SHARED.values(), ids=SHARED)
ADDED = {
    "added": lambda h, s: h + s,
    "on the left": lambda h, s: s + h,
    "expanded": lambda h, s: h * 2 + s.expand_as(h).tanh(),
    "unsqueezed": lambda h, s: h + s.unsqueeze(0),
}
OTHERWISE = {
    "multiplied": lambda h, s: h * s,
    "subtracted": lambda h, s: h - s,
    "stacked": lambda h, s: h + torch.stack([s] * len(h)).reshape(len(h), -1),
}


def made(layer, vector, join):
    torch.manual_seed(0)
    return nets.randomised(Joined(layer(), vector, join))


@pytest.mark.covering
@shared
@pytest.mark.parametrize("join", [*ADDED.values(), *OTHERWISE.values()], ids=[*ADDED, *OTHERWISE])
@pytest.mark.parametrize("n", [5, D, 1])
def test_one_vector_for_all_examples(layer, vector, join, n):
    net, x = made(layer, vector, join), torch.randn(n, 3, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    v = torch.randn(len(F), dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher @ v, F @ v.numpy())
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()))
    assert_matches(fisher.to_dense(), F)


@pytest.mark.parametrize("name", ["row of a table", "linear", "layer norm", "rms norm"])
@pytest.mark.parametrize("join", ADDED.values(), ids=ADDED)
def test_what_is_added_keeps_its_structure(name, join):
    net, x = made(*SHARED[name], join), torch.randn(5, 3, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher([x, x[:1], x[:D]])
    fisher.to_dense()
    assert {layer.path for layer in fisher.layers} == {"structured"}


def twins(name):
    """The same function with the vector taken once for all, and once for each example."""
    layer, vector = SHARED[name]
    net = made(layer, vector, ADDED["added"])
    other = copy.deepcopy(net)
    other.join = lambda h, s: h + s
    other.forward = lambda x: other.head(torch.tanh(other.read(x) + other.layer(vector.expand(len(x), *vector.shape))))
    return net, other, torch.randn(6, 3, dtype=torch.float64)


each = pytest.mark.parametrize("name", ["row of a table", "linear"])


@pytest.mark.covering
@each
@pytest.mark.parametrize("method", list(fv.approximations))
def test_methods_are_those_of_a_vector_for_each_example(name, method):
    net, other, x = twins(name)
    one, two = (fv.approximate(fv.Probe(model, "gaussian").fisher(x), method).to_dense() for model in (net, other))
    assert_matches(one, two)


@pytest.mark.covering
@each
@pytest.mark.parametrize("optimizer", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree"])
def test_optimizers_step_as_with_a_vector_for_each_example(name, optimizer):
    net, other, x = twins(name)
    loss = half_squares(x, torch.linspace(-1, 1, 12).double().view(6, 2))
    assert_matches(trained(optimizer, net, loss), trained(optimizer, other, loss), 1e-9)


class OneByOne(nn.Module):
    """Layers that see the examples one after another, each without an axis of examples."""

    def __init__(self, layer, features):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 2)

    def forward(self, x):
        return torch.stack([self.head(self.layer(row).square().tanh().flatten(1).mean(1)) for row in x])


IMAGES = {
    "conv1d": (lambda: nn.Conv1d(2, 2, 2), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 2), (2, 5, 5)),
    "conv2d to more channels": (lambda: nn.Conv2d(2, 3, 2), (2, 5, 5)),
    "conv2d in two groups": (lambda: nn.Conv2d(2, 2, 2, groups=2), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 2, 2), (2, 4, 4)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(2, affine=True), (2, 5)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm((2, 5)), (2, 5)),
    "prelu": (lambda: nn.PReLU(), (2, 5)),
}


@pytest.mark.covering
@pytest.mark.parametrize(("layer", "shape"), IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("n", [3, 2, 1])
def test_images_one_by_one(layer, shape, n):
    torch.manual_seed(0)
    layer = layer()
    net = nets.randomised(OneByOne(layer, getattr(layer, "out_channels", shape[0])))
    x = torch.randn(n, *shape, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Categorical())
    v = torch.randn(len(F), dtype=torch.float64)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher @ v, F @ v.numpy())
    assert_matches(fisher.to_dense(), F)
    if n == 1:  # the one example's
        assert {layer.path for layer in fisher.layers} == {"structured"}


@pytest.mark.parametrize("name", ["conv2d", "instance norm 2d"])
def test_a_first_batch_of_one_image_tells_nothing_of_the_next(name):
    torch.manual_seed(0)
    layer, shape = IMAGES[name]
    net, x = nets.randomised(OneByOne(layer(), 2)), torch.randn(4, *shape, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher([x[:1], x[1:]])
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))


class Rows(nn.Module):
    """A chain of layers on rows by themselves, or on all at once."""

    def __init__(self, alone):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2))
        self.alone = alone

    def forward(self, x):
        return torch.stack([self.layers(row) for row in x]) if self.alone else self.layers(x)


@pytest.mark.parametrize("method", ["kfra", "kfac-full", "ekfac"])
def test_methods_of_one_row_by_itself(method):
    found, x = [], torch.randn(1, 3, dtype=torch.float64)
    for alone in (True, False):
        torch.manual_seed(0)
        net = nets.randomised(Rows(alone))
        found.append(fv.approximate(fv.Probe(net, "gaussian").fisher(x), method).to_dense())
    assert_matches(*found)
