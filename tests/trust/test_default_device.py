"""`torch.set_default_device` of the user's: a model and data on the CPU stay there, whatever new tensors default to.

The meta device stands for an accelerator: what lands there by default cannot be computed with.
"""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import nets
from tests.oracles.checks import assert_matches

NETS = {
    "dense": lambda: (nets.mlp(3, 4, 3), nets.vectors(6, 3)),
    "tokens": lambda: (
        nets.randomised(nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.GRU(3, 3, batch_first=True), First())),
        torch.randint(5, (5, 3)),
    ),
    "images": lambda: (
        nets.randomised(nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))),
        torch.randn(5, 2, 3, 3, dtype=torch.float64),
    ),
}


class First(nn.Module):
    """The mean state."""

    def forward(self, found):
        return found[0].mean(1)


def answers(net, x, y, v):
    """What is asked of a Fisher, and of every approximation of it."""
    out = {}
    for kind in ("exact", "mc"):
        fisher = fv.Probe(net, "categorical").fisher((x, y), kind=kind)
        out |= {f"{kind} {name}": getattr(fisher, name)() for name in ("to_dense", "diagonal", "gradient", "spectrum")}
        out[f"{kind} product"], out[f"{kind} solve"] = fisher @ v, fisher.solve(v, 0.3)
        out[f"{kind} sample"] = fisher.sample(1.0, 2)
        out[f"{kind} inverse"] = fisher.inverse(0.3).to_dense("unit")
    for method in fv.approximations:
        made = fv.approximate(fisher, method)
        out[method], out[f"{method} solve"] = made.to_dense("input"), made.solve(v, 0.3)
        out[f"{method} norms"] = torch.tensor([made.norm(order) for order in ("fro", "spectral")], device="cpu")
    found = fv.compare(fisher).frame
    kept = ~found["metric"].isin(["seconds"])
    out["comparison"] = torch.tensor(found["value"][kept].to_numpy(), device="cpu")
    return out


@pytest.mark.parametrize("name", ["dense", "tokens", pytest.param("images", marks=pytest.mark.soak)])
def test_every_quantity_is_computed_where_the_model_is(name):
    net, x = NETS[name]()
    y, v = torch.randint(3, (len(x),)), torch.randn(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = answers(net, x, y, v)
        with torch.device("meta"):
            found = answers(net, x, y, v)
    assert found.keys() == expected.keys()
    for what in expected:
        assert_matches(found[what], expected[what], 1e-12)


OPTIMIZERS = {
    "KFAC": lambda net: fv.optim.KFAC(net, "categorical"),
    "block-tridiagonal": lambda net: fv.optim.KFAC(net, "categorical", inverse="block-tridiagonal"),
    "FOOF": lambda net: fv.optim.FOOF(net, "categorical"),
    "EKFAC": lambda net: fv.optim.EKFAC(net, "categorical"),
    "CWNGD": lambda net: fv.optim.CWNGD(net, "categorical"),
    "TENGraD": lambda net: fv.optim.TENGraD(net, "categorical"),
    "exact": lambda net: fv.optim.NaturalGradient(net, "categorical", "exact"),
    "sub-sampled": lambda net: fv.optim.SubsampledNaturalGradient(net, "categorical"),
    "KBFGS": lambda net: fv.optim.KBFGS(net, "categorical", lr=0.1, damping=1.0),
    "HessianFree": lambda net: fv.optim.HessianFree(net, "categorical"),
    "KSD": lambda net: fv.optim.KSD(net, "categorical"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_where_the_model_is(name):
    x, y = nets.vectors(6, 3), torch.randint(3, (6,))
    one = nets.mlp(3, 4, 3).train()
    other = deepcopy(one)

    def trained(net):
        torch.manual_seed(0)
        optimizer = OPTIMIZERS[name](net)
        for _ in range(3):

            def closure():
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        optimizer.load_state_dict(optimizer.state_dict())
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    expected = trained(one)
    with torch.device("meta"):
        found = trained(other)
    assert_matches(found, expected, 1e-12)
