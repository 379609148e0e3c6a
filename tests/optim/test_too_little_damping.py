"""A damping that is too small is refused before a weight moves, and what the refusal advises is enough."""

import re

import pytest
import torch
from torch import nn

import fisherviz as fv

OPTIMIZERS = {
    "CWNGD": lambda net, damping: fv.optim.CWNGD(net, "categorical", damping=damping),
    "TENGraD": lambda net, damping: fv.optim.TENGraD(net, "categorical", damping=damping),
    "sub-sampled": lambda net, damping: fv.optim.SubsampledNaturalGradient(net, "categorical", damping=damping),
    "exact": lambda net, damping: fv.optim.NaturalGradient(net, "categorical", "layer", lr=0.1, damping=damping),
    "kfac": lambda net, damping: fv.optim.KFAC(net, "categorical", rescale=False, adapt=False, damping=damping),
    "K-BFGS": lambda net, damping: fv.optim.KBFGS(net, "categorical", damping=damping),
    "KSD": lambda net, damping: fv.optim.KSD(net, "categorical", damping=damping),
    "Hessian-free": lambda net, damping: fv.optim.HessianFree(net, "categorical", damping=damping),
}
SINGULAR = (RuntimeError, ValueError)


def step_of(make, damping, scale):
    """One step on correlated inputs of a size, from the same weights; the weights before and after."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    x = scale * torch.randn(4, 6)
    x[:, 1] = x[:, 0]
    optimizer, y = make(net, damping), torch.arange(4) % 3

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in net.parameters()]
    try:
        optimizer.step(closure)
    except SINGULAR as error:
        return str(error), before, list(net.parameters())
    return "", before, list(net.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("damping", [1e-299, 1e-50, 1e-40, 1e-30, 1e-10])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_never_nan(name, damping, scale):
    said, before, after = step_of(OPTIMIZERS[name], damping, scale)
    assert all(bool(p.isfinite().all()) for p in after)
    if said:
        assert "damping" in said
        assert all(torch.equal(p, old) for p, old in zip(after, before, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "start", "meaning"),
    [
        (OPTIMIZERS["K-BFGS"], 1e-12, lambda number: number),
        (OPTIMIZERS["CWNGD"], 0.0, lambda number: number),
        (
            lambda net, damping: fv.optim.NaturalGradient(
                net, "categorical", "kfac", lr=0.1, damping=fv.FactoredTikhonov(damping**0.5, pi=1.0)
            ),
            0.0,
            lambda number: number**2,  # what is told is γ
        ),
        (
            lambda net, damping: fv.optim.KFAC(
                net, "categorical", inverse="block-tridiagonal", rescale=False, adapt=False,
                damping=fv.FactoredTikhonov(damping**0.5, pi=1.0),
            ),
            1e-12,
            lambda number: number**2,
        ),
    ],
    ids=["K-BFGS", "CWNGD", "factored", "factored, block-tridiagonal"],
)  # fmt: skip
def test_the_damping_that_is_advised_is_enough(make, start, meaning):
    said, _, _ = step_of(make, start, 1e6)
    number = re.search(r"of at least ([\de.+-]+\d)", said)
    assert number, said
    again, _, _ = step_of(make, meaning(float(number[1])), 1e6)
    assert not again


def test_a_layer_of_zeros_has_an_advice_that_is_a_number():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    optimizer = fv.optim.TENGraD(net, "categorical", damping=0.0)
    nn.functional.cross_entropy(net(torch.randn(8, 5)), torch.arange(8) % 3).backward()
    with pytest.raises(RuntimeError, match=r"layer '0': .* of at least 1e-18\."):
        optimizer.step()
