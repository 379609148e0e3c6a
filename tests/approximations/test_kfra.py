"""KFRA against an explicit recursion, where it must be exact, and where the recursion has to stop."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherviz as fv
from tests.oracles import kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches
from tests.oracles.steps import closure_of, data, net

ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU, nn.Softplus, nn.Identity)


def kfra_and_kfac(model, x, likelihood="categorical", **options):
    fisher = fv.Probe(model, likelihood).fisher(x, **options)
    return [fv.approximate(fisher, method) for method in ("kfra", "kfac")]


def quietly(model, x, likelihood="categorical"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kfra_and_kfac(model, x, likelihood)


def by_recursion(model, x, likelihood):
    A, G = kronecker.factors(trace.moments(model, x, laws.ALL[likelihood]))
    return order.to_torch(kronecker.kfra(A, G, trace.passed_on(model, x)), trace.layers_of(model))


@pytest.mark.parametrize("likelihood", laws.ALL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_recursion_written_out(activation, likelihood):
    model, x = nets.mlp(3, 5, 4, 2, activation=activation), nets.vectors(12, 3)
    kfra, kfac = quietly(model, x, likelihood)
    assert kfra.reached == {"0", "2"}
    assert len(trace.passed_on(model, x)) == 2
    assert_matches(kfra.to_dense(), by_recursion(model, x, likelihood), 1e-10)
    assert torch.equal(kfra.operators[2].G, kfac.operators[2].G)
    if activation is not nn.Identity:
        assert torch.linalg.norm(kfra.operators[0].G - kfac.operators[0].G) > 1e-3 * kfac.operators[0].G.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_example_leaves_it_exact(activation):
    model, x = nets.mlp(3, 5, 4, 2, activation=activation), nets.vectors(1, 3)
    kfra, kfac = quietly(model, x)
    assert_matches(kfra.to_dense(), kfac.to_dense(), 1e-10)
    exact = fv.approximate(fv.Probe(model, "categorical").fisher(x), "layer")
    assert_matches(kfra.to_dense(), exact.to_dense(), 1e-10)


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_linear_networks_have_k_facs_factors(kind):
    model, x = nets.mlp(3, 5, 4, 2, activation=nn.Identity), nets.vectors(9, 3)
    kfra, kfac = kfra_and_kfac(model, x, kind=kind)
    assert_matches(kfra.to_dense(), kfac.to_dense(), 1e-10)


def test_its_factors_are_semidefinite():
    kfra, _ = kfra_and_kfac(nets.mlp(6, 5, 4, 3), nets.vectors(50, 6))
    for operator in kfra.operators:
        values = torch.linalg.eigvalsh(operator.G)
        assert values[0] > -1e-12 * values[-1]


def test_examples_of_which_no_gradient_comes_back_count_with_their_slopes():
    """Behind a layer of units that are all off, slopes are no ratio of gradients."""
    model, x = nets.mlp(3, 5, 2, 2, activation=nn.ReLU), nets.vectors(60, 3)
    with torch.no_grad():
        model[2].bias.sub_(1.0)
    off = (model[:4](x) == 0).all(1) & (model[:2](x) > 0).any(1)
    assert off.any()
    kfra, _ = quietly(model, x)
    assert_matches(kfra.to_dense(), by_recursion(model, x, "categorical"), 1e-10)


class Functional(nn.Module):
    """An activation that no module stands for, of which a part is in place, with a step of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = functional.relu_(self.first(x))
        h = self.second(h)
        return self.last(h * torch.sigmoid(h) + 0.1 * h.sin())


class Swish(nn.Module):
    """The second activation of `Functional`."""

    def forward(self, h):
        return h * torch.sigmoid(h) + 0.1 * h.sin()


def test_functions_are_seen_as_modules_are():
    model, x = nets.randomised(Functional()), nets.vectors(12, 3)
    kfra, _ = quietly(model, x)
    written = nn.Sequential(model.first, nn.ReLU(), model.second, Swish(), model.last)
    assert_matches(kfra.to_dense(), by_recursion(written, x, "categorical"), 1e-10)


class Residual(nn.Module):
    """The first layer's output goes to the second, and past it."""

    def __init__(self, share):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.share = share

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.second(h)) + self.share * h)


class Parallel(nn.Module):
    """Two layers side by side that follow one another in execution alone."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.left(x)) * torch.tanh(self.right(x)))


class Late(nn.Module):
    """Element-wise for examples of small inputs alone, of which a first batch consists."""

    def forward(self, x):
        return torch.where(x.abs().amax(1, keepdim=True) < 20, x.tanh(), (x / 100).softmax(1))


class Flipped(nn.Module):
    """Entries change their places, which no entry does by itself."""

    def forward(self, x):
        return x.flip(1)


STOPS = {
    "a skip connection": (lambda: Residual(1.0), 3, {"first"}, {"second"}),
    "a weak skip connection": (lambda: Residual(0.05), 3, {"first"}, {"second"}),
    "softmax": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)), 3, {"0"}, set()),
    "reordered": (
        lambda: nn.Sequential(nn.Linear(3, 4), Flipped(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        3,
        {"0"},
        {"2"},
    ),
    "normalisation": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        3,
        {"0"},
        {"2"},
    ),
    "layers side by side": (Parallel, 4, {"left"}, set()),
}


@pytest.mark.filterwarnings("ignore:.*single features")
@pytest.mark.parametrize("case", STOPS)
def test_where_the_recursion_stops_stands_k_facs_factor_and_it_is_said(case):
    build, width, stops, reached = STOPS[case]
    model, x = nets.randomised(build()), nets.vectors(12, width)
    with pytest.warns(UserWarning, match="recursion") as caught:
        kfra, kfac = kfra_and_kfac(model, x)
    said = next(str(w.message) for w in caught if "recursion" in str(w.message))
    assert all(repr(name) in said for name in stops)
    assert not any(repr(name) in said for name in reached)
    assert kfra.reached >= reached
    assert not kfra.reached & stops
    for layer, one, other in zip(kfra.space.layers, kfra.operators, kfac.operators, strict=True):
        if layer.name in stops:
            assert torch.equal(one.G, other.G)


def test_a_fault_that_only_a_later_batch_shows_stops_it_too():
    model = nets.randomised(nn.Sequential(nn.Linear(3, 4), Late(), nn.Linear(4, 2)))
    x = torch.cat([nets.vectors(8, 3), 300 * nets.vectors(8, 3)])
    fisher = fv.Probe(model, "gaussian").fisher(list(x.split(8)))
    with pytest.warns(UserWarning, match="does not reach '0'"):
        kfra = fv.approximate(fisher, "kfra")
    assert torch.equal(kfra.to_dense(), fv.approximate(fisher, "kfac").to_dense())


def test_convolutions_and_positions_are_k_facs():
    model = nets.randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nets.MeanTokens()))
    with pytest.warns(UserWarning, match="does not reach '0', which"):
        kfra, kfac = kfra_and_kfac(model, torch.randn(6, 5, 3, dtype=torch.float64))
    assert torch.equal(kfra.to_dense(), kfac.to_dense())


@pytest.mark.parametrize("order_of", [("kfac", "kfra"), ("kfra", "kfac"), ("layer", "kfra"), ("ekfac", "kfra")])
def test_it_hangs_on_nothing_that_was_fitted_before(order_of):
    model, x = nets.mlp(3, 5, 4, 2), nets.vectors(12, 3)
    fisher = fv.Probe(model, "categorical").fisher(x)
    found = {method: fv.approximate(fisher, method).to_dense() for method in order_of}
    assert_matches(found["kfra"], by_recursion(model, x, "categorical"), 1e-10)
    both = fv.compare(fv.Probe(model, "categorical").fisher(x), list(order_of), progress=False)
    assert set(both.methods) == set(order_of)


def test_a_layer_in_the_middle_that_is_not_probed_stops_it():
    model, x = nets.mlp(3, 4, 4, 4, 2), nets.vectors(12, 3)
    fisher = fv.Probe(model, "categorical", layers=["0", "4", "6"]).fisher(x)
    with pytest.warns(UserWarning, match="does not reach '0', which"):
        kfra = fv.approximate(fisher, "kfra")
    assert kfra.reached == {"4"}
    whole, _ = quietly(model, x)
    assert_matches(kfra.operators[1].G, whole.operators[2].G, 1e-12)


def test_frozen_weights_pass_it_on():
    model, x = nets.mlp(3, 5, 4, 2), nets.vectors(12, 3)
    whole, _ = quietly(model, x)
    model[2].weight.requires_grad_(False)
    some, _ = quietly(model, x)
    assert_matches(some.operators[0].G, whole.operators[0].G, 1e-12)


def test_half_precision_goes_through_the_same_recursion():
    model, x = nets.mlp(6, 8, 8, 3), nets.vectors(40, 6)
    whole, _ = quietly(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = kfra_and_kfac(model.float(), x.float())
    assert half.reached == whole.reached
    assert_matches(half.to_dense().double(), whole.to_dense(), 0.05)


def steps(model, batches, **options):
    optimizer = fv.optim.NaturalGradient(
        model.train(), "categorical", "kfra", lr=0.5, damping=0.1, kind="exact", momentum=0.0, **options
    )
    for x, y in batches:
        optimizer.step(closure_of(optimizer, model, x, y))
    return optimizer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_gradient(model, x, y):
    loss = functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_it_trains_by_the_matrix_that_is_analysed():
    model, (x, y) = net(), data(20)
    M, before = fv.approximate(fv.Probe(model, "categorical").fisher(x), "kfra").to_dense(), flat(model)
    gradient = loss_gradient(model, x, y)
    steps(model, [(x, y)])
    expected = before - 0.5 * torch.linalg.solve(M + 0.1 * torch.eye(len(M)).double(), gradient)
    assert_matches(flat(model), expected, 1e-8)


def test_a_moving_average_is_that_of_slopes_inputs_and_outputs_with_the_newest_weights():
    model, optimizer, seen = net(), None, []
    for x, y in (data(20, 2), data(20, 3)):
        before, gradient = flat(model), loss_gradient(model, x, y)
        seen.append((kronecker.factors(trace.moments(model, x, laws.Categorical())), trace.passed_on(model, x)))
        optimizer = optimizer or steps(model, [], decay=0.5)
        optimizer.step(closure_of(optimizer, model, x, y))
    (A, G), (A2, G2) = (factors for factors, _ in seen)
    A, G = ({ij: 0.5 * one[ij] + 0.5 * two[ij] for ij in one} for one, two in ((A, A2), (G, G2)))
    both = {i: (np.concatenate([slopes, seen[1][1][i][0]]), seen[1][1][i][1]) for i, (slopes, _) in seen[0][1].items()}
    M = torch.as_tensor(order.to_torch(kronecker.kfra(A, G, both), trace.layers_of(model)))
    expected = before - 0.5 * torch.linalg.solve(M + 0.1 * torch.eye(len(M)).double(), gradient)
    assert_matches(flat(model), expected, 1e-8)


def test_training_resumes_bit_for_bit_between_factorisations():
    start = {name: p.clone() for name, p in net().state_dict().items()}
    batches = [data(20, seed) for seed in range(6)]
    whole, first, second = net(), net(), net()
    for model in (whole, first):
        model.load_state_dict(start)
    steps(whole, batches, T=4, decay=0.9)
    optimizer = steps(first, batches[:3], T=4, decay=0.9)
    second.load_state_dict(first.state_dict())
    resumed = steps(second, [], T=4, decay=0.9)
    resumed.load_state_dict(optimizer.state_dict())
    for x, y in batches[3:]:
        resumed.step(closure_of(resumed, second, x, y))
    assert torch.equal(flat(second), flat(whole))


def test_where_the_recursion_stops_training_takes_k_facs_factor_and_says_so(recwarn):
    found = []
    for method in ("kfra", "kfac"):
        torch.manual_seed(3)
        model, x = nets.randomised(Residual(1.0)).train(), nets.vectors(12, 3)
        with torch.no_grad():
            model.second.weight.zero_()  # what the second layer would pass on
        optimizer = fv.optim.NaturalGradient(model, "gaussian", method, lr=0.1, damping=0.1, kind="exact")
        optimizer.step(closure_of(optimizer, model, x, torch.zeros(12, dtype=torch.long)))
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_matches(found[0]["first.weight"], found[1]["first.weight"], 1e-12)
    said = [str(w.message) for w in recwarn]
    assert len(said) == 1
    assert said[0].startswith("kfra: the recursion does not reach 'first', which")


@pytest.mark.filterwarnings("ignore:kfra")
@pytest.mark.parametrize(("dropped", "as_kfac"), [(0, [True, False, True]), (1, [True] * 3), (2, [False, True, True])])
def test_where_a_layers_gradient_is_dropped_the_recursion_stops_before_it(dropped, as_kfac):
    """No pass of it counts, so that there is no weight to go through."""
    found = []
    for method in ("kfra", "kfac"):
        model, (x, y) = net(), data(20)
        optimizer = fv.optim.NaturalGradient(
            model, "categorical", method, lr=0.5, damping=0.1, kind="exact", decay=0.0, momentum=0.0
        )
        optimizer.step(closure_of(optimizer, model, x, y))
        model.load_state_dict(net().state_dict())
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        linears = [m for m in model if isinstance(m, nn.Linear)]
        linears[dropped].zero_grad()
        optimizer.step()
        found.append([m.weight.detach() for m in linears])
    assert [torch.allclose(one, two, rtol=1e-8, atol=1e-12) for one, two in zip(*found, strict=True)] == as_kfac


@pytest.mark.parametrize(("layers", "begins"), [(None, None), (["0"], "'0'"), (["0", "2"], "'2'"), (["2", "4"], "'4'")])
def test_it_says_where_it_begins_if_not_every_layer_is_probed(layers, begins):
    sizes = [5, 6, 4, 3]
    net = nn.Sequential(*(part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())))[:-1]
    fisher = fv.Probe(net.double(), "categorical", layers=layers).fisher(torch.randn(9, 5, dtype=torch.float64))
    notes = [note for note in fv.compare(fisher, "kfra").notes if "recursion" in note]
    assert notes == ([] if begins is None else [
        f"kfra: the recursion begins at {begins}, the last of the probed layers: kfac's G is taken there."
    ])  # fmt: skip
