"""Products and forms that optimizers make of the exact Fisher, on models for which forward mode is wrong.

Forward mode ignores `torch.no_grad`; in reverse mode the padding row of an embedding has no gradient. Both are held
to brute force, on batches where the first shows nothing.
"""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.optim.quadratic import FisherForms
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


class SelfDistilled(nn.Module):
    """A branch of the model stands still, as a teacher does."""

    def __init__(self):
        super().__init__()
        self.w, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            target = self.w(x)
        return self.last(torch.tanh(self.w(x)) + target)


class Bag(nn.Module):
    """Words and a padding row, which stands first or last."""

    def __init__(self, padding):
        super().__init__()
        self.e, self.last = nn.Embedding(6, 4, padding_idx=padding), nn.Linear(4, 2)

    def forward(self, ids):
        return self.last(torch.tanh(self.e(ids).mean(1)))


def words(padding):
    """Sequences by length, none padded in the first batch."""
    p = padding % 6
    first = torch.tensor([[1, 2, 3, 4], [2, 4, 1, 3], [4, 1, 3, 3], [3, 2, 2, 1]])
    return first, torch.tensor([[1, 2, 3, p], [2, 4, p, p], [4, p, p, p], [3, 2, 2, p]])


MODELS = {
    "a stopped branch": (SelfDistilled, lambda: tuple(torch.randn(2, 4, 3).double())),
    "padding first": (lambda: Bag(0), lambda: words(0)),
    "padding last": (lambda: Bag(-1), lambda: words(-1)),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)),
        lambda: tuple(torch.randn(2, 4, 3).double()),
    ),
}


def made(name):
    build, data = MODELS[name]
    torch.manual_seed(0)
    return nets.randomised(build()), data()


def directions(model, v):
    pieces = v.split([p.numel() for p in model.parameters()])
    return {p: d.view_as(p) for p, d in zip(model.parameters(), pieces, strict=True)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_forms_and_products_of_a_step_are_the_exact_fishers(name):
    net, batches = made(name)
    optimizer = fv.optim.HessianFree.paper(net, "gaussian")
    for x in batches:
        F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
        forms = FisherForms(optimizer._watcher, optimizer.likelihood, [((x,), {})])
        u, v = torch.randn(2, len(F)).double()
        images = [forms.tangents(directions(net, d)) for d in (u, v)]
        assert forms.form(*images) == pytest.approx(float(u @ F @ v), rel=1e-9)
        product = forms.product(directions(net, v))
        assert_matches(torch.cat([product[p].reshape(-1) for p in net.parameters()]), F @ v)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_fishers_products_too(name):
    net, batches = made(name)
    probe = fv.Probe(net, "gaussian")
    for x in batches:
        F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
        v = torch.randn(len(F)).double()
        assert_matches(probe.fisher(x) @ v, F @ v)
        assert probe.fisher(x).quadratic(v) == pytest.approx(float(v @ F @ v), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapt", [True, False])
def test_the_best_step_along_a_direction_is_by_the_exact_fisher(name, adapt):
    """K-FAC's α minimises the quadratic model along its first proposal: α = −∇hᵀΔ / Δᵀ(F + (λ+η)I)Δ (section 6.4)."""
    net, batches = made(name)
    optimizer = fv.optim.KFAC.paper(
        net.train(), "gaussian", momentum=0.0, adapt=adapt, damping=0.5, weight_decay=0.0, tau2=1.0
    )
    for x in batches:
        F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
        before = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        lam = optimizer.lam

        def closure(x=x):
            optimizer.zero_grad()
            loss = 0.5 * (net(x) - 1.0).square().sum(1).mean()
            loss.backward()
            return loss

        closure()
        g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        optimizer.step(closure)
        moved = torch.cat([p.detach().reshape(-1) for p in net.parameters()]) - before
        # moved = α Δ: the minimum along the line through it is at the factor 1
        curvature = moved @ F @ moved + lam * moved @ moved
        assert float(-(g @ moved) / curvature) == pytest.approx(1.0, rel=1e-6)
