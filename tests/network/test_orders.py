"""Torch, unit and input order of the dense matrix, and vectors that mean what PyTorch's flattening says."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fisherviz as fv
from tests.oracles import exact, laws, nets, order, trace
from tests.oracles.checks import assert_matches

orders = pytest.mark.parametrize("name", ["torch", "unit", "input"])


@orders
def test_dense_fisher_of_linear_layers_in_every_order(name):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    F = exact.fisher(net, x, laws.Categorical())
    actual = fv.Probe(net, "categorical").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, trace.layers_of(net), name))


@orders
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2}], ids=str)
def test_dense_fisher_of_convolutions_in_every_order(name, options):
    net = nets.conv_net(nn.Conv2d(2, 4, (2, 1), **options), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    actual = fv.Probe(net, "gaussian").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, trace.layers_of(net), name))


@orders
def test_layers_without_a_matrix_keep_torch_order(name):
    net = nets.randomised(nn.Sequential(nn.EmbeddingBag(3, 2, mode="max"), nn.Linear(2, 2)))
    x = torch.randint(3, (4, 1))
    F = exact.fisher(net, x, laws.Gaussian())
    actual = fv.Probe(net, "gaussian").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, [6, (2, 2, True)], name))


@orders
def test_a_normalisation_is_a_matrix_of_scale_and_shift(name):
    net = nets.randomised(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2)))
    x = nets.vectors(4, 3)
    F = exact.fisher(net, x, laws.Gaussian())
    actual = fv.Probe(net, "gaussian").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, [(2, 3, True), (2, 1, True), (2, 2, True)], name))


@orders
def test_dense_approximation_in_every_order(name):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    expected = order.reorder(approximation.to_dense().numpy(), trace.layers_of(net), name)
    assert_matches(approximation.to_dense(order=name), expected, 1e-14)


def test_default_order_is_torch_order():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher.to_dense(), fisher.to_dense(order="torch"), 0)


def test_dense_fisher_times_parameters_to_vector_means_what_it_says():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    law, y = laws.Categorical(), torch.tensor([0, 1, 1, 0, 1])
    nn.CrossEntropyLoss()(net(x), y).backward()
    gradient = nn.utils.parameters_to_vector(p.grad for p in net.parameters())
    assert_matches(gradient, exact.mean_gradient(net, x, y, law), 1e-12)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher @ gradient, exact.fisher(net, x, law) @ gradient.numpy())


def test_unit_order_of_one_example_is_g_times_a():
    net, x = nets.mlp(3, 2), nets.vectors(1, 3)
    a = torch.cat([x[0], torch.ones(1, dtype=torch.float64)])
    G = laws.Gaussian().output_fisher(net(x)[0])
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(order="unit"), torch.kron(G, torch.outer(a, a)), 1e-12)
    assert_matches(fisher.to_dense(order="input"), torch.kron(torch.outer(a, a), G), 1e-12)


@pytest.mark.parametrize("wrong", ["rows", "Torch", None, 3])
def test_an_unknown_order_is_refused_with_the_known_ones(wrong):
    fisher = fv.Probe(nets.mlp(2, 2), "gaussian").fisher(nets.vectors(2, 2))
    with pytest.raises((ValueError, TypeError), match="unit"):
        fisher.to_dense(order=wrong)
    with pytest.raises((ValueError, TypeError), match="unit"):
        fv.approximate(fisher, "kfac").to_dense(order=wrong)


def _bias_first(net: nn.Sequential) -> None:
    weight = net[0].weight
    del net[0].weight
    net[0].register_parameter("weight", weight)


def _pruned(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[0], "weight", amount=0.3)
    prune.remove(net[0], "weight")


def _old_weight_norm(net: nn.Sequential) -> None:
    nn.utils.remove_weight_norm(nn.utils.weight_norm(net[0]))


def _old_spectral_norm(net: nn.Sequential) -> None:
    nn.utils.remove_spectral_norm(nn.utils.spectral_norm(net[0]))


def _parametrized(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])
    parametrize.remove_parametrizations(net[0], "weight")


class _TiedAcross(nn.Module):
    """The last layer's weight is the first layer's, which is not probed itself: another layer stands between."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.n, self.m = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.m.weight = self.e.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.m(torch.tanh(self.n(torch.tanh(self.e(x)))))


def _reordered(change) -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    change(net)
    return nets.randomised(net)


REORDERED = {
    "as built": (lambda: _reordered(lambda net: None), None),
    "bias registered first": (lambda: _reordered(_bias_first), None),
    "prune.remove": (lambda: _reordered(_pruned), None),
    "remove_weight_norm": (lambda: _reordered(_old_weight_norm), None),
    "remove_spectral_norm": (lambda: _reordered(_old_spectral_norm), None),
    "remove_parametrizations": (lambda: _reordered(_parametrized), None),
    "a tie across a layer that is left out": (lambda: nets.randomised(_TiedAcross()), ["n", "m"]),
    "convolution with its bias first": (
        lambda: nets.conv_net(_swapped(nn.Conv2d(2, 3, 2)), nn.Conv2d(3, 2, 1)),
        None,
    ),
}


def _swapped(module: nn.Module) -> nn.Module:
    _bias_first([module])
    return module


@pytest.fixture(params=REORDERED, name="reordered")
def _reordered_network(request):
    """A Fisher of a network whose parameters stand in an unusual order, and the same by autograd alone."""
    torch.manual_seed(0)
    build, layers = REORDERED[request.param]
    net = build()
    x = torch.randn(6, 2, 3, 2) if "convolution" in request.param else torch.randn(6, 3)
    x = x.double()
    make = lambda: fv.Probe(net, "gaussian", layers=layers).fisher(x)  # noqa: E731
    probed = {name for info in make().layers for name in info.parameters}
    parameters = {name: p for name, p in net.named_parameters() if name in probed}
    F = torch.zeros(())
    for n in range(len(x)):
        rows = [
            torch.autograd.grad(z, list(parameters.values()), retain_graph=True) for z in net(x[n : n + 1]).flatten()
        ]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        F = F + J.T @ J / len(x)
    return net, parameters, make, F


def test_every_exact_quantity_in_the_order_of_named_parameters(reordered):
    _, parameters, make, F = reordered
    v, eye = torch.randn(len(F), 2).double(), torch.eye(len(F)).double()
    assert_matches(make().to_dense(), F)
    assert_matches(make().diagonal(), F.diagonal())
    assert_matches(make() @ v, F @ v)
    assert_matches(make().solve(v, 0.1), torch.linalg.solve(F + 0.1 * eye, v))
    held = make()
    held.to_dense()
    assert_matches(held.solve(v, 0.1), torch.linalg.solve(F + 0.1 * eye, v))
    as_dictionary = dict(zip(parameters, v[:, 0].split([p.numel() for p in parameters.values()]), strict=True))
    as_dictionary = {name: part.view_as(parameters[name]) for name, part in as_dictionary.items()}
    product = make() @ as_dictionary
    assert list(product) == list(parameters)
    assert_matches(torch.cat([part.reshape(-1) for part in product.values()]), F @ v[:, 0])
    assert make().quadratic(v[:, 0]) == pytest.approx(float(v[:, 0] @ F @ v[:, 0]), rel=1e-9)


def test_blocks_and_approximations_in_the_order_of_named_parameters(reordered):
    _, parameters, make, F = reordered
    starts, at = {}, 0
    for name, p in parameters.items():
        starts[name], at = at, at + p.numel()
    index = {
        info.name: torch.cat([torch.arange(starts[n], starts[n] + parameters[n].numel()) for n in info.parameters])
        for info in make().layers
    }
    layerwise = torch.zeros_like(F)
    for held in (False, True):
        fisher = make()
        if held:
            fisher.to_dense()
        for row, rows in index.items():
            for col, cols in index.items():
                assert_matches(fisher.block(row, col), F[rows][:, cols])
            layerwise[rows.unsqueeze(1), rows] = F[rows][:, rows]
    approximation = fv.approximate(make(), "layer")
    v = torch.randn(len(F)).double()
    assert_matches(approximation.to_dense(), layerwise)
    assert_matches(approximation @ v, layerwise @ v)
    assert_matches(approximation.diagonal(), F.diagonal())
    assert_matches(fv.approximate(make(), "diagonal").to_dense(), F.diagonal().diag())


def test_a_step_in_the_order_of_named_parameters(reordered):
    net, parameters, make, F = reordered
    # without its own bias the tied weight is the first module's layer, but together with the second one's in the probe
    method = "diagonal" if isinstance(net, _TiedAcross) else "kfac"
    dense = fv.approximate(make(), method).to_dense()
    groups = [
        {"params": list(parameters.values())},
        {
            "params": [p for p in net.parameters() if all(p is not q for q in parameters.values())],
            "approximation": "none",
        },
    ]
    optimizer = fv.optim.NaturalGradient(
        net, "gaussian", method, params=[g for g in groups if g["params"]], lr=1.0, damping=0.3, kind="exact"
    )
    x = next(iter(make().data))[0]
    net.train()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    (0.5 * net(x).square().flatten(1).sum(1).mean()).backward()
    v = torch.cat([p.grad.reshape(-1) for p in parameters.values()])
    optimizer.step()
    moved = torch.cat([(before[name] - p.detach()).reshape(-1) for name, p in parameters.items()])
    assert_matches(moved, torch.linalg.solve(dense + 0.3 * torch.eye(len(F)).double(), v), 1e-8)


def test_layers_are_of_the_kind_that_their_module_is():
    modules = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Bilinear(2, 2, 3), nn.Embedding(4, 2), nn.Linear(3, 2)
    kinds = ["conv1d", "batchnorm1d", "bilinear", "embedding", "linear"]
    assert [layer.kind for layer in fv.Probe(nn.Sequential(*modules), "categorical").layers] == kinds
