"""Embeddings: exact quantities without dense one-hot inputs, every method, every optimizer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.training_runs import assert_resumes, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*chain")

V, D = 5, 3


class Head(nn.Module):
    """Two outputs, to which each token and feature counts differently."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(D, 2)

    def forward(self, x):
        x = torch.tanh(x * torch.linspace(0.5, 1.5, x.shape[1]).to(x).unsqueeze(-1)) if x.dim() == 3 else torch.tanh(x)
        return self.read(x.mean(1) if x.dim() == 3 else x)


class Squares(nn.Module):
    """No parameters: outputs of which the head is a part in the other nets."""

    def forward(self, x):
        flat = x.flatten(1)
        return torch.stack([flat.square().mean(1), flat.tanh().mean(1)], 1)


TABLES = {
    "one token": (lambda: nn.Embedding(V, D), ()),
    "tokens": (lambda: nn.Embedding(V, D), (4,)),
    "grids of tokens": (lambda: nn.Embedding(V, D), (2, 3)),
    "padding": (lambda: nn.Embedding(V, D, padding_idx=1), (4,)),
    "sparse": (lambda: nn.Embedding(V, D, sparse=True), (4,)),
    "bag, mean": (lambda: nn.EmbeddingBag(V, D), (4,)),
    "bag, sum": (lambda: nn.EmbeddingBag(V, D, mode="sum"), (4,)),
    "bag, mean, padding": (lambda: nn.EmbeddingBag(V, D, mode="mean", padding_idx=0), (4,)),
}


def made(name, head=True, seed=0):
    build, shape = TABLES[name]
    torch.manual_seed(seed)
    middle = nn.Flatten(1, -2) if len(shape) == 2 else nn.Identity()
    net = nets.randomised(nn.Sequential(build(), middle, Head() if head else Squares()))
    x = torch.randint(V, (7, *shape))
    x.flatten()[:2] = 1  # the padded one occurs
    return net, x


@pytest.mark.parametrize("name", TABLES)
def test_exact_quantities(name, monkeypatch):
    net, x = made(name)
    monkeypatch.setattr("fisherviz.capture.take.generic_captures", None)
    probe = fv.Probe(net, "gaussian")
    fisher = probe.fisher(x)
    F = exact.fisher(net, x, laws.Gaussian())
    assert_matches(fisher.to_dense(), F)
    table = probe.layers[0]
    assert (table.path, table.kind, table.in_features, table.out_features) == ("structured", "embedding", V, D)
    where = np.arange(V * D) % D
    for unit, block in enumerate(fisher.units(0)):
        assert_matches(block, F[: V * D, : V * D][np.ix_(where == unit, where == unit)])
    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy(), 1e-10)
    assert_matches(fisher.solve(v[:, 0], 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v[:, 0].numpy()), 1e-9)
    assert fisher.norm("fro", block=(0, 0)) == pytest.approx(np.linalg.norm(F[: V * D, : V * D]))
    assert fisher.norm("fro", block=(0, 1)) == pytest.approx(np.linalg.norm(F[: V * D, V * D :]))
    assert_matches(fisher.diagonal(), np.diag(F))


@pytest.mark.parametrize("name", TABLES)
def test_labels_and_the_natural_gradient(name):
    net, x = made(name)
    y = torch.randint(2, (len(x),))
    fisher = fv.Probe(net, "categorical").fisher((x, y))
    F = exact.fisher(net, x, laws.Categorical())
    gradient = fisher.gradient().numpy()
    loss = nn.functional.cross_entropy(net(x), y)
    expected = torch.autograd.grad(loss, list(net.parameters()))
    assert_matches(gradient, torch.cat([g.to_dense().reshape(-1) for g in expected]))
    assert_matches(fisher.natural_gradient(damping=0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), gradient), 1e-9)


def one_hot(net, x):
    """Inputs of the table as rows of what it multiplies, (N, T, V): 0 for padding."""
    table = net[0]
    a = nn.functional.one_hot(x.reshape(len(x), -1), V).double()
    if table.padding_idx is not None:
        a[..., table.padding_idx] = 0
    if isinstance(table, nn.EmbeddingBag) and table.mode == "mean":
        a /= a.sum((1, 2), keepdim=True).clamp(min=1)
    return a


def scores(net, x):
    """Gradients of both outputs at what the table returns, for each token that is read: (2, N, T, D)."""
    out = net[0](x).detach().requires_grad_()
    z = net[2](net[1](out))
    g = torch.stack([torch.autograd.grad(z[:, k].sum(), out, retain_graph=True)[0] for k in range(2)])
    a = one_hot(net, x)
    g = g.reshape(2, len(x), -1, D).expand(-1, -1, a.shape[1], -1)
    return g * (a.sum(2, keepdim=True) > 0)


def table_order(matrix):
    """From (D, V) rows to the table's own order."""
    index = torch.arange(V * D).view(D, V).T.reshape(-1).numpy()
    return np.asarray(matrix)[np.ix_(index, index)]


@pytest.mark.parametrize("name", TABLES)
def test_kfac_is_the_product_of_the_counts_and_the_scores(name):
    net, x = made(name)
    a, g = one_hot(net, x), scores(net, x)
    A = torch.einsum("nti,ntj->ij", a, a).numpy() / len(x) / a.shape[1]
    G = torch.einsum("knto,kntp->op", g, g).numpy() / len(x)
    fisher = fv.Probe(net, "gaussian", layers=["0"]).fisher(x)
    for setting in ("expand", "reduce"):
        found = fv.approximate(fisher, "kfac", setting=setting)
        assert_matches(found.to_dense(), table_order(np.kron(G, A)))
    damped = fv.FactoredTikhonov(0.3)
    pi = ((np.trace(A) / V) / (np.trace(G) / D)) ** 0.5
    expected = table_order(np.kron(G + 0.3 / pi * np.eye(D), A + 0.3 * pi * np.eye(V)))
    v = torch.randn(V * D, dtype=torch.float64)
    assert_matches(found.solve(v, damped), np.linalg.solve(expected, v.numpy()), 1e-9)
    assert_matches(
        found.solve(v, 0.3), np.linalg.solve(found.to_dense().numpy() + 0.3 * np.eye(V * D), v.numpy()), 1e-9
    )
    foof = fv.approximate(fisher, "foof")
    assert_matches(foof.to_dense(), table_order(np.kron(np.eye(D), A * a.shape[1])))


@pytest.mark.parametrize("name", TABLES)
def test_ekfac_is_the_best_diagonal_in_the_basis_of_g(name):
    net, x = made(name)
    g = scores(net, x)
    fisher = fv.Probe(net, "gaussian", layers=["0"]).fisher(x)
    F = fisher.to_dense().numpy()
    _, Q = np.linalg.eigh(torch.einsum("knto,kntp->op", g, g).numpy())
    basis = np.zeros((V * D, V * D))
    for token in range(V):
        basis[token * D : (token + 1) * D, token * D : (token + 1) * D] = Q
    expected = basis @ np.diag(np.diag(basis.T @ F @ basis)) @ basis.T
    assert_matches(fv.approximate(fisher, "ekfac").to_dense(), expected)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", TABLES)
def test_the_nearest_product_has_a_diagonal_a(name, rank):
    net, x = made(name)
    fisher = fv.Probe(net, "gaussian", layers=["0"]).fisher(x)
    F = fisher.to_dense().view(V, D, V, D)
    R = torch.stack([F[token, :, token].reshape(-1) for token in range(V)])
    U, s, Vh = torch.linalg.svd(R)
    best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    found = fv.approximate(fisher, "nearest-kronecker", rank=rank)
    expected = torch.zeros(V, D, V, D, dtype=torch.float64)
    for token in range(V):
        expected[token, :, token] = best[token].view(D, D)
    assert_matches(found.to_dense(), expected.reshape(V * D, V * D), 1e-7)
    v = torch.randn(V * D, dtype=torch.float64)
    assert_matches(found.solve(v, 0.5), np.linalg.solve(found.to_dense().numpy() + 0.5 * np.eye(V * D), v), 1e-8)


def twins(tokens):
    """The same network with a table and with a linear layer, their inputs, and the order of their parameters."""
    net, _ = made("tokens")
    linear = nn.Sequential(nn.Linear(V, D, bias=False), nn.Identity(), copy.deepcopy(net[2])).double().eval()
    linear[0].weight.data = net[0].weight.data.T.clone()
    x = torch.cat([torch.full((i + 1,), i) for i in range(V)])  # no two tokens are equally frequent
    x = torch.cat([x, x[:1]])[torch.randperm(16, generator=torch.Generator().manual_seed(0))].view(-1, tokens)
    x = x.squeeze(1) if tokens == 1 else x
    index = torch.arange(sum(p.numel() for p in net.parameters()))
    index[: V * D] = torch.arange(V * D).view(D, V).T.reshape(-1)
    return net, linear, x, nn.functional.one_hot(x, V).double(), index


@pytest.mark.parametrize("method", list(fv.approximations))
@pytest.mark.parametrize("tokens", [1, 4])
def test_methods_are_those_of_a_linear_layer_on_one_hot_inputs(tokens, method):
    net, linear, x, a, index = twins(tokens)
    if method == "nearest-kronecker" and tokens > 1:
        pytest.skip("A of an embedding is diagonal, the nearest one of a linear layer is not")
    if method == "centred":
        pytest.skip("A of an embedding is diagonal, and stays so; a linear layer's takes its means' products")
    if method.startswith("kfac-") and tokens > 1:
        pytest.skip("layers of unequal positions are reduced, embeddings expanded")
    found = fv.approximate(fv.Probe(net, "gaussian").fisher(x), method).to_dense()
    twin = fv.approximate(fv.Probe(linear, "gaussian").fisher(a), method).to_dense()[index][:, index]
    if method.startswith("kfac-"):  # an embedding is not coupled with its neighbours
        twin[: V * D, V * D :] = twin[V * D :, : V * D] = 0
    assert_matches(found, twin, 1e-8)


@pytest.mark.covering
@pytest.mark.parametrize("optimizer", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree", "Diagonal", "layer"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_optimizers_step_as_on_one_hot_inputs(tokens, optimizer):
    net, linear, x, a, index = twins(tokens)
    y = torch.randint(2, (len(x),), generator=torch.Generator().manual_seed(0))

    def build(model):
        if hasattr(fv.optim, optimizer):
            return getattr(fv.optim, optimizer)(model, "categorical")
        return fv.optim.NaturalGradient(model, "categorical", optimizer.lower(), damping=0.1, lr=0.1)

    mine = trained(build, net, lambda model: nn.functional.cross_entropy(model(x), y))
    its = trained(build, linear, lambda model: nn.functional.cross_entropy(model(a), y))
    assert_matches(mine, its[index], 1e-8)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "nearest-kronecker", "layer"])
def test_an_optimizer_resumes_with_a_table(method, tmp_path):
    net, _, x, _, _ = twins(4)
    y = torch.randint(2, (len(x),), generator=torch.Generator().manual_seed(0))
    assert_resumes(
        lambda model: fv.optim.NaturalGradient(model, "categorical", method, lr=0.1, damping=0.1, T=3),
        net.train(), lambda model: nn.functional.cross_entropy(model(x), y), tmp_path,
    )  # fmt: skip


def test_in_float32_and_in_batches_of_other_lengths():
    torch.manual_seed(0)
    net = nets.randomised(nn.Sequential(nn.Embedding(V, D, padding_idx=0), nn.Identity(), Head()))
    long = torch.randint(1, V, (3, 6))
    short = torch.randint(1, V, (4, 2))
    F = (3 * exact.fisher(net, long, laws.Gaussian()) + 4 * exact.fisher(net, short, laws.Gaussian())) / 7
    fisher = fv.Probe(net, "gaussian").fisher([long, short])
    assert_matches(fisher.to_dense(), F)
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy(), 1e-10)
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
    found = fv.Probe(net.float(), "gaussian").fisher([long, short])
    assert_matches(found.to_dense(), F, 1e-5)
    assert_matches(found @ v.float(), F @ v.numpy(), 1e-5)


def test_a_table_that_is_read_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(V, D), Head()

        def forward(self, x):
            return self.head(self.table(x) * self.table(x.flip(1)).tanh())

    torch.manual_seed(0)
    net = nets.randomised(Twice())
    x = torch.randint(V, (6, 4))
    probe = fv.Probe(net, "gaussian")
    assert_matches(probe.fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert probe.layers[0].path == "structured"


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Embedding(V, D, max_norm=1.0), "max_norm changes its weight in the forward"),
        (lambda: nn.EmbeddingBag(V, D, mode="max"), "a maximum over rows is no sum"),
    ],
)
def test_tables_without_structure_say_why(build, why):
    net = nets.randomised(nn.Sequential(build(), nn.Identity(), Head()))
    assert fv.Probe(net, "gaussian").layers[0].note == why


def test_weighted_bags_are_exact_on_the_generic_path():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(V, D, mode="sum"), nn.Linear(D, 2)

        def forward(self, x, w):
            return self.head(self.table(x, per_sample_weights=w).tanh())

    torch.manual_seed(0)
    net = nets.randomised(Weighted())
    inputs = (torch.randint(V, (6, 4)), torch.randn(6, 4, dtype=torch.float64))
    probe = fv.Probe(net, "gaussian")
    found = probe.fisher([(inputs, torch.zeros(6, 2))]).to_dense()
    J = torch.stack(
        [
            torch.cat(
                [
                    g.reshape(-1)
                    for g in torch.autograd.grad(net(*(t[n : n + 1] for t in inputs))[0, k], list(net.parameters()))
                ]
            )
            for n in range(6)
            for k in range(2)
        ]
    )
    assert_matches(found, (J.T @ J / 6).numpy())
    assert probe.layers[0].path == "generic"
