"""Coupled matrices in training where a batch does not run every layer: averages over the same examples."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws


class Skipping(nn.Module):
    """A middle layer that runs when it is on."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last, self.on = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2), True

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.middle(h)) if self.on else h)


SEQUENCES = {
    "skipped after the first": (True, False, False),
    "late": (False, True, False, True),
    "alternating": (True, False, True, False),
}


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def steps(method, sequence, decay, damping, accumulate=False):
    """The model after each step, with the gradient that the step saw and the exact F of its batch."""
    torch.manual_seed(1)
    net = Skipping().double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    optimizer = fv.optim.NaturalGradient(
        net, "gaussian", method, lr=0.1, damping=damping, kind="exact", decay=decay, ramp=False
    )
    for on in sequence:
        net.on = on
        F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square().sum(1).mean()).backward()
        g = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
        before = flat(net.parameters())
        optimizer.step()
        yield F, g, flat(net.parameters()) - before


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("damping", [2.0, 0.1, 1e-3])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_exact_averages_the_fishers_of_the_steps(sequence, damping, decay):
    average = None
    for F, g, moved in steps("exact", sequence, decay, damping):
        average = F if average is None else decay * average + (1 - decay) * F
        wanted = -0.1 * torch.linalg.solve(average + damping * torch.eye(len(F)).double(), g)
        ran = g != 0
        assert torch.allclose(moved[ran], wanted[ran], rtol=1e-8, atol=1e-12)


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("method", ["kfac-full", "kfac-tridiagonal", "kfra"])
@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_coupled_kronecker_methods_stay_definite(sequence, method, damping):
    """A step is along a descent direction, whatever layers earlier batches ran."""
    rule = fv.FactoredTikhonov(damping**0.5)
    for _, g, moved in steps(method, sequence, 0.5, rule):
        assert torch.isfinite(moved).all()
        assert float(g @ moved) < 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["diagonal", "kfac", "ekfac", "layer", "foof", "exact"])
def test_gradients_of_zeros_are_none(method):
    """`zero_grad(set_to_none=False)` leaves zeros where a batch skips a layer: the same steps as with None."""
    found = []
    for to_none in (True, False):
        torch.manual_seed(1)
        net, x, y = Skipping().double(), torch.randn(8, 3).double(), torch.randn(8, 2).double()
        optimizer = fv.optim.NaturalGradient(net, "gaussian", method, lr=0.1, damping=1.0, kind="exact")
        for on in (True, False, True):
            net.on = on
            optimizer.zero_grad(set_to_none=to_none)
            (0.5 * (net(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
        found.append(flat(net.parameters()))
    assert torch.equal(*found)
