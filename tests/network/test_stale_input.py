"""What changes behind the Fisher's back: one sentence or the numbers that were asked for, never a mixture."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

KINDS_OF_ERROR = (ValueError, TypeError, RuntimeError, NotImplementedError)


def raises(word):
    return pytest.raises(KINDS_OF_ERROR, match=rf"(?i){word}")


def net_with(module):
    return nets.randomised(nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2)))


def test_weights_changed_since_the_fisher_was_made():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    F = exact.fisher(net, x, laws.Categorical())
    assert_matches(fisher.to_dense(), F)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    v = nets.vectors(26, 1)[:, 0]
    for call in (lambda: fisher @ v, lambda: fisher.quadratic(v)):
        with raises(r"changed"):
            call()


def test_weights_changed_before_the_first_request():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    with torch.no_grad():
        net[2].bias.add_(1.0)
    with raises("changed"):
        fisher.to_dense()


def test_weights_loaded_since():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    fisher.diagonal()
    net.load_state_dict({name: 2 * t for name, t in net.state_dict().items()})
    with raises("changed"):
        fisher.norm("spectral")


def test_weights_replaced_through_data_since():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    fisher.diagonal()
    net[0].weight.data = net[0].weight.data + 1.0
    with raises("changed"):
        fisher @ nets.vectors(26, 1)[:, 0]


def test_running_statistics_changed_since():
    net, x = net_with(nn.BatchNorm1d(4)), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    fisher.diagonal()
    net[1].running_mean.add_(1.0)
    with raises("changed"):
        fisher @ nets.vectors(fisher.shape[0], 1)[:, 0]


def test_modes_changed_since():
    """The numbers of the evaluated network, or a sentence; never those of one with active dropout."""
    net, x = net_with(nn.Dropout(0.5)), nets.vectors(4, 3)
    F = exact.fisher(net, x, laws.Categorical())
    v = nets.vectors(len(F), 1)[:, 0]
    fisher = fv.Probe(net, "categorical").fisher(x)
    fisher.diagonal()
    net.train()
    for call, expected in (
        (lambda: fisher @ v, F @ v.numpy()),
        (lambda: fisher.quadratic(v), v.numpy() @ F @ v.numpy()),
    ):
        try:
            actual = call()
        except KINDS_OF_ERROR as error:
            assert "Dropout" in str(error)  # noqa: PT017
        else:
            assert_matches(actual, expected)


def test_an_approximation_keeps_the_numbers_of_the_weights_it_was_made_with():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    kfac = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    before = kfac.to_dense()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    assert_matches(kfac.to_dense(), before, 0)


class Augmented(Dataset):
    """Other values at every look."""

    def __init__(self):
        self.looks = 0

    def __len__(self):
        return 6

    def __getitem__(self, n):
        self.looks += 1
        return torch.full((3,), float(n)).double() + 0.1 * self.looks


def consistent_or_refused(data, N):
    """Another pass over other examples must not mix two matrices: the first pass's numbers, or an error."""
    net = nets.mlp(3, 4, 2)
    fisher = fv.Probe(net, "categorical").fisher(data)
    diagonal = fisher.diagonal()
    v = nets.vectors(26, 1)[:, 0]
    try:
        product, dense = fisher @ v, fisher.to_dense()
    except KINDS_OF_ERROR as error:
        assert "same examples" in str(error) or "shuffl" in str(error)  # noqa: PT017
        return
    assert_matches(dense.diagonal(), diagonal)
    assert_matches(product, dense @ v)


def test_a_shuffling_loader_is_refused_at_the_second_pass():
    x = nets.vectors(9, 3)
    loader = DataLoader(TensorDataset(x), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    consistent_or_refused(loader, 9)


def test_an_augmenting_data_set_is_refused_at_the_second_pass():
    consistent_or_refused(DataLoader(Augmented(), batch_size=2), 6)


def test_data_changed_in_place_since():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    F = exact.fisher(net, x, laws.Categorical())
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher.diagonal(), np.diag(F))
    x.add_(1.0)
    v = nets.vectors(26, 1)[:, 0]
    try:
        product = fisher @ v
    except KINDS_OF_ERROR as error:
        assert "examples" in str(error) or "changed" in str(error)  # noqa: PT017
    else:
        assert_matches(product, F @ v.numpy())
