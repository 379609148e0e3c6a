"""Networks in half precision: they run in it, and everything from their captures on is float32."""

import pytest
import torch
from torch import nn

import fisherviz as fv

N, D = 40, 6
HALVES = {torch.bfloat16: 0.02, torch.float16: 0.002}
"""Types, and the relative rounding of a network of three layers that runs in them."""
halves = pytest.mark.parametrize("dtype", HALVES)


def setting(dtype):
    """A network and data in half precision; the matrix of the same weights by autograd in float64, with a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)
    x, y = torch.randn(N, D).to(dtype), torch.randint(4, (N,))
    exact = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4)).double()
    exact.load_state_dict({name: t.double() for name, t in net.state_dict().items()})
    parameters, F, g = list(exact.parameters()), 0.0, 0.0
    for n in range(N):
        log_p = torch.log_softmax(exact(x[n : n + 1].double()), 1)[0]
        for c in range(4):
            parts = torch.autograd.grad(log_p[c], parameters, retain_graph=True)
            score = torch.cat([p.reshape(-1) for p in parts])
            F = F + float(log_p[c].detach().exp()) * torch.outer(score, score) / N
            g = g - score * (float(c == y[n]) / N)
    return net, x, y, F, g


def close(actual, expected, tolerance, dtype=torch.float32):
    """A vector comes back in the type in which it was given: rounded to it, and to nothing before."""
    assert actual.dtype == dtype
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    assert float((actual.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.covering(2)
@halves
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("given", ["half", "float32", "float64"])
def test_products_and_solves(dtype, kept, given):
    net, x, y, F, g = setting(dtype)
    fisher = fv.Probe(net, "categorical").fisher(x, y)
    own = fv.Probe(net, "categorical").fisher(x, y).to_dense().double()
    close(own.float(), F, HALVES[dtype])
    v = torch.randn(len(F), dtype=torch.float64).to(dtype)
    right = {"half": v, "float32": v.float(), "float64": v.double()}[given]
    if kept:
        fisher.to_dense()
    back = dtype if given == "half" else torch.float32
    damped = own + 0.1 * torch.eye(len(F))
    close(fisher @ right, own @ v.double(), 1e-5, back)
    close(fisher @ torch.stack([right, right], 1), (own @ v.double()).unsqueeze(1).expand(-1, 2), 1e-5, back)
    close(fisher.solve(right, 0.1), torch.linalg.solve(damped, v.double()), 1e-5, back)
    assert fisher.quadratic(right) == pytest.approx(float(v.double() @ own @ v.double()), rel=1e-5)
    close(fisher.natural_gradient(0.1), torch.linalg.solve(F + 0.1 * torch.eye(len(F)), g), 2 * HALVES[dtype])


@halves
def test_parts_norms_spectra_and_samples(dtype):
    net, x, y, F, g = setting(dtype)
    fisher = fv.Probe(net, "categorical").fisher(x, y)
    close(fisher.diagonal(), F.diagonal(), HALVES[dtype])
    close(fisher.block(0, 2), F[:56, 72:], HALVES[dtype])
    close(fisher.gradient(), g, 3 * HALVES[dtype])
    own = fisher.to_dense().double()
    assert fisher.fresh().norm() == pytest.approx(float(own.norm()), rel=1e-5)
    assert fisher.fresh().norm("spectral") == pytest.approx(float(torch.linalg.matrix_norm(own, 2)), rel=1e-5)
    found = fisher.fresh().spectrum(3)
    assert torch.allclose(found, torch.linalg.eigvalsh(own).flip(0)[:3], rtol=1e-5)
    assert fisher.sample(1.0, 3).dtype == torch.float32
    for kind in ("mc", "empirical"):
        other = fv.Probe(net, "categorical").fisher(x, y, kind=kind)
        v = torch.randn(len(F)).to(dtype)
        product = other @ v.float()
        close(product, other.to_dense().double() @ v.double(), 1e-5)


@halves
@pytest.mark.parametrize("method", ["diagonal", "layer", "kfac", "ekfac", "nearest-kronecker"])
def test_approximations_work_in_float32(dtype, method):
    net, x, y, _, _ = setting(dtype)
    probe = fv.Probe(net, "categorical", layers=["0", "3"])
    fitted = fv.approximate(probe.fisher(x, y), method)
    dense = fitted.to_dense().double()
    v = torch.randn(len(dense)).to(dtype)
    solved = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)), v.double())
    for right, back in ((v, dtype), (v.float(), torch.float32)):
        close(fitted @ right, dense @ v.double(), 1e-5, back)
        close(fitted.solve(right, 0.1), solved, 1e-5, back)


@halves
def test_a_comparison(dtype):
    net, x, y, _, _ = setting(dtype)
    probe = fv.Probe(net, "categorical", layers=["0", "3"])
    fisher = probe.fisher(x, y)
    found = fv.compare(fisher, ["kfac", "diagonal"], progress=False).summary()
    F = fisher.to_dense().double()
    for method in ("kfac", "diagonal"):
        gap = (F - fv.approximate(fisher, method).to_dense().double()).norm() / F.norm()
        assert found.loc[method, "relative_frobenius"] == pytest.approx(float(gap), rel=1e-4)
