"""The K-FAC paper's example network and its matrices, against brute force."""

import pytest
import torch
from torch import nn

from fisherviz.papers.kfac.network import MIDDLE, kfac_networks
from fisherviz.papers.trials.work import Run

RUN = Run("smoke", progress=False)


@pytest.fixture(scope="module")
def network():
    return kfac_networks(RUN).first


def brute_force_fisher(network):
    """E over inputs and the network's own labels of the outer products of gradients, input by input."""
    rows = []
    (inputs, _), *_ = network.batches
    model = network.model
    for x in inputs:
        z = model(x)
        p = z.detach().softmax(0)
        for label in range(len(z)):
            loss = nn.functional.cross_entropy(z, torch.tensor(label))
            layers = [getattr(model, name) for name in MIDDLE]
            parameters = [t for layer in layers for t in (layer.weight, layer.bias)]
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            pairs = zip(found[::2], found[1::2], strict=True)
            gradient = torch.cat([torch.cat([w, b[:, None]], 1).T.flatten() for w, b in pairs])
            rows.append(p[label].sqrt() * gradient)
    stacked = torch.stack(rows)
    return stacked.T @ stacked / len(inputs)


def test_the_exact_matrix_is_the_fisher_in_the_papers_order(network):
    # vec(W̄) stacks columns, one per input with the bias last: the transpose flattened row by row
    torch.testing.assert_close(network.exact, brute_force_fisher(network), rtol=1e-9, atol=1e-12)


def test_damped_inverses_are_inverses(network):
    gamma = 0.1
    eye = torch.eye(len(network.exact), dtype=torch.float64)
    for name in ("kfac-full", "kfac", "kfac-tridiagonal"):
        product = network.damped(name, gamma) @ network.inverse(name, gamma)
        torch.testing.assert_close(product, eye, rtol=0, atol=1e-8)
    added = network.damped("kfac-full", gamma) - network.dense("kfac-full")
    product = (network.exact + added) @ network.exact_inverse(gamma)
    torch.testing.assert_close(product, eye, rtol=0, atol=1e-8)


def test_the_networks_are_trained_by_k_fac_to_the_error_that_was_asked_for(network):
    for net in kfac_networks(RUN).nets:
        wrong, count = 0, 0
        for inputs, targets in net.batches:
            wrong += int((net.model(inputs).argmax(1) != targets).sum())
            count += len(targets)
        assert net.errors[-1] == pytest.approx(wrong / count, abs=2 / count)  # float32 then, float64 now
        assert net.errors[-1] <= net.recipe.error < min(net.errors[:-1])
        assert 0 < net.gamma < 1


def test_networks_of_several_seeds_differ(network):
    first, second = (nn.utils.parameters_to_vector(net.model.parameters()) for net in kfac_networks(RUN).nets)
    assert not torch.equal(first, second)


def test_networks_say_where_they_depart_from_the_papers(network):
    assert network.recipe.departures == ("digits instead of MNIST", "a smaller network")
