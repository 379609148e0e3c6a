"""Directions that are not written down equal those that are: whatever touches a gradient makes it a dense one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fisherviz import optim
from fisherviz.optim.low_rank import LowRank


def small():
    torch.manual_seed(0)
    layers = (nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 25, bias=False), nn.Tanh(), nn.Linear(25, 4))
    return nn.Sequential(*layers).double()


def batches(number, n=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        x = torch.randn(n, 40, dtype=torch.float64, generator=generator)
        yield x, torch.randint(4, (n,), generator=generator)


MAKERS = {
    "foof": lambda m, **o: optim.FOOF(m, "categorical", lr=0.1, damping=0.5, T=2, **o),
    "kfac": lambda m, **o: optim.KFAC(m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.5, **o),
    "kfac inverted": lambda m, **o: optim.KFAC(
        m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.5, T=20, **o
    ),
    "subsampled": lambda m, **o: optim.SubsampledNaturalGradient(m, "categorical", lr=0.1, damping=0.5, **o),
    "subsampled exact layers": lambda m, **o: optim.SubsampledNaturalGradient(
        m, "categorical", lr=0.1, damping=0.5, T=2, structure="layer", kind="exact", **o
    ),
}


def train(make, touched, **options):
    model = small()
    torch.manual_seed(3)  # of the sampled labels
    opt = make(model, **options)
    for x, y in batches(4):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if touched:
            for p in model.parameters():
                p.grad.mul_(1.0)
        opt.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", MAKERS)
def test_steps_with_and_without_matrices_written_down_agree(name, momentum, monkeypatch):
    used = []
    add_to = LowRank.add_to
    monkeypatch.setattr(LowRank, "add_to", lambda self, *args: (used.append(self), add_to(self, *args))[1])
    short = train(MAKERS[name], False, momentum=momentum)
    assert used
    assert torch.allclose(short, train(MAKERS[name], True, momentum=momentum), rtol=1e-9, atol=1e-12)
    assert (short - train(MAKERS[name], False, momentum=0.5)).abs().max() > 1e-6


def test_a_weight_with_another_layout_takes_the_direction_written_down():
    steps = []
    for transposed in (False, True):
        model = small()
        if transposed:
            for layer in (model[0], model[2], model[4]):
                layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
        opt = MAKERS["foof"](model)
        for x, y in batches(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        steps.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.allclose(*steps, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_adding_is_adding_the_dense_one(keep):
    left, right = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    for base in (None, torch.randn(4, 2, 3, dtype=torch.float64)):
        direction = LowRank(left, right, torch.Size([4, 2, 3]), base, 2.0)
        expected = torch.einsum("ro,ri->oi", left, right).reshape(4, 2, 3) + (0 if base is None else 2 * base)
        target = torch.randn(4, 2, 3, dtype=torch.float64)
        wanted = keep * target - 0.7 * expected
        direction.add_to(target, -0.7, keep)
        assert torch.allclose(target, wanted, atol=1e-13)
        assert torch.allclose(direction.dense(), expected, atol=1e-13)
