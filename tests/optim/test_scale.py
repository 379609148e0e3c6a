"""Small and large gradients in float32: a step is linear in the gradient, however small that is."""

import math

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.optim.quadratic import combine, dot

COMMON = {"kind": "exact", "damping": 0.1}
PRESETS = {
    "KFAC, complete": lambda m: fv.optim.KFAC.paper(m, "gaussian", tau1=1.0, tau2=1.0, adapt=False, **COMMON),
    "KFAC, adapted": lambda m: fv.optim.KFAC.paper(m, "gaussian", tau1=1.0, tau2=1.0, T1=100, **COMMON),
    "KFAC, plain": lambda m: fv.optim.KFAC(m, "gaussian", rescale=False, adapt=False, kl_clip=math.inf, **COMMON),
    "EKFAC": lambda m: fv.optim.EKFAC(m, "gaussian", kl_clip=math.inf, **COMMON),
    "FOOF": lambda m: fv.optim.FOOF(m, "gaussian", kl_clip=math.inf),
    "CWNGD": lambda m: fv.optim.CWNGD(m, "gaussian", kl_clip=math.inf, **COMMON),
    "TENGraD": lambda m: fv.optim.TENGraD(m, "gaussian", kl_clip=math.inf, **COMMON),
    "SubsampledNaturalGradient": lambda m: fv.optim.SubsampledNaturalGradient(m, "gaussian", kl_clip=math.inf),
    "NaturalGradient": lambda m: fv.optim.NaturalGradient(m, "gaussian", lr=0.1, damping=0.1),
    "KBFGS": lambda m: fv.optim.KBFGS(m, "gaussian"),
    "KBFGS(L)": lambda m: fv.optim.KBFGS(m, "gaussian", memory=3),
    "HessianFree": lambda m: fv.optim.HessianFree.paper(m, "gaussian", damping=1.0),
    "KSD": lambda m: fv.optim.KSD.paper(m, "gaussian", dimension=2),
}


def trained(preset, scale, steps=3):
    """Weights over the scale of a linear network from zero, whose outputs, gradients and steps are as the targets."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    x, y = torch.randn(10, 4), torch.randn(10, 3) * scale
    opt = PRESETS[preset](net)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (net(x) - y).square().sum(1).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).double() / scale


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("power", [-110, -60, 30])
def test_a_step_is_linear_in_the_gradient(preset, power):
    if preset in ("HessianFree", "KSD") and power == -110:
        pytest.skip("a loss of 1e-66 is zero in float32, and a search along it sees no progress")
    wanted = trained(preset, 1.0)
    # K-BFGS leaves out pairs by a threshold on the gradient's size
    tolerance = 1e-5 if preset.startswith("KBFGS") else 1e-6
    assert wanted.norm() > 0.1
    assert (trained(preset, 2.0**power) - wanted).norm() <= tolerance * wanted.norm()


def test_products_that_vanish_or_overflow_in_float32_are_taken_in_float64():
    p = nn.Parameter(torch.zeros(3))
    for size in (1e-30, 1e-19, 1.0, 1e25):
        a, b = torch.tensor([1.0, -2.0, 3.0]) * size, torch.tensor([2.0, 1.0, 1.0]) * size
        assert dot({p: a}, {p: b}) == pytest.approx(float((a.double() * b.double()).sum()), rel=1e-6)


def test_a_factor_beyond_float32_brings_back_a_direction_that_has_all_but_vanished():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    small = {p: torch.tensor([1e-40, -2e-40]), q: torch.tensor([4e-40])}
    ones = {p: torch.ones(2), q: torch.ones(1)}
    found = combine([(2.0, ones), (1e40, small)])
    assert torch.allclose(found[p], torch.tensor([3.0, 0.0]), atol=1e-4)
    assert torch.allclose(found[q], torch.tensor([6.0]), atol=1e-4)
