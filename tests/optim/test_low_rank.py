"""Directions that are not written down equal those that are: whatever touches a gradient makes it a dense one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fisherviz import optim
from fisherviz.optim.gradients import LowRank
from fisherviz.optim.passes import Pass


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


@pytest.mark.covering
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


def mask(gradient):
    out = gradient.clone()
    out[1] = 0
    return out


def post_mask(p):
    p.grad = mask(p.grad)


CHANGES = {
    "hook": lambda m: m[0].weight.register_hook(mask),
    "hook after accumulation": lambda m: m[0].weight.register_post_accumulate_grad_hook(post_mask),
    "past autograd": lambda m: None,
    "penalty on one unit": lambda m: None,
    "small penalty on all": lambda m: None,
}


@pytest.mark.covering
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MAKERS)
def test_what_changed_a_gradient_unseen_is_not_lost(name, change, monkeypatch):
    ends = []
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(Pass, "rows_behind", lambda self, layer: None)
        model = small()
        torch.manual_seed(3)
        opt = MAKERS[name](model)
        CHANGES[change](model)
        for x, y in batches(3):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if "penalty" in change:
                loss = loss + (model[0].weight[1].square().sum() if "one" in change else 1e-5 * model[0].weight.norm())
            loss.backward()
            if change == "past autograd":
                model[0].weight.grad.data[1] = 0
            opt.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-9, atol=1e-12)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(40, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])

    def forward(self, x, i):
        return self.heads[i](self.body(x).tanh())


@pytest.mark.parametrize("structure", ["full", "layer"])
@pytest.mark.parametrize("T", [1, 3])
def test_sub_sampled_steps_know_the_layers_that_only_some_passes_run(structure, T):
    model = Heads().double()
    opt = optim.SubsampledNaturalGradient.paper(model, "categorical", structure=structure, lr=1.0, damping=1e-3, T=T)
    for k, (x, y) in enumerate(batches(4)):
        opt.zero_grad()
        head = model.heads[k % 2].weight
        before = head.detach().clone()
        F.cross_entropy(model(x, k % 2), y).backward()
        opt.step()
        # λ is small: where the Fisher sees nothing the direction is the gradient over λ, and no raw gradient
        assert (before - head.detach()).norm() > 10 * head.grad.norm()


def test_a_layer_frozen_between_factorisations_leaves_the_others_their_own():
    model = small()
    opt = optim.SubsampledNaturalGradient(model, "categorical", structure="layer", lr=0.1, damping=0.5, T=3)
    for k, (x, y) in enumerate(batches(4)):
        if k == 1:
            model[2].weight.requires_grad_(False)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert moved == [True, True, k == 0, True, True]
