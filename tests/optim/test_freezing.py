"""Layers that freeze and thaw between passes and steps: what was frozen is no part of a step."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws

WIDTHS = (3, 4, 3, 2)


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(d_in, d_out) for d_in, d_out in pairwise(WIDTHS)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double()


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator).double(), torch.randn(6, 2, generator=generator).double()


def train(model, x, y):
    (0.5 * (model(x) - y).square().sum(1).mean()).backward()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def optimizer(model, method, **options):
    return fv.optim.NaturalGradient(model, "gaussian", method, lr=0.1, damping=0.1, kind="exact", **options)


@pytest.mark.covering
@pytest.mark.parametrize("method", ["exact", "kfac-tridiagonal", "kfac-full", "foof", "kfac", "ekfac", "kfra"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_zeros_left_in_a_frozen_layer_are_no_gradient(method, frozen):
    """`zero_grad(set_to_none=False)` leaves zeros in a layer that freezes: the same steps as where it has None."""
    found = []
    for to_none in (True, False):
        model = network()
        opt = optimizer(model, method)
        for k in range(4):
            opt.zero_grad(set_to_none=to_none)
            model[2 * frozen].requires_grad_(k not in (1, 2))
            train(model, *data(k))
            opt.step()
        found.append(flat(model.parameters()))
    assert torch.allclose(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_layer_that_thaws_after_the_passes_is_no_part_of_the_step(frozen):
    """It has no gradient: the step of the others is that of their own Fisher, not of a part of everybody's inverse."""
    model, (x, y) = network(), data(0)
    opt = optimizer(model, "exact", decay=0.0)
    train(model, x, y)
    opt.step()
    opt.zero_grad()
    F = torch.as_tensor(exact.fisher(model, x, laws.Gaussian()))
    others = torch.cat(
        [torch.full((p.numel(),), not name.startswith(f"{2 * frozen}.")) for name, p in model.named_parameters()]
    )
    model[2 * frozen].requires_grad_(False)
    train(model, x, y)
    model[2 * frozen].requires_grad_(True)
    before, g = flat(model.parameters()), flat([p.grad for p in model.parameters() if p.grad is not None])
    opt.step()
    wanted = torch.zeros_like(before)
    own = F[others][:, others]
    wanted[others] = -0.1 * torch.linalg.solve(own + 0.1 * torch.eye(len(own)).double(), g)
    assert torch.allclose(flat(model.parameters()) - before, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.covering
@pytest.mark.parametrize("method", ["kfac-tridiagonal", "kfac-full", "kfra", "exact"])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("T", [1, 3])
def test_layers_that_were_frozen_in_the_first_pass_are_coupled_when_they_thaw(method, first, T):
    """With nothing of the past in the averages, the step is that of an optimizer that never saw them frozen."""
    moved = []
    for frozen in (True, False):
        model = network()
        opt = optimizer(model, method, decay=0.0, T=T)
        start = [p.detach().clone() for p in model.parameters()]
        if frozen:
            for k in range(T):
                model[: 2 * first].requires_grad_(False)
                train(model, *data(k))
                opt.step()
                opt.zero_grad()
            model.requires_grad_(True)
            with torch.no_grad():
                for p, value in zip(model.parameters(), start, strict=True):
                    p.copy_(value)
        train(model, *data(9))
        opt.step()
        moved.append(flat(model.parameters()))
    assert torch.allclose(*moved, rtol=1e-10, atol=1e-13)


def test_a_state_saved_after_layers_were_coupled_goes_on_bit_for_bit():
    model = network()
    opt = optimizer(model, "kfac-tridiagonal")
    for k in range(3):
        model[0].requires_grad_(k > 0)
        train(model, *data(k))
        opt.step()
        opt.zero_grad()
    twin = network(1)
    twin.load_state_dict(model.state_dict())
    other = optimizer(twin, "kfac-tridiagonal")
    other.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, other)):
        train(m, *data(5))
        o.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
