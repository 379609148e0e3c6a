"""The papers' networks: sizes, initialisations, seeds; training to a given error."""

import math

import pytest
import torch
from torch import Generator, nn

from fisherviz import datasets, models


def widths(model):
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def layer_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kfac-mlp", [256, 20, 20, 20, 20, 20, 10]),
        ("foof-mlp", [784, 1000, 1000, 1000, 10]),
        ("mnist-autoencoder", [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("curves-autoencoder", [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("faces-autoencoder", [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]),
    ],
)
def test_widths_are_the_papers(name, expected):
    model = models.build(name)
    assert widths(model) == expected
    assert model(torch.zeros(2, expected[0])).shape == (2, expected[-1])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", models.names())
def test_the_seed_alone_decides_the_weights(name):
    options = {"inputs": 7, "outputs": 8} if name == "shrestha-mlp" else {}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = models.build(name, seed=3, **options).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = models.build(name, seed=3, **options).state_dict()
    other = models.build(name, seed=4, **options).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_without_a_generator_the_weights_follow_torchs_seed_and_leave_its_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = models.kfac_mlp()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first.layer1.weight, models.kfac_mlp().layer1.weight)
    torch.manual_seed(6)
    assert not torch.equal(first.layer1.weight, models.kfac_mlp().layer1.weight)


def test_layers_have_names_that_say_where_they_are():
    assert layer_names(models.build("kfac-mlp")) == [f"layer{n}" for n in range(1, 7)]
    assert layer_names(models.build("cwngd-convnet")) == ["conv", "dense1", "dense2"]
    expected = ["encoder1", "encoder2", "encoder3", "code", "decoder1", "decoder2", "decoder3", "output"]
    assert layer_names(models.build("mnist-autoencoder")) == expected


def test_the_kfac_network_is_tanh_of_affine_maps():
    model = models.build("kfac-mlp").double()
    x = torch.rand(3, 256, dtype=torch.float64)
    expected = x
    for number in range(1, 7):
        layer = getattr(model, f"layer{number}")
        expected = expected @ layer.weight.T + layer.bias
        expected = expected if number == 6 else torch.tanh(expected)
    torch.testing.assert_close(model(x), expected)


def test_the_code_and_the_output_of_an_autoencoder_are_linear():
    model = models.build("curves-autoencoder")
    kinds = [type(module).__name__ for module in model]
    assert kinds == (["Linear", "Sigmoid"] * 5 + ["Linear"]) + (["Linear", "Sigmoid"] * 5 + ["Linear"])


def test_foof_network_has_no_biases_and_kaimings_variance():
    model = models.build("foof-mlp")
    assert all(name.endswith("weight") for name, _ in model.named_parameters())
    # the standard error of a deviation over 10^6 weights is 0.07 %
    assert model.layer2.weight.std().item() == pytest.approx(math.sqrt(2 / 1000), rel=0.005)
    assert models.foof_mlp(bias=True).layer1.bias.eq(0).all()


def test_xavier_bounds_of_the_kfac_network():
    weight = models.build("kfac-mlp").layer1.weight
    bound = math.sqrt(6 / 276)
    assert 0.99 * bound < weight.abs().max() <= bound


def test_sparse_init_gives_every_unit_fifteen_inputs():
    model = models.sparse_init(nn.Sequential(nn.Linear(40, 6), nn.Conv2d(3, 5, 3), nn.Linear(4, 2)), nonzero=15)
    counts = [(layer.weight.flatten(1) != 0).sum(1).tolist() for layer in model]
    assert counts == [[15] * 6, [15] * 5, [4] * 2]
    assert all(layer.bias.eq(0).all() for layer in model)


def test_sparse_weights_are_gaussian_and_spread_over_all_inputs():
    layer = models.sparse_init(nn.Linear(50, 4000), scale=2.0, generator=Generator().manual_seed(0))
    values = layer.weight[layer.weight != 0]
    assert values.numel() == 4000 * 15
    # 60,000 values: standard errors 0.008 of the mean and 0.006 of the deviation
    assert values.mean().item() == pytest.approx(0, abs=0.04)
    assert values.std().item() == pytest.approx(2, abs=0.03)
    # each input serves 1200 units on average, with a standard deviation of 29
    assert ((layer.weight != 0).sum(0) - 1200).abs().max() < 150


def test_sparse_init_is_an_option_of_the_kfac_network():
    model = models.build("kfac-mlp", init="sparse")
    assert ((model.layer1.weight != 0).sum(1) == 15).all()


def test_the_convolutional_network_takes_flat_and_shaped_images():
    model = models.build("cwngd-convnet")
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(model(images), model(images.flatten(1)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_114
    assert model.dense1.in_features == 128
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) leave nothing after a 5 x 5 kernel"):
        models.cwngd_convnet((1, 8, 8))


def test_a_data_set_gives_the_sizes_that_are_not_given():
    digits = datasets.load("digits")
    assert widths(models.build("kfac-mlp", dataset=digits)) == [64, 20, 20, 20, 20, 20, 10]
    assert widths(models.build("shrestha-mlp", dataset=digits, hidden=(3, 2))) == [64, 3, 2, 10]
    assert widths(models.build("shrestha-mlp", dataset=digits, outputs=12)) == [64, 4, 12]
    net = models.build("cwngd-convnet", dataset=datasets.load("digits", size=16), pool=2)
    assert net(torch.zeros(2, 256)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"maps 784 numbers to 784, but Dataset\('digits'"):
        models.build("mnist-autoencoder", dataset=digits)


def test_unknown_and_missing_options_are_named():
    with pytest.raises(ValueError, match="no model 'mlp'; it must be one of kfac-mlp, foof-mlp"):
        models.build("mlp")
    with pytest.raises(
        TypeError, match="'foof-mlp' has no option 'activation'; it takes bias, hidden, inputs, outputs"
    ):
        models.build("foof-mlp", activation="tanh")
    with pytest.raises(TypeError, match="'shrestha-mlp' needs inputs and outputs"):
        models.build("shrestha-mlp")
    with pytest.raises(ValueError, match="activation must be one of tanh, relu, logistic, got 'gelu'"):
        models.build("kfac-mlp", activation="gelu")
    with pytest.raises(ValueError, match="init must be one of xavier, sparse, got 'zero'"):
        models.build("kfac-mlp", init="zero")
    with pytest.raises(ValueError, match="no autoencoder 'digits'; it must be one of mnist, curves, faces"):
        models.autoencoder("digits")
    with pytest.raises(ValueError, match="nonzero=0 leaves units without inputs"):
        models.autoencoder("curves", nonzero=0)


# Training to a given error


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", size=16).train


def test_training_stops_at_the_first_weights_that_are_good_enough(digits):
    model = models.build("kfac-mlp")
    history = models.train_to_error(model, *digits, error=0.05, progress=False)
    errors = history["error"]
    assert errors[-1] <= 0.05 < min(errors[:-1])
    assert history["steps"] == len(errors) - 1 == len(history["loss"]) - 1
    wrong = (model(digits.inputs).argmax(1) != digits.targets).double().mean().item()
    assert wrong == errors[-1]
    loss = nn.functional.cross_entropy(model(digits.inputs), digits.targets).item()
    assert loss == pytest.approx(history["loss"][-1], rel=1e-6)


def test_training_is_deterministic_and_a_guest(digits):
    model, twin = models.build("kfac-mlp", hidden=(10,)), models.build("kfac-mlp", hidden=(10,))
    model.eval()
    model.layer1.weight.grad = torch.ones_like(model.layer1.weight)
    grad = model.layer1.weight.grad
    state = torch.get_rng_state()
    models.train_to_error(model, *digits, error=0.3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert model.layer1.weight.grad is grad
    assert grad.eq(1).all()
    assert model.layer1.bias.grad is None
    models.train_to_error(twin, *digits, error=0.3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_seed_decides_what_dropout_drops(digits):
    def run(seed):
        layers = nn.Linear(256, 10), nn.Dropout(0.2)
        model = models.sparse_init(nn.Sequential(*layers), generator=Generator().manual_seed(0))
        return models.train_to_error(model, *digits, error=0.5, seed=seed, progress=False)["loss"]

    assert run(0) == run(0) != run(1)


def test_frozen_parameters_stay(digits):
    model = models.build("kfac-mlp", hidden=(10,))
    model.layer1.weight.requires_grad_(False)
    before = model.layer1.weight.clone()
    models.train_to_error(model, *digits, error=0.4, progress=False)
    assert torch.equal(model.layer1.weight, before)


def test_training_that_fails_says_why_and_leaves_modes_and_gradients(digits):
    model = models.build("kfac-mlp", hidden=(10,)).eval()
    with pytest.raises(
        RuntimeError, match=r"training error is \d+\.\d+% after 2 steps instead of 1.00%; raise max_steps="
    ):
        models.train_to_error(model, *digits, error=0.01, max_steps=2, progress=False)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"The loss is nan after \d+ steps; lower learning_rate="):
        models.train_to_error(model, digits.inputs * math.nan, digits.targets, progress=False)
    with pytest.raises(ValueError, match="are no labels of 1437 examples; give one integer per example"):
        models.train_to_error(model, digits.inputs, digits.inputs, progress=False)
    with pytest.raises(ValueError, match="error=1 is no share"):
        models.train_to_error(model, *digits, error=1, progress=False)
