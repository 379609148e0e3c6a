"""Products and forms that optimizers make of the exact Fisher, on models for which forward mode is wrong.

Forward mode ignores `torch.no_grad`; in reverse mode the padding row of an embedding has no gradient. Both are held
to brute force, on batches where the first shows nothing. Parameters that are used past their slots have no tangent, nor
has what follows an operation whose rule loses it: products by forward and by reverse mode then lack the same part.
"""

from functools import partial

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


class PastItsSlots(nn.Module):
    """Weights and bias of the last layer are used from a list, a closure or a view, or those of all layers are."""

    def __init__(self, how, everywhere):
        super().__init__()
        self.first, self.last = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((3, 4), (4, 2)))
        self.everywhere = everywhere
        self.held = {name: self.linear(how, getattr(self, name)) for name in ("first", "last")}

    def linear(self, how, layer):
        weight, bias = layer.weight, layer.bias
        if how == "list":
            return lambda x, parts=(weight, bias): nn.functional.linear(x, *parts)
        if how == "closure":
            return partial(nn.functional.linear, weight=weight, bias=bias)
        turned, same = weight.T, bias.view(-1)
        return lambda x: x @ turned + same

    def forward(self, x):
        z = torch.tanh(self.held["first"](x) if self.everywhere else self.first(x))
        return self.held["last"](z)


class TwoHeads(nn.Module):
    """Of two outputs one has its weights from a list."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.held = [self.other.weight, self.other.bias]

    def forward(self, x):
        z = torch.tanh(self.first(x))
        return torch.cat([self.one(z), nn.functional.linear(z, *self.held)], 1)


class Multiplied(nn.Module):
    """The output is a product by `scatter_reduce`, whose rule of forward mode gives zero."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        z = self.last(x)
        index = torch.tensor([0, 1, 0, 1]).expand(len(x), 4)
        return torch.ones(len(x), 2, dtype=z.dtype).scatter_reduce(1, index, z, "prod")


def rows():
    return tuple(torch.randn(2, 4, 3).double())


MODELS = {
    **{
        f"{how}, {'everywhere' if everywhere else 'last layer'}": (partial(PastItsSlots, how, everywhere), rows)
        for how in ("list", "closure", "view")
        for everywhere in (True, False)
    },
    "one of two heads from a list": (TwoHeads, rows),
    "a product by scatter_reduce": (Multiplied, rows),
    "a stopped branch": (SelfDistilled, rows),
    "padding first": (lambda: Bag(0), lambda: words(0)),
    "padding last": (lambda: Bag(-1), lambda: words(-1)),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)),
        rows,
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
        net.train()(x).sum().backward()  # as before every step: shows which layers act past their forward
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
