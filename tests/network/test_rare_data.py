"""Data, targets and losses that are rare or none: the right number, or one sentence."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fisherviz as fv
from fisherviz.network import convolutions
from fisherviz.network.batches import Batches
from fisherviz.network.guest import RandomState
from fisherviz.network.likelihoods import resolve
from fisherviz.network.vectors import FreshVectors
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


def fisher(data, likelihood="categorical", **options):
    return fv.Probe(nets.mlp(3, 4, 2), likelihood).fisher(data, **options)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_data_set_is_no_data():
    with pytest.raises(TypeError, match=r"is a Dataset \(TensorDataset\) of single examples; wrap it: DataLoader"):
        fisher(TensorDataset(nets.vectors(4, 3)))


def test_a_scalar_is_no_batch():
    with pytest.raises(ValueError, match="need a first dimension that counts examples, got a scalar"):
        list(Batches([torch.tensor(1.0)]))


def test_an_input_that_is_as_long_as_one_batch_alone_is_no_examples():
    mask = torch.ones(4, 4)
    for sizes in ((4, 6), (6, 4), (3, 5, 4)):
        data = [((nets.vectors(n, 3), mask), None) for n in sizes]
        with pytest.raises(ValueError, match=r"input 1 of a batch, \(4, 4\), belongs to no single example"):
            list(Batches(data))
    assert len(list(Batches([((nets.vectors(n, 3), mask), None) for n in (3, 5)]))) == 2
    with pytest.raises(ValueError, match="belongs to no single example"):
        list(Batches([((nets.vectors(4, 3), mask), None) for _ in range(2)]))
    assert len(list(Batches([((nets.vectors(4, 3), mask.clone()), None) for _ in range(2)]))) == 2


class Shrinking:
    """One batch fewer each time."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        self.count -= 1
        return iter([torch.ones(2, 3) * i for i in range(self.count + 1)])


def test_data_that_become_fewer_are_noticed_unless_nothing_is_promised_of_them():
    promised = Batches(Shrinking(3))
    assert len(list(promised)) == 3
    with pytest.raises(RuntimeError):
        list(promised)
    stream = Batches(Shrinking(3), repeats=False)
    assert [len(list(stream)) for _ in range(3)] == [3, 2, 1]
    assert promised.fingerprint
    assert not stream.fingerprint


def test_another_generator_of_numpys_is_put_back_as_it_stood():
    usual = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        before = RandomState()
        expected = np.random.get_state(legacy=False)  # noqa: NPY002
        assert not before.differs()
        np.random.rand()  # noqa: NPY002
        assert before.differs()
        before.restore()
        assert np.random.get_state(legacy=False) == expected  # noqa: NPY002
    finally:
        np.random.set_bit_generator(usual)


# ---- likelihoods -----------------------------------------------------------------------------------------------------


def test_a_class_of_likelihoods_stands_for_its_defaults():
    assert type(resolve(fv.Bernoulli)) is fv.Bernoulli
    net, x = nets.mlp(3, 2), nets.vectors(4, 3)
    assert_matches(fv.Probe(net, fv.Gaussian).fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))


@pytest.mark.parametrize("axis", [0, 2, None])
def test_classes_are_on_the_first_or_the_last_axis(axis):
    with pytest.raises(ValueError, match="class_axis must be -1 or 1"):
        fv.Categorical(class_axis=axis)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_a_scalar_output_has_no_rows(name):
    with pytest.raises(ValueError, match="the model's output is a scalar"):
        resolve(name).check_output(torch.tensor(1.0))


@pytest.mark.parametrize("targets", [torch.tensor([True, False]), torch.tensor([1j, 0])])
def test_what_is_no_index_of_a_class_is_no_label(targets):
    with pytest.raises(TypeError, match="class indices of an integer type"):
        fv.Categorical().check_targets(torch.zeros(2, 3), targets)


def test_labels_that_are_all_left_out_are_in_range():
    y = fv.Categorical().check_targets(torch.zeros(2, 3), torch.tensor([-100, -100]))
    assert y.tolist() == [-1, -1]
    assert fv.Categorical().nll(torch.randn(2, 3), torch.tensor([-100, -100])).tolist() == [0, 0]


def test_class_indices_are_no_targets_of_a_regression():
    for name in ("gaussian", "bernoulli"):
        with pytest.raises(ValueError, match=f"class indices, which are no targets of a {name} likelihood"):
            resolve(name).check_data(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))


def test_numbers_that_are_no_probabilities_are_no_labels():
    z = torch.zeros(4, 2)
    for y in (torch.zeros(4), torch.ones(4, 2), torch.tensor([[1.5, -0.5]] * 4)):
        with pytest.raises(TypeError, match="no probabilities of classes"):
            fv.Categorical().check_data(z, y)
    fv.Categorical().check_data(z, torch.tensor([[0.25, 0.75]] * 4))


# ---- what a loss's gradient tells ------------------------------------------------------------------------------------


def gradient_of(loss, *shape, seed=0):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    return z.detach(), torch.autograd.grad(loss(z), z)[0]


def labels(n, classes, *positions):
    return torch.randint(classes, (n, *positions), generator=torch.Generator().manual_seed(1))


def test_the_scale_of_a_mean_over_positions_is_one_over_their_number():
    y = labels(4, 3, 5)
    loss = nn.CrossEntropyLoss()
    z, g = gradient_of(lambda z: loss(z.transpose(1, 2), y), 4, 5, 3)
    assert fv.Categorical().loss_scale(z, g, None) == pytest.approx(1 / 20, rel=1e-12)
    z, g = gradient_of(lambda z: loss(z, y), 4, 3, 5)
    assert fv.Categorical(class_axis=1).loss_scale(z, g, None) == pytest.approx(1 / 20, rel=1e-12)


def test_the_scale_of_what_counts_is_that_of_its_number_alone():
    y = labels(4, 3, 5)
    y[0, :3] = y[2, 1] = -100
    loss = nn.CrossEntropyLoss()
    z, g = gradient_of(lambda z: loss(z.transpose(1, 2), y), 4, 5, 3)
    likelihood = fv.Categorical()
    counted = likelihood.reached(z, g)
    assert torch.equal(counted, y != -100)
    assert likelihood.loss_scale(z, g, counted) == pytest.approx(1 / 16, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("certain", [60.0, 130.0, 1200.0])
def test_positions_that_are_fitted_to_rounding_do_not_hide_the_scale(dtype, certain):
    """Where p - onehot has lost its negative entry, the label is the class that is certain."""
    y = labels(4, 3, 5)
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    z[1:] -= torch.nn.functional.one_hot((y[1:] + 1) % 3, 3) * 0.7 * certain
    z[1:] += torch.nn.functional.one_hot(y[1:], 3) * certain * 0.3
    z.requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(z.transpose(1, 2), y), z)
    likelihood = fv.Categorical()
    counted = likelihood.reached(z.detach(), g)
    assert likelihood.loss_scale(z.detach(), g, counted) == pytest.approx(1 / 20, rel=1e-5)


def test_one_label_for_each_example_needs_no_scale_and_no_gradient_has_none():
    y = labels(4, 3)
    z, g = gradient_of(lambda z: nn.functional.cross_entropy(z, y), 4, 3)
    assert fv.Categorical().loss_scale(z, g, None) is None
    assert fv.Categorical().loss_scale(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), None) is None


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 2.0, 5.0]).double()}, {"label_smoothing": 0.2}])
def test_a_loss_that_is_no_multiple_of_the_nll_has_no_scale(options):
    y = labels(4, 3, 5)
    z, g = gradient_of(lambda z: nn.functional.cross_entropy(z.transpose(1, 2), y, **options), 4, 5, 3)
    with pytest.raises(ValueError, match="is no multiple of the categorical scores"):
        fv.Categorical().loss_scale(z, g, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_gradient_along_the_other_axis_is_told(dtype):
    y = labels(4, 3, 5)
    z, g = (t.to(dtype) for t in gradient_of(lambda z: nn.functional.cross_entropy(z, y), 4, 3, 5))
    with pytest.raises(ValueError, match=r"the loss's gradient says that the classes .* are on axis 1, not -1"):
        fv.Categorical().reached(z, g)
    assert fv.Categorical(class_axis=1).reached(z, g) is None
    assert fv.Categorical().reached(torch.zeros(4), torch.ones(4)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_labels_are_not_drawn_from_outputs_that_are_not_finite(value, shape):
    z = torch.zeros(shape)
    z[2] = value
    vectors = FreshVectors(fv.Gaussian(), "mc", 1, torch.Generator(), lambda: 7)
    with pytest.raises(ValueError, match="at step 7, the model's output is NaN or infinite for 1 of 4 examples"):
        vectors(z)


@pytest.mark.parametrize("other", [3, 4])
def test_sampled_labels_are_those_of_the_given_generator(other):
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    found = []
    for seed in (3, other):
        torch.rand(1)  # the global generator moves on
        generator = torch.Generator().manual_seed(seed)
        found.append(fv.Probe(net, "categorical").fisher(x, kind="mc", generator=generator).to_dense())
    assert torch.equal(*found) == (other == 3)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_a_lazy_module_has_to_run_first():
    with pytest.raises(ValueError, match=r"'0.weight' of a lazy module has no values yet; run the model once"):
        fv.Probe(nn.Sequential(nn.LazyLinear(2)), "categorical")


def test_a_layer_is_named_by_what_the_fisher_shows_of_it():
    found = fisher(nets.vectors(4, 3))
    for i, info in enumerate(found.layers):
        assert torch.equal(found.block(info), found.block(i))
        assert torch.equal(found.block(info, 0), found.block(i, 0))


def test_patches_of_some_images_at_a_time_are_the_patches(monkeypatch):
    module, x = nn.Conv2d(2, 3, 2, padding=1).double(), torch.randn(7, 2, 4, 3, dtype=torch.float64)
    unfolded = nn.functional.unfold(x, 2, padding=1).mT
    expected = torch.cat([unfolded, torch.ones_like(unfolded[..., :1])], 2)
    for entries in (1, 200, 2**30):
        monkeypatch.setattr(convolutions, "_UNFOLD_ENTRIES", entries)
        torch.testing.assert_close(convolutions.Convolution("conv2d").with_bias(module, x), expected)


class Scaled(nn.Module):
    """A module of the user's own that holds another one's weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T * 2


class Sharing(nn.Module):
    """A Linear whose weight a module of the user's own reads too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = Scaled(self.first.weight)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_weight_that_a_module_of_ones_own_reads_too_is_exact_on_the_generic_path():
    net, x = nets.randomised(Sharing()), nets.vectors(4, 3)
    found = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(found.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert "another use (Scaled)" in next(iter(found.layers)).note


CONFIDENT = [1, 10, 30, 60, 95, 120, 200]
"""Sizes of logits: beyond 88 float32's exponentials underflow."""


@pytest.mark.parametrize("shape", [(12, 5), (12, 2), (100, 10), (6, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left_out", [0.0, 0.3])
def test_the_gradient_of_a_network_that_is_sure_of_itself_is_still_that_of_the_nll(shape, dtype, left_out):
    """Where p is 1 up to rounding, p - 1 is rounding alone, and whole rows vanish."""
    likelihood = fv.Categorical()
    for seed, size in itertools.product(range(8), CONFIDENT):
        generator = torch.Generator().manual_seed(seed)
        z = size * torch.rand(1, generator=generator) * torch.randn(*shape, generator=generator)
        z = z.to(dtype).requires_grad_()
        y, drawn = z.detach().argmax(-1), torch.randint(shape[-1], shape[:-1], generator=generator)
        y = torch.where(torch.rand(y.shape, generator=generator) < 0.05 * (seed % 2), drawn, y)
        y = y.masked_fill(torch.rand(y.shape, generator=generator) < left_out, -100)
        there = y != -100
        loss = nn.functional.cross_entropy(z.flatten(0, -2), y.flatten())
        found = likelihood.reached(z.detach(), g := torch.autograd.grad(loss, z)[0])
        found = torch.ones_like(there) if found is None else found
        assert bool(found[there].all()), (seed, size)
        second = torch.softmax(z.detach().double(), -1).sort(-1).values[..., -2]
        told = 2 * torch.finfo(dtype).tiny * int(there.sum())  # what the likeliest label's gradient would show
        assert not bool(found[~there & (second > told)].any()), (seed, size)
        c = likelihood.loss_scale(z.detach(), g, None if bool(found.all()) else found)
        tolerance = {torch.float16: 0.1, torch.bfloat16: 0.25}.get(dtype, 1e-3)  # their logarithms are rounded
        assert c is None or c == pytest.approx(1 / int(there.sum()), rel=tolerance), (seed, size)


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 2.0, 5.0, 1.0])}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("size", [1, 10, 30])
def test_another_loss_of_a_network_that_is_sure_of_itself_has_no_scale(options, size):
    generator = torch.Generator().manual_seed(0)
    z = (size * torch.randn(20, 5, 4, generator=generator)).requires_grad_()
    y = torch.randint(4, (20, 5), generator=generator)
    g = torch.autograd.grad(nn.functional.cross_entropy(z.transpose(1, 2), y, **options), z)[0]
    with pytest.raises(ValueError, match="is no multiple of the categorical scores"):
        fv.Categorical().loss_scale(z.detach(), g, None)


@pytest.mark.parametrize("classes", [10, 100, 2000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_a_softmax_of_many_classes_loses_beside_its_label_is_rounding(dtype, classes):
    """Small terms are added to one near 1: what all others have may be gone from the label's p - 1."""
    eps, y = torch.finfo(dtype).eps, labels(4, classes, 5)
    for share in (1e-3, 0.1, 0.5, 2.0, 100.0):  # of the others' probabilities, in units of rounding
        noise = torch.randn(4, 5, classes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        z = noise - math.log(share * eps) * nn.functional.one_hot(y, classes)
        z = z.to(dtype).requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(z.transpose(1, 2), y), z)
        assert fv.Categorical().loss_scale(z.detach(), g, None) == pytest.approx(1 / 20, rel=1e-3), share


def test_class_weights_show_where_the_labels_are_certain_up_to_rounding():
    """In the other classes' gradients, whose digits are all there."""
    y, weight = labels(4, 10, 5), torch.linspace(1.0, 3.0, 10, dtype=torch.float64)
    z = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = (z + 42.0 * nn.functional.one_hot(y, 10)).requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(z.transpose(1, 2), y, weight=weight), z)
    with pytest.raises(ValueError, match="is no multiple of the categorical scores"):
        fv.Categorical().loss_scale(z.detach(), g, None)
