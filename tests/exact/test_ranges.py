"""Fishers of zeros, of huge and tiny entries: what scales with the matrix does, what overflows names its layer."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.operators import SingularMatrixError
from fisherviz.operators.finite import NonFiniteMatrixError
from tests.oracles import nets

N = 6


def network(seed=0, dtype=torch.float32, bias=True):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias)).to(dtype)
    return net, torch.randn(N, 3).to(dtype), torch.randn(N, 2).to(dtype)


def scaled(variance, kind="exact"):
    net, x, y = network()
    if kind == "empirical":
        y = net(x).detach() + y
    return fv.Probe(net, fv.Gaussian(variance=variance)).fisher(x, y, kind=kind)


QUANTITIES = {
    "to_dense": lambda f: f.to_dense(),
    "diagonal": lambda f: f.diagonal(),
    "product": lambda f: f @ torch.ones(f.shape[0]),
    "quadratic": lambda f: f.quadratic(torch.ones(f.shape[0])),
    "frobenius": lambda f: f.norm(),
    "spectral": lambda f: f.norm("spectral"),
    "trace": lambda f: f.norm("trace"),
    "frobenius of a block": lambda f: f.norm(block=(0, 1)),
    "spectral of a block": lambda f: f.norm("spectral", block=(0, 1)),
    "spectrum": lambda f: f.spectrum(2),
    "cumulants": lambda f: fv.cumulants(f, progress=False).bound,
    **{method: lambda f, method=method: fv.approximate(f, method).to_dense() for method in fv.approximations},
    **{f"norm of {method}": lambda f, method=method: fv.approximate(f, method).norm() for method in fv.approximations},
}


@pytest.mark.covering
@pytest.mark.parametrize("variance", [1e-25, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_scales_with_the_fisher_does_in_float32(quantity, variance):
    ask = QUANTITIES[quantity]
    one, other = (np.asarray(ask(scaled(v)), dtype=np.float64) for v in (1.0, variance))
    factor = 1.0 if any(word in quantity for word in ("identity", "foof")) else variance
    assert np.linalg.norm(other * factor - one) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.parametrize("variance", [1e-22, 1e22])
def test_relative_errors_do_not_hang_on_the_scale(variance):
    methods = ["kfac", "diagonal", "ekfac", "nearest-kronecker"]
    metrics = ["relative_frobenius", "relative_spectral", "frobenius_cosine"]
    one, other = (fv.compare(scaled(v), methods, metrics=metrics, progress=False).summary() for v in (1.0, variance))
    for metric in metrics:
        np.testing.assert_allclose(other[metric].loc[methods], one[metric].loc[methods], rtol=1e-5)


# ---- zero ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_zero_fisher_has_zeros_for_answers(dtype):
    net, x, _ = network(dtype=dtype, bias=False)
    fisher = fv.Probe(net, "gaussian").fisher(torch.zeros_like(x))
    for order in ("fro", "spectral", "trace"):
        assert fisher.fresh().norm(order) == 0
    assert len(fisher.spectrum()) == 0
    assert not fisher.to_dense().any()
    torch.testing.assert_close(fisher.solve(torch.ones(20, dtype=dtype), 0.5), torch.full((20,), 2.0, dtype=dtype))
    with pytest.raises(SingularMatrixError, match="the Fisher"):
        fisher.solve(torch.ones(20, dtype=dtype), 0.0)
    assert fisher.sample(1e-4, 3).isfinite().all()


# ---- overflow ------------------------------------------------------------------------


def overflowing(dtype=torch.float32):
    """Of its second layer only: the first one's inputs are usual, its outputs huge."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.mul_(1e20)
        net[2].weight.mul_(1e-20)
    x, y = torch.randn(N, 3), torch.randn(N, 2)
    return fv.Probe(net.to(dtype), "gaussian").fisher(x.to(dtype), y.to(dtype))


ASKED = {
    name: ask
    for name, ask in QUANTITIES.items()
    if not any(word in name for word in ("identity", "norm of", "block", "cumulants", "quadratic"))
} | {
    "solve": lambda f: f.solve(torch.ones(f.shape[0]), 0.1),
    "natural_gradient": lambda f: f.natural_gradient(0.1),
    "inverse": lambda f: f.inverse(0.1),
    "log_determinant": lambda f: f.log_determinant(0.1),
    "example_gram": lambda f: f.example_gram(),
    "sample": lambda f: f.sample(0.1, 1),
    "units": lambda f: f.units(1),
    "compare": lambda f: fv.compare(f, progress=False),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_overflow_names_its_layer(asked):
    with pytest.raises(NonFiniteMatrixError, match=r"layer '2'.*(holds|gave) NaN or infin.*; look at the data"):
        ASKED[asked](overflowing().fresh())


def test_a_quadratic_form_beyond_float32_is_a_number_all_the_same():
    """It comes from the outputs' derivatives, which are within the range, and is summed in float64."""
    found = overflowing().quadratic(torch.ones(26))
    assert found > torch.finfo(torch.float32).max
    assert found == pytest.approx(overflowing(torch.float64).quadratic(torch.ones(26, dtype=torch.float64)), rel=1e-5)


def test_a_vector_that_is_not_finite_is_refused():
    fisher = scaled(1.0)
    v = torch.ones(fisher.shape[0])
    v[3] = torch.nan
    for ask in (fisher.__matmul__, fisher.quadratic, lambda v: fisher.solve(v, 0.1)):
        with pytest.raises(ValueError, match=r"a vector must be finite in torch\.float32"):
            ask(v)


# ---- solves ------------------------------------------------------------------------


def categorical(examples, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(examples, 3), torch.randint(3, (examples,))
    return fv.Probe(net, "categorical").fisher(x.to(dtype), y)


@pytest.mark.parametrize("examples", [4, 60])
@pytest.mark.parametrize("power", range(0, 13, 2))
def test_a_solve_of_the_fisher_is_near_or_warned_of_or_refused(power, examples):
    fisher = categorical(examples)
    damping = fisher.norm("spectral") * 10.0**-power
    F = fisher.in_example_space().double()
    for v in (fisher.gradient(), torch.randn(fisher.shape[0])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                x = fisher.fresh().solve(v, damping)
            except SingularMatrixError as error:
                assert error.damping > damping  # noqa: PT017 — one of three right ends
                continue
        if said:
            assert power > 4
            assert said[0].filename == __file__
            continue
        image = fisher.space.join(F.product(fisher.space.split(x.double().unsqueeze(1))))[:, 0] + damping * x.double()
        assert float((image - v.double()).norm()) <= 2e-2 * float(v.norm())


@pytest.mark.parametrize("prior", [1e-8, 1e-4, "from 1e-12 to 1"])
def test_samples_of_a_small_prior_have_the_posteriors_covariance(prior):
    """U of float32 times a prior's covariance of 1e12: the Gram matrix once drowned what is added to it."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net = nets.mlp(3, 4, 3).to(dtype)
        fisher = fv.Probe(net, "categorical").fisher(torch.randn(4, 3, dtype=torch.float64).to(dtype))
        given = torch.logspace(-12, 0, fisher.shape[0], dtype=torch.float64) if isinstance(prior, str) else prior
        weights = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        sample = fisher.sample(given, 50, torch.Generator().manual_seed(1)) - weights
        found.append(torch.as_tensor(given).sqrt() * sample.double())
    assert float((found[0] - found[1]).norm()) <= 0.1 * float(found[1].norm())


def test_a_prior_that_is_too_small_is_told_as_such():
    with pytest.raises(SingularMatrixError, match=r"posterior precision .*; take a prior_precision of at least"):
        categorical(60).sample(1e-12, 3)


def test_copies_of_a_fisher_are_compared_one_after_the_other():
    """Operations were known of the first copy, seconds of none: the second comparison ended in a KeyError."""
    fisher = scaled(1.0)
    tables = [fv.compare(fisher.fresh(), ["foof"], progress=False).whole("passes") for _ in range(2)]
    assert tables[0] == tables[1]
