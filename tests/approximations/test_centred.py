"""What centring assumes: units without correlation, inputs that correlate by their means."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.operators import DiagonalKronecker
from tests.oracles import nets
from tests.oracles.steps import assert_same, closure_of, data, matrices, moved, net


def kfac_and_centred(model, x, likelihood="categorical", **options):
    fisher = fv.Probe(model, likelihood).fisher(x)
    return [fv.approximate(fisher, method, **options) for method in ("kfac", "centred")]


def test_one_input_and_one_output_leave_nothing_to_assume():
    kfac, centred = kfac_and_centred(nets.mlp(1, 1), nets.vectors(9, 1), "bernoulli")
    torch.testing.assert_close(centred.to_dense(), kfac.to_dense())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_off_its_diagonal_stand_products_of_means(bias, setting):
    model, x = nets.tokens_net(bias=bias), torch.randn(6, 4, 3, dtype=torch.float64)
    kfac, centred = kfac_and_centred(model, x, setting=setting)
    A, G = centred.operators[0].A, centred.operators[0].G
    mean = x.mean((0, 1)) if not bias else torch.cat([x.mean((0, 1)), torch.ones(1).double()])
    torch.testing.assert_close(A - A.diagonal().diag(), mean.outer(mean) - (mean**2).diag())
    torch.testing.assert_close(A.diagonal(), kfac.operators[0].A.diagonal())
    torch.testing.assert_close(G, kfac.operators[0].G.diagonal().diag())


def test_groups_are_centred_one_by_one():
    model = nets.conv_net(nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    kfac, centred = kfac_and_centred(model, x)
    patches = nn.functional.unfold(x, 2).view(5, 2, 8, 4).mean((0, 3))  # per group
    for group, (one, other) in enumerate(zip(kfac.operators[0].operators, centred.operators[0].operators, strict=True)):
        mean = torch.cat([patches[group], torch.ones(1).double()])
        expected = mean.outer(mean) + (one.A.diagonal() - mean**2).diag()
        torch.testing.assert_close(other.A, expected)
        torch.testing.assert_close(other.G, one.G.diagonal().diag())


def test_tokens_have_a_diagonal_already():
    model = nets.randomised(nn.Sequential(nn.Embedding(5, 3), nets.MeanTokens(), nn.Linear(3, 2)))
    kfac, centred = kfac_and_centred(model, torch.randint(5, (7, 4)))
    one, other = kfac.operators[0], centred.operators[0]
    assert isinstance(other, DiagonalKronecker)
    torch.testing.assert_close(other.A, one.A)
    torch.testing.assert_close(other.G, one.G.diagonal().diag())


def test_it_is_semidefinite():
    _, centred = kfac_and_centred(nets.mlp(6, 4, 3), nets.vectors(50, 6) + 2.0)
    values = torch.linalg.eigvalsh(centred.to_dense())
    assert values[0] > -1e-10 * values[-1]


def test_it_trains_by_the_matrix_that_is_analysed():
    model, (x, y) = net(), data(20)
    M = fv.approximate(fv.Probe(model, "categorical").fisher(x), "centred").to_dense()
    before = matrices(model)
    optimizer = fv.optim.NaturalGradient(model.train(), "categorical", "centred", lr=0.5, damping=0.1, kind="exact")
    closure_of(optimizer, model, x, y)()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    step = -0.5 * torch.linalg.solve(M + 0.1 * torch.eye(len(M)).double(), gradient)
    optimizer.step()
    pieces = step.split([p.numel() for p in model.parameters()])
    expected = [
        torch.cat([w.view(M.shape[0], -1), b[:, None]], 1)
        for w, b, M in zip(pieces[::2], pieces[1::2], before, strict=True)
    ]
    assert_same(moved(before, matrices(model)), expected, 1e-8)


@pytest.mark.parametrize(
    ("options", "message"), [({"setting": "sum"}, "setting must be one of"), ({"per_feature": "x"}, "per_feature")]
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fv.approximations["centred"](**options)
