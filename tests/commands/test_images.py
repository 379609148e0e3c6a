"""Images reach each network in the shape that it takes, whatever its first module is; it is left as it was."""

import pytest
import torch
from torch import nn

from fisherviz import datasets
from fisherviz.commands.inputs import load_data
from fisherviz.commands.outputs import picked
from fisherviz.datasets.catalogue import Dataset, Split, Standard
from fisherviz.support.errors import OptionError
from fisherviz.training.network import shaped_for

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "faces": (1, 64, 64), "cifar10-subset": (3, 32, 32)}


def made_up(name, side):
    """A data set of a name's kind of images, without its files."""
    channels, *_ = SHAPES[name]
    shape = (channels, side, side)
    inputs = torch.rand(20, channels * side * side, generator=torch.Generator().manual_seed(0))
    split, standard = Split(inputs, torch.arange(20) % 10), Standard(torch.zeros(()), torch.ones(()))
    classes = tuple(map(str, range(10)))
    return Dataset(name, split, split, "classification", "categorical", shape, (), classes, standard, standard, ())


class Convolutions(nn.Module):
    """Its first registered modules take anything."""

    def __init__(self, channels, side):
        super().__init__()
        self.drop, self.act, self.norm = nn.Dropout(0.5), nn.ReLU(), nn.BatchNorm2d(4)
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.drop(self.act(self.norm(self.conv(x)))).mean((2, 3)))


class Patches(nn.Module):
    """A vision transformer: a token that is learned, patches, attention."""

    def __init__(self, channels, side):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.patches = nn.Conv2d(channels, 8, 4, 4)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = self.norm(torch.cat([self.token.expand(len(h), -1, -1), h], 1))
        return self.head(self.attention(h, h, h, need_weights=False)[0][:, 0])


class Viewing(nn.Module):
    """Makes images of rows of pixels itself, and takes nothing else."""

    def __init__(self, channels, side):
        super().__init__()
        self.shape = (channels, side, side)
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        n, _ = x.shape
        return self.head(self.conv(x.view(n, *self.shape)).mean((2, 3)))


def convolutions(channels, side):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(4 * (side - 2) ** 2, 10))


def flat(channels, side):
    return nn.Sequential(nn.Linear(channels * side * side, 5), nn.Tanh(), nn.Linear(5, 10))


def flattening(channels, side):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 5), nn.Tanh(), nn.Linear(5, 10))


NETWORKS = {
    "convolutions": (convolutions, 4), "convolutions behind dropout": (Convolutions, 4), "patches": (Patches, 4),
    "flattening": (flattening, 4), "flat": (flat, 2), "viewing": (Viewing, 2),
}  # fmt: skip


@pytest.mark.parametrize("side", ["own", 12])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_images_come_in_the_shape_that_a_network_takes(network, name, side):
    channels, own, _ = SHAPES[name]
    side = own if side == "own" else side
    build, dimensions = NETWORKS[network]
    torch.manual_seed(0)
    model, dataset = build(channels, side), made_up(name, side)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    shaped = shaped_for(dataset, model)
    inputs = shaped.train.inputs
    assert inputs.dim() == dimensions
    assert torch.equal(inputs.flatten(1), dataset.train.inputs)
    assert model.eval()(inputs).shape == (20, 10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [True] * len(modes)


@pytest.mark.parametrize("name", ["digits", "digits:16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_embedded_digits_reach_every_network(network, name):
    side = 16 if ":" in name else 8
    build, dimensions = NETWORKS[network]
    data = load_data(name, 30, progress=False).shaped_for(build(1, side), lambda out: picked(None, out))
    assert data.batches[0].dim() == dimensions
    assert len(data.batches[0]) == len(data.batches[1]) == 30


@pytest.mark.parametrize("name", [name for name in datasets.names() if datasets.where(name) and name in SHAPES])
def test_the_real_images_reach_convolutions(name):
    channels, side, _ = SHAPES[name]
    data = load_data(name, 10, progress=False)
    outputs = data.dataset.outputs
    model = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.LazyLinear(outputs))
    model.eval()(torch.zeros(1, channels, side, side))
    assert data.shaped_for(model, lambda out: picked(None, out)).batches[0].shape == (10, channels, side, side)


def test_where_both_forms_run_the_outputs_decide():
    dataset = made_up("digits", 8)
    assert shaped_for(dataset, nn.Linear(8, 10)).train.inputs.dim() == 4  # ten numbers for each row of an image
    both = nn.Linear(8, 10)
    both.forward = lambda x: torch.zeros(len(x), 10) if x.dim() == 2 else torch.zeros(len(x), 1, 8, 10)
    assert shaped_for(dataset, both).train.inputs.dim() == 2


def test_data_come_in_the_type_of_the_network():
    assert shaped_for(made_up("digits", 8), flat(1, 8).double()).train.inputs.dtype == torch.float64


def test_a_network_for_other_images_is_told_what_it_says_itself():
    data = load_data("digits", 30, progress=False)
    with pytest.raises(OptionError) as told:
        data.shaped_for(convolutions(3, 8), lambda out: picked(None, out))
    assert str(told.value).startswith(
        "--data: the network takes examples of digits neither as (1, 8, 8) (RuntimeError: "
    )
    assert "3 channels, but got 1" in str(told.value)
    assert "nor as (64,) (RuntimeError: " in str(told.value)


def test_images_that_have_their_shape_stay_as_they_are():
    dataset = made_up("digits", 8)
    images = dataset.images()
    assert torch.equal(shaped_for(images, convolutions(1, 8)).train.inputs, images.train.inputs)
