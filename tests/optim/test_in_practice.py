"""What optimizers meet in practice: shuffled loaders, layers that run later, checkpoints, changed groups."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fisherviz import optim
from fisherviz.network.batches import Batches
from tests.covering import some
from tests.oracles.steps import closure_of, data, net


def test_the_fisher_may_come_from_a_loader_that_shuffles():
    model, (x, y) = net(), data(8)
    shuffles = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    opt = optim.SubsampledNaturalGradient.paper(model, "categorical", fisher_data=shuffles)
    drawn = []
    for _ in range(6):  # three epochs of two batches
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        drawn.append(next(iter(opt.directions.fisher.values())).a[:, 0, :-1].clone())
    rows = [{tuple(row.tolist()) for row in torch.cat(drawn[i : i + 2])} for i in (0, 2, 4)]
    assert rows[0] == rows[1] == rows[2] == {tuple(row.tolist()) for row in x}
    assert not torch.equal(drawn[0], drawn[2])


def test_a_stream_of_batches_may_change_and_data_of_several_passes_may_not():
    passes = iter([[torch.zeros(2, 1)], [torch.ones(3, 1)], [torch.zeros(2, 1)], [torch.ones(3, 1)]])

    class Changing:
        def __iter__(self):
            return iter(next(passes))

    stream = Batches(Changing(), repeats=False)
    assert [len(x) for _ in range(2) for x, _ in stream] == [2, 3]
    assert stream.fingerprint == ""
    same = Batches(Changing())
    list(same)
    with pytest.raises(RuntimeError, match="saw other examples"):
        list(same)


class Heads(torch.nn.Module):
    """A body and two heads, one of which runs at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = torch.nn.Linear(3, 4), torch.nn.ModuleList(torch.nn.Linear(4, 3) for _ in range(2))
        self.double()

    def forward(self, x, i):
        return self.heads[i](torch.tanh(self.body(x)))


def heads_step(opt, model, i, k):
    x, y = data(6, seed=k, widths=(3, 3))

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x, i), y)
        loss.backward()
        return loss

    opt.step(closure)
    return x, y


METHODS = {
    "foof": lambda m: optim.FOOF.paper(m, "categorical", T=4),
    "kfac": lambda m: optim.KFAC.paper(m, "categorical", rescale=False, adapt=False, lr=0.01, damping=1e-2, T=4),
    "kfac-adaptive": lambda m: optim.KFAC.paper(m, "categorical", damping=1.0),
    "kfac-tridiagonal": lambda m: optim.KFAC.paper(m, "categorical", inverse="block-tridiagonal", damping=1.0),
    "ekfac": lambda m: optim.EKFAC.paper(m, "categorical", T=4),
    "tengrad": lambda m: optim.TENGraD.paper(m, "categorical", T=4),
    "cw-ngd": lambda m: optim.CWNGD.paper(m, "categorical", T=4),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical"),
    "subsampled": lambda m: optim.SubsampledNaturalGradient.paper(m, "categorical", structure="layer"),
    "hessian-free": lambda m: optim.HessianFree.paper(m, "categorical", preconditioner="kfac"),
}


@pytest.mark.parametrize("name", some(METHODS, "kfac", "kfac-tridiagonal", "tengrad", "subsampled"))
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_layer_that_runs_later_has_its_structure_from_then_on(name):
    model = Heads()
    opt = METHODS[name](model)
    for k in range(6):
        i, before = (k // 2) % 2, [p.detach().clone() for p in model.heads.parameters()]
        heads_step(opt, model, i, k)
        changed = [not torch.equal(p, q) for p, q in zip(model.heads.parameters(), before, strict=True)]
        assert changed == [i == 0, i == 0, i == 1, i == 1], k
    assert all(layer.structured for layer in opt.layers)
    other = Heads()
    other.load_state_dict(model.state_dict())
    resumed = METHODS[name](other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for k in range(6, 10):
        heads_step(opt, model, k % 2, k)
        heads_step(resumed, other, k % 2, k)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_late_layer_s_first_step_is_that_of_its_own_statistics():
    model = Heads()
    opt = optim.FOOF.paper(model, "categorical", lr=1.0, damping=0.5, T=4)
    heads_step(opt, model, 0, 0)
    weight, bias = (p.detach().clone() for p in model.heads[1].parameters())
    with torch.no_grad():
        x = data(6, seed=1, widths=(3, 3))[0]
        a = torch.cat([torch.tanh(model.body(x)), torch.ones(6, 1, dtype=torch.float64)], 1)
    heads_step(opt, model, 1, 1)
    gradient = torch.cat([model.heads[1].weight.grad, model.heads[1].bias.grad[:, None]], 1)
    wanted = gradient @ torch.linalg.inv(a.mT @ a / 6 + 0.5 * torch.eye(5, dtype=torch.float64))
    moved = torch.cat([weight - model.heads[1].weight, (bias - model.heads[1].bias)[:, None]], 1)
    assert torch.allclose(moved, wanted, rtol=1e-10, atol=1e-13)


class Hidden(torch.nn.Module):
    """A layer behind a checkpoint, or used by its parameters alone."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last, self.how = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3), how
        self.double()

    def forward(self, x):
        if self.how == "function":
            return self.last(F.linear(x, self.inner.weight, self.inner.bias).tanh())
        if self.how == "none":
            return self.last(self.inner(x).tanh())
        inner = checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.how == "reentrant")
        return self.last(inner.tanh())


def test_a_layer_out_of_sight_is_generic_and_the_warning_says_why():
    model, (x, y) = Hidden("function"), data(6, widths=(3, 3))
    opt = optim.KFAC.paper(model, "categorical", rescale=False, adapt=False, lr=0.01, damping=1e-2)
    with pytest.warns(UserWarning, match=r"\('inner': .*its forward did not run on dense tensors, but its param"):
        F.cross_entropy(model(x), y).backward()
    opt.step()
    assert not opt.layers[0].structured


@pytest.mark.parametrize(
    ("how", "make", "error"),
    [
        ("reentrant", optim.HessianFree, NotImplementedError),
        ("reentrant", optim.KFAC, NotImplementedError),
    ],
)
@pytest.mark.filterwarnings("ignore:layers 'inner'")
def test_products_that_a_checkpoint_does_not_pass_on_are_refused(how, make, error):
    model, (x, y) = Hidden(how), data(6, widths=(3, 3))
    opt = make(model, "categorical")
    with pytest.raises(error, match="without checkpoint"):
        opt.step(closure_of(opt, model, x, y))


@pytest.mark.parametrize("make", [optim.KFAC, optim.HessianFree])
def test_steps_through_a_checkpoint_that_is_not_reentrant_are_those_without(make):
    ends = []
    for how in ("plain", "none"):
        model, (x, y) = Hidden(how), data(16, widths=(3, 3))
        opt = make(model, "categorical")
        opt.generator.manual_seed(0)
        for _ in range(3):
            opt.step(closure_of(opt, model, x, y))
        ends.append([p.detach() for p in model.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", ["damping", "weight_decay", "momentum"])
def test_adaptive_kfac_says_once_that_a_changed_group_changes_nothing(key):
    model, (x, y) = net(), data()
    opt = optim.KFAC.paper(model, "categorical")
    step = closure_of(opt, model, x, y)
    opt.param_groups[0][key] = 0.5
    with pytest.warns(UserWarning, match=r"reads only when it is created; λ = 150 .*assign opt\.lam"):
        opt.step(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opt.step(step)


@pytest.mark.parametrize(("tau1", "tau2", "name"), [(1 / 8, 1 / 2, "tau1"), (1 / 2, 1 / 8, "tau2")])
@pytest.mark.filterwarnings("ignore:BatchNorm in training mode")
def test_a_share_too_small_for_batchnorm_is_named(tau1, tau2, name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    x, y = data(8)
    opt = optim.KFAC.paper(model, "categorical", tau1=tau1, tau2=tau2)
    with pytest.raises(ValueError, match=rf"{name}=0\.125 of the mini-batch is a single example"):
        opt.step(closure_of(opt, model, x, y))


def test_a_group_added_later_is_refused_with_that_reason():
    model, (x, y) = net(), data()
    opt = optim.FOOF.paper(model, "categorical", params=model[0].parameters())
    opt.add_param_group({"params": list(model[2].parameters())})
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="added by add_param_group since"):
        opt.step()


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fisherviz", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("fisherviz ")
