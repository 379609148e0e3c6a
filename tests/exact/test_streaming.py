"""However the examples arrive, in batches or all at once, the numbers are the same to rounding."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from fisherviz.capture.joined import concatenate
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

N = 7


def setting():
    return nets.mlp(3, 4, 2), nets.vectors(N, 3), laws.Categorical().draw(N, 2)


STREAMS = {
    "one tensor": lambda x, y: x,
    "inputs and targets": lambda x, y: (x, y),
    "list of tensors": lambda x, y: [x[:3], x[3:6], x[6:]],
    "list of pairs": lambda x, y: [(x[:3], y[:3]), (x[3:], y[3:])],
    "list of lists": lambda x, y: [[x[:3], y[:3]], [x[3:], y[3:]]],
    "loader with an uneven last batch": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=3),
    "loader of inputs alone": lambda x, y: DataLoader(TensorDataset(x), batch_size=2),
    "single examples": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=1),
    "an object that can be read again": lambda x, y: Again([(x[:5], y[:5]), (x[5:], y[5:])]),
}


class Again:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


every_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())


@every_stream
def test_exact_quantities(stream):
    net, x, y = setting()
    F = exact.fisher(net, x, laws.Categorical())
    fisher = fv.Probe(net, "categorical").fisher(stream(x, y))
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher.diagonal(), np.diag(F))
    assert_matches(fisher.block(0, 1), F[:16, 16:])
    assert_matches(fisher @ v, F @ v.numpy())
    assert float(fisher.quadratic(v)) == pytest.approx(v.numpy() @ F @ v.numpy(), rel=1e-9)
    assert float(fisher.norm("fro")) == pytest.approx(np.linalg.norm(F), rel=1e-9)
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v))
    assert_matches(fisher.spectrum(3), np.linalg.eigvalsh(F)[::-1][:3], 1e-8)


METHODS = [
    "diagonal",
    "layer",
    "cw-ngd",
    "kfac-full",
    "kfac",
    "ekfac",
    "foof",
    "kfac-tridiagonal",
    "nearest-kronecker",
]


@pytest.mark.parametrize("method", METHODS)
def test_approximations(method):
    net, x, _ = setting()
    probe = fv.Probe(net, "gaussian")
    whole = fv.approximate(probe.fisher(x), method).to_dense()
    streamed = fv.approximate(probe.fisher(DataLoader(TensorDataset(x), batch_size=3)), method).to_dense()
    assert_matches(streamed, whole, 1e-7 if method == "kfac-tridiagonal" else 1e-9)


@pytest.mark.parametrize("kind", ["empirical", "mc"])
def test_other_kinds(kind):
    net, x, y = setting()
    probe = fv.Probe(net, "categorical")
    streamed = probe.fisher([(x[:4], y[:4]), (x[4:], y[4:])], kind=kind)
    dense = streamed.to_dense()
    if kind == "empirical":
        assert_matches(dense, exact.fisher(net, x, laws.Categorical(), targets=y))
    assert_matches(streamed.diagonal(), dense.diagonal())


def test_convolutions_of_uneven_batches():
    net = nets.conv_net(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2, padding=1))
    x = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher([x[:2], x[2:4], x[4:]])
    assert_matches(fisher.to_dense(), F)
    assert float(fisher.norm("spectral")) == pytest.approx(np.linalg.norm(F, 2), rel=1e-7)


def test_images_of_another_size_in_every_batch():
    net = nets.conv_net(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 1))
    small, large = (torch.randn(2, 1, s, s, dtype=torch.float64) for s in (3, 4))
    F = (exact.fisher(net, small, laws.Gaussian()) + exact.fisher(net, large, laws.Gaussian())) / 2
    fisher = fv.Probe(net, "gaussian").fisher([(small,), (large,)])
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher @ v, F @ v.numpy())
    assert float(fisher.norm("fro")) == pytest.approx(np.linalg.norm(F), rel=1e-9)


def test_float32_sums_over_many_batches_do_not_drift():
    net = nets.mlp(2, 2)
    x = nets.vectors(3, 2)
    F = exact.fisher(net, x, laws.Gaussian())
    many = [x.float()] * 100
    fisher = fv.Probe(net.float(), "gaussian").fisher(many)
    assert_matches(fisher.to_dense(), F, 5e-6)
    assert_matches(fv.approximate(fisher, "kfac").to_dense(), F, 5e-6)


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_batches_that_are_cut_to_fit_the_memory(kind):
    """Pieces of one example each: the same numbers, and every label stays with its example."""
    net, x, y = setting()
    whole = fv.Probe(net, "categorical").fisher(x, y, kind=kind)
    expected = (whole.to_dense(), whole.diagonal(), whole.units(0))
    cut = fv.Probe(net, "categorical").fisher(x, y, kind=kind)
    cut.network.capture_bytes = 1
    for a, b in zip((cut.to_dense(), cut.diagonal(), cut.units(0)), expected, strict=True):
        assert_matches(a, b, 1e-12)


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_captures_that_do_not_fit_are_computed_again(monkeypatch, kind):
    net, x, _ = setting()
    v = nets.vectors(26, 1)[:, 0]
    whole = fv.Probe(net, "categorical").fisher([x[:4], x[4:]], kind=kind)
    expected = whole.to_dense()
    monkeypatch.setattr("fisherviz.exact.passes.keep_limit", lambda device: 0)
    fisher = fv.Probe(net, "categorical").fisher([x[:4], x[4:]], kind=kind)
    assert_matches(fisher.diagonal(), expected.diagonal())
    assert_matches(fisher @ v, expected @ v)
    assert_matches(fisher.block(1, 0), expected[16:, :16])
    assert float(fisher.quadratic(v)) == pytest.approx(float(v @ expected @ v), rel=1e-9)
    assert float(fisher.norm("trace")) == pytest.approx(float(expected.trace()), rel=1e-9)
    assert_matches(fv.approximate(fisher, "ekfac").to_dense(), fv.approximate(whole, "ekfac").to_dense())
    assert_matches(fisher.to_dense(), expected)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_a_larger_network_against_jacobians_by_torch_func(likelihood):
    """Several hundred parameters, so that products are cut into tiles and halves."""
    net, x = nets.mlp(20, 17, 11, 6), nets.vectors(90, 20)
    parameters = dict(net.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(parameters)
    J = torch.cat([J[name].reshape(90, 6, -1) for name in parameters], dim=2)
    FR = torch.stack([laws.ALL[likelihood].output_fisher(z) for z in net(x).detach()])
    F = torch.einsum("ndp,nde,neq->pq", J, FR, J).div(90).detach()
    fisher = fv.Probe(net, likelihood).fisher(DataLoader(TensorDataset(x), batch_size=32))
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher.block(0), F[:357, :357])
    assert_matches(fisher.block(0, 2), F[:357, -72:])
    assert_matches(fisher @ v, F @ v)
    assert float(fisher.norm("fro")) == pytest.approx(float(torch.linalg.matrix_norm(F)), rel=1e-9)
    assert_matches(fisher.solve(v, 0.01), torch.linalg.solve(F + 0.01 * torch.eye(len(F)).double(), v), 1e-8)
    assert_matches(fisher.spectrum(4), torch.linalg.eigvalsh(F).flip(0)[:4], 1e-8)


def test_requests_in_any_order_give_the_same_numbers():
    net, x, _ = setting()
    one, two = (fv.Probe(net, "categorical").fisher([x[:4], x[4:]]) for _ in range(2))
    first = (one.to_dense(), one.diagonal(), one.units(0))
    second = (two.units(0), two.diagonal(), two.to_dense())
    for a, b in zip(first, reversed(second), strict=True):
        assert_matches(a, b, 1e-13)


def test_a_shared_statistic_that_somebody_changed_is_computed_anew():
    fisher = fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(nets.vectors(7, 3))
    first = fv.approximate(fisher, "kfac")
    reference, factor = first.to_dense(), first.matrix.operators[0].A
    assert fv.approximate(fisher, "kfac").matrix.operators[0].A is factor  # shared, not copied
    factor.zero_()
    assert_matches(fv.approximate(fisher, "kfac").to_dense(), reference, 1e-12)


def test_captures_of_batches_are_copied_once_and_only_where_they_are_read_as_one(monkeypatch):
    net, x, _ = setting()
    F = exact.fisher(net, x, laws.Categorical())
    fisher = fv.Probe(net, "categorical").fisher([x[:3], x[3:]])
    together = []
    monkeypatch.setattr(
        "fisherviz.exact.kept.concatenate", lambda captures: (together.append(1), concatenate(captures))[1]
    )
    assert_matches(fisher.diagonal(), np.diag(F))
    assert_matches(fisher.to_dense(), F)  # a second pass reads the captures batch after batch
    assert not together
    for _ in range(2):
        fv.approximate(fisher, "nearest-kronecker")
        assert len(together) == 2  # one for each layer
