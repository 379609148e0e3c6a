"""The zoo × every method × {product, solve, norm, step}: analysis and optimizers apply the same matrices.

The matrices with an oracle of their own (the exact block of each layer, the diagonal, the identity) are held to brute
force; of every method, product, solve and norms are held to its dense matrix, and a training step to the dense solve.
A method may refuse a network in one sentence.
"""

import warnings

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.covering import some
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.oracles.zoo import CASES, EACH

LAMBDA = 0.5
ITS_OWN_TRAINING_MODE = {"spectral norm"}
"""Networks that are another function in training mode: its forward moves the buffers of the power iteration."""

pytestmark = pytest.mark.filterwarnings("ignore")


def made(name):
    build, data = CASES[name]
    torch.manual_seed(0)
    return nets.randomised(build()), data()


def blocks_of(F, fisher, model):
    """The block-diagonal part of a matrix in torch order, layer by layer."""
    starts, at = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            starts[name], at = at, at + p.numel()
    out = torch.zeros_like(F)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for layer in fisher.layers:
        index = torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in layer.parameters])
        out[index.unsqueeze(1), index] = F[index.unsqueeze(1), index]
    return out


def check_refusal(error):
    """One sentence for the user, no raw error."""
    assert isinstance(error, ValueError | TypeError | RuntimeError | NotImplementedError | MemoryError)
    text = str(error)
    assert text.strip().endswith(".")
    assert len(text) < 400


@pytest.mark.parametrize("name", some(CASES, *EACH))
def test_products_solves_and_norms_of_every_method(name):
    net, x = made(name)
    F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
    fisher = fv.Probe(net, "gaussian").fisher(x)
    v, eye = torch.randn(len(F), 2).double(), torch.eye(len(F)).double()
    fitted = 0
    for method in fv.approximations:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                approximation = fv.approximate(fisher, method)
            except (ValueError, TypeError, RuntimeError, MemoryError) as error:
                check_refusal(error)
                continue
        fitted += 1
        dense = approximation.to_dense()
        oracle = {"layer": lambda: blocks_of(F, fisher, net), "diagonal": lambda: torch.diag(F.diagonal())}
        oracle["identity"] = lambda: eye
        if method in oracle:
            assert_matches(dense, oracle[method]())
        assert_matches(approximation @ v, dense @ v, 1e-8)
        assert_matches(approximation.diagonal(), dense.diagonal())
        assert approximation.norm("fro") == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-8, abs=1e-12)
        assert approximation.norm("trace") == pytest.approx(float(dense.trace()), rel=1e-8, abs=1e-12)
        largest = float(torch.linalg.eigvalsh((dense + dense.T) / 2).abs().max())
        assert approximation.norm("spectral") == pytest.approx(largest, rel=1e-5, abs=1e-12)
        solved = torch.linalg.solve(dense + LAMBDA * eye, v)
        assert_matches(approximation.solve(v, LAMBDA), solved, 1e-7)
    assert fitted >= 5


def without_randomness(net):
    """Training mode with the same function as evaluation mode."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm):
            module.eval()
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return net


def gradient_of(net, names):
    parameters = dict(net.named_parameters())
    found = [parameters[n].grad for n in names]
    parts = [torch.zeros_like(parameters[n]) if g is None else g.to_dense() for n, g in zip(names, found, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


STEPPING = [name for name in CASES if name not in ITS_OWN_TRAINING_MODE]


@pytest.mark.covering
@pytest.mark.parametrize("name", some(STEPPING, *(name for name in EACH if name in STEPPING)))
@pytest.mark.parametrize(
    "method", ["diagonal", "kfac", "ekfac", "layer", "foof", "cw-ngd", "kfac-tridiagonal", "exact"]
)
def test_a_step_applies_the_matrix_that_is_analysed(name, method):
    net, x = made(name)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    try:
        dense = fisher.to_dense() if method == "exact" else fv.approximate(fisher, method).to_dense()
        names = [place.name for place in fisher.space.places]
        optimizer = fv.optim.NaturalGradient(
            without_randomness(net), "gaussian", method, lr=1.0, damping=LAMBDA, kind="exact"
        )
        z = net(x)
        (0.5 * (z - 0.3).square().sum() / len(x)).backward()
        v = gradient_of(net, names)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer.step()
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        check_refusal(error)
        return
    after = dict(net.named_parameters())
    moved = torch.cat([(before[n] - after[n].detach()).reshape(-1) for n in names])
    solved = torch.linalg.solve(dense + LAMBDA * torch.eye(len(v)).double(), v)
    assert_matches(moved, solved, 1e-6)
