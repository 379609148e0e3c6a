"""Networks that are rare one by one: scalars, first batches of one example, layers that scale themselves, checkpoints.

Every number is held to plain autograd, one example at a time; a refusal is one sentence.
"""

import copy
import re
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fisherviz as fv

pytestmark = pytest.mark.filterwarnings("ignore")


def scores(model, x, y):
    """Gradients of each example's own loss, (N, P)."""
    own = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(len(x)):
        found = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), own, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def fisher_of(model, x):
    """The exact categorical Fisher from Jacobians of single examples."""
    own, total = [p for p in model.parameters() if p.requires_grad], 0.0
    for n in range(len(x)):
        z = model(x[n : n + 1])[0]
        rows = [torch.autograd.grad(entry, own, retain_graph=True) for entry in z]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        p = z.detach().softmax(0)
        total = total + J.T @ (p.diag() - torch.outer(p, p)) @ J / len(x)
    return total


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Tempered(nn.Module):
    """A bare parameter without dimensions, as in a learned temperature."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.body(x) * self.scale


def one_norm():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrizations.weight_norm(net[0], dim=None)  # its norm is a parameter without dimensions
    return net


def channel_slopes():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.PReLU(2), nn.Flatten(), nn.Linear(8, 2))
    nn.init.uniform_(net[1].weight, -0.5, 0.9)
    return net


def transposed():
    return nn.Sequential(nn.ConvTranspose1d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2))


CASES = {
    "scalar": (Tempered, (3,)),
    "norm of a whole weight": (one_norm, (3,)),
    "channel slopes": (channel_slopes, (1, 3, 3)),
    "transposed convolution": (transposed, (1, 3)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("first", [1, 5])
def test_exact_fisher_whatever_the_first_batch_holds(name, first):
    torch.manual_seed(0)
    build, shape = CASES[name]
    net, x, y = build().double(), torch.randn(6, *shape).double(), torch.randint(2, (6,))
    batches = [(x[:first], y[:first]), (x[first:], y[first:])]
    exact, S = fisher_of(net, x), scores(net, x, y)
    fisher = fv.Probe(net, "categorical").fisher(batches)
    v = torch.randn(len(exact)).double()
    torch.testing.assert_close(fisher @ v, exact @ v)
    torch.testing.assert_close(fisher.to_dense(), exact)
    torch.testing.assert_close(fv.approximate(fisher, "diagonal").diagonal(), exact.diagonal())
    empirical = fv.Probe(net, "categorical").fisher(batches, kind="empirical")
    torch.testing.assert_close(empirical.to_dense(), S.T @ S / 6)


@pytest.mark.parametrize("name", CASES)
def test_steps_of_the_empirical_diagonal_after_a_first_pass_of_one_example(name):
    torch.manual_seed(0)
    build, shape = CASES[name]
    net, x, y = build().double().train(), torch.randn(6, *shape).double(), torch.randint(2, (6,))
    opt = fv.optim.NaturalGradient(net, "categorical", "diagonal", lr=1.0, damping=0.5, kind="empirical", decay=0.0)
    for part in (slice(0, 1), slice(1, 6)):
        S = scores(copy.deepcopy(net), x[part], y[part])
        before = flat(net)
        opt.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        opt.step()
        torch.testing.assert_close(before - flat(net), S.mean(0) / (S.square().mean(0) + 0.5))


def test_an_embedding_that_scales_its_rows_is_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 2)).double()
    before, x = net[0].weight.detach().clone(), torch.randint(5, (6, 2))
    fisher = fv.Probe(net, "categorical").fisher(x)
    diagonal = fisher.diagonal()
    assert torch.equal(net[0].weight, before)
    dense = fisher.to_dense()
    assert torch.equal(net[0].weight, before)
    exact = fisher_of(net, x)  # scales the rows for good
    torch.testing.assert_close(dense, exact)
    torch.testing.assert_close(diagonal, exact.diagonal())


class Hidden(nn.Module):
    def __init__(self, act, reentrant):
        super().__init__()
        self.first, self.act, self.last, self.reentrant = nn.Linear(3, 4), act, nn.Linear(4, 2), reentrant

    def forward(self, x):
        return self.last(checkpoint(self.act, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("act", [nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())])
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("method", ["diagonal", "layer", "kfac", "foof"])
def test_layers_in_a_reentrant_checkpoint_are_refused_rather_than_given_a_fisher_of_zero(act, kind, method):
    net, x, y = Hidden(act, True), torch.randn(6, 3), torch.randint(2, (6,))
    fv.optim.NaturalGradient(net, "categorical", method, lr=0.1, damping=0.5, kind=kind)
    held = fv.optim.NaturalGradient(net, "categorical", method, lr=0.1, damping=0.5, kind=kind)
    with pytest.raises(NotImplementedError, match="pass use_reentrant=False"):
        F.cross_entropy(net(x), y).backward()
    assert held.k == 0
    with pytest.raises(NotImplementedError, match="pass use_reentrant=False"):
        fv.Probe(net, "categorical").fisher(x).to_dense()


def replaced(net):
    net[2] = nn.Linear(4, 2)


def pruned(net):
    prune.l1_unstructured(net[0], "weight", amount=0.5)


def normed(net):
    parametrizations.weight_norm(net[0])


@pytest.mark.parametrize("change", [replaced, pruned, normed])
def test_a_probe_of_parameters_that_the_model_has_no_more_asks_for_a_new_one(change):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    probe = fv.Probe(net, "categorical")
    change(net)
    with pytest.raises(RuntimeError, match="make a new Probe"):
        probe.fisher(torch.randn(5, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_prior_that_a_failed_sample_advises_is_in_its_own_units(reduction):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(30, 6)
    with torch.no_grad():
        net[0].bias[0] = -100.0  # a dead unit and a dead input: singular beyond softmax's null direction
        x[:, 5] = 0
    largest = float(torch.linalg.eigvalsh(fisher_of(net.double(), x.double())).max()) * len(x)
    net.float()
    fisher = fv.Probe(net, "categorical").fisher(x, reduction=reduction)
    with pytest.raises(RuntimeError, match="prior_precision of at least") as error:
        fisher.sample(1e-18, 2)
    advised = float(re.search(r"at least ([0-9.e+-]+[0-9])", str(error.value)).group(1))
    assert 1e-18 < advised < 1e-3 * largest
    assert torch.isfinite(fisher.sample(advised, 2)).all()


@pytest.mark.parametrize("make", [fv.optim.KFAC, fv.optim.HessianFree])
def test_sparse_gradients_are_refused_by_the_quadratic_model_too(make):
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    opt, x, y = make(net, "categorical"), torch.randint(5, (6, 2)), torch.randint(2, (6,))

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="approximation='none'"):
        opt.step(closure)


def test_products_of_two_models_in_two_threads():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2)]
    x, v = torch.randn(8, 4).double(), torch.randn(43).double()
    expected, wrong = [fisher_of(net, x) @ v for net in nets], []

    def work(net, truth):
        for _ in range(30):
            try:
                torch.testing.assert_close(fv.Probe(net, "categorical").fisher(x) @ v, truth)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(nets, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class SideDoor(nn.Module):
    """The weight acts once more for a few examples, of which the first batches have none."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.inner(x).tanh()
        return self.last((h + (x[:, 2:] > 0) * F.linear(h, self.inner.weight)).tanh())


def rare_side_door():
    torch.manual_seed(0)
    net, x, y = SideDoor().double(), torch.randn(48, 3).double(), torch.randint(2, (48,))
    x[:, 2] = -1.0
    x[-3:, 2] = 2.0
    return net, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8)], x


def test_a_weight_that_acts_elsewhere_in_the_last_batch_alone():
    net, batches, x = rare_side_door()
    torch.testing.assert_close(fv.Probe(net, "categorical").fisher(batches).to_dense(), fisher_of(net, x))


def test_steps_with_a_weight_that_acts_elsewhere_in_the_last_batch_alone():
    net, batches, _ = rare_side_door()
    opt = fv.optim.NaturalGradient(net, "categorical", "exact", lr=0.1, damping=0.5, kind="exact", decay=0.0)
    for x, y in batches:
        exact, gradient = fisher_of(net, x), scores(net, x, y).mean(0)
        before = flat(net)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
        step = 0.1 * torch.linalg.solve(exact + 0.5 * torch.eye(len(exact)).double(), gradient)
        torch.testing.assert_close(before - flat(net), step)
