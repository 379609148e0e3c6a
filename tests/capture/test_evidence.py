"""Evidence about a model is taken where it can show a fault: paths, batched derivatives, forward mode, restarts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherviz as fv
from tests.oracles import nets
from tests.oracles.checks import assert_matches


def brute_force(net, x, law="gaussian"):
    """The mean Fisher in torch order by plain autograd, one example and one output at a time."""
    parameters, total = list(net.parameters()), torch.zeros(())
    for n in range(len(x)):
        z = net(x[n : n + 1])[0].flatten()
        rows = [torch.autograd.grad(zi, parameters, retain_graph=True, allow_unused=True) for zi in z]
        J = torch.stack(
            [
                torch.cat(
                    [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(r, parameters, strict=True)]
                )
                for r in rows
            ]
        )
        p = torch.softmax(z, 0)
        output = torch.diag(p) - torch.outer(p, p) if law == "categorical" else torch.eye(len(z)).double()
        total = total + J.T @ output.detach() @ J / len(x)
    return total.detach()


def everything_agrees(make, truth):
    """Dense matrix, products, forms, solves and norms of fresh Fishers, each asked first of all."""
    v, eye = torch.randn(len(truth), 2, dtype=torch.float64), torch.eye(len(truth), dtype=torch.float64)
    assert_matches(make() @ v, truth @ v)
    assert make().quadratic(v[:, 0], v[:, 1]) == pytest.approx(float(v[:, 0] @ truth @ v[:, 1]), rel=1e-8)
    assert make().quadratic(v[:, 0]) == pytest.approx(float(v[:, 0] @ truth @ v[:, 0]), rel=1e-8)
    assert_matches(make().to_dense(), truth)
    assert_matches(make().solve(v, 0.1), torch.linalg.solve(truth + 0.1 * eye, v))
    assert make().norm("spectral") == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-6)


class TiedOutside(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, used without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.t())


class StoppedBranch(nn.Module):
    """A branch under no_grad, which forward mode ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.last = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            target = self.w(x)
        return self.last(torch.tanh(self.w(x)) + target)


class LateBranch(StoppedBranch):
    """The same, but only for examples with a negative first entry."""

    def forward(self, x):
        with torch.no_grad():
            target = self.w(x) * (x[:, :1] < 0)
        return self.last(torch.tanh(self.w(x)) + target)


class Padded(nn.Module):
    """Sequences with a padding token, whose row of the embedding has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, i):
        return self.l(torch.tanh(self.e(i).mean(1)))


class Experts(nn.Module):
    """Two experts, each for a part of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        m = x[:, 0] > 0
        if m.all():
            h = self.a(x)
        elif (~m).all():
            h = self.b(x)
        else:
            h = torch.zeros_like(x).index_put((m,), self.a(x[m])).index_put((~m,), self.b(x[~m]))
        return self.last(h.tanh())


def blank_first(blank: int = 2) -> torch.Tensor:
    x = torch.randn(12, 6, dtype=torch.float64)
    x[:blank] = 0
    return x


@pytest.mark.parametrize(
    "data",
    [
        lambda: blank_first(),
        lambda: blank_first(11),
        lambda: [(blank_first(12)[:6],), (blank_first(0)[6:],)],
        lambda: list(blank_first(9).split(3)),
    ],
    ids=["two blank", "all but one", "a blank batch", "three blank batches"],
)
def test_blank_examples_do_not_hide_a_weight_that_is_used_elsewhere(data):
    torch.manual_seed(0)
    net, data = nets.randomised(TiedOutside()), data()
    batches = [data] if isinstance(data, torch.Tensor) else [x[0] if isinstance(x, tuple) else x for x in data]
    truth = brute_force(net, torch.cat(batches))
    everything_agrees(lambda: fv.Probe(net, "gaussian").fisher(data), truth)


class SideDoorForSome(nn.Module):
    """A layer whose weight also acts outside its module, for examples with a negative first entry alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.last(torch.tanh(h + F.linear(h, self.inner.weight) * (x[:, :1] < 0)))


def test_a_side_door_that_only_later_batches_show():
    torch.manual_seed(0)
    net, x = nets.randomised(SideDoorForSome()), torch.randn(12, 6).double()
    x[:, 0].abs_()
    x[4:8, 0] *= -1
    everything_agrees(lambda: fv.Probe(net, "gaussian").fisher(list(x.split(4))), brute_force(net, x))


def test_a_layer_without_any_gradient_stays_structured():
    net = nets.randomised(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    probe = fv.Probe(net, "gaussian")
    probe.fisher(list(torch.randn(20, 3).double().split(2))).to_dense()
    assert [layer.path for layer in probe.layers] == ["structured", "structured"]


@pytest.mark.parametrize("network", [StoppedBranch, LateBranch])
@pytest.mark.parametrize("cut", [12, 3])
def test_forward_mode_that_ignores_no_grad_is_not_believed(network, cut):
    torch.manual_seed(0)
    net, x = nets.randomised(network()), torch.randn(12, 6).double()
    x[:, 0].abs_()
    x[-2:, 0] *= -1  # the first batches show nothing
    everything_agrees(lambda: fv.Probe(net, "gaussian").fisher(list(x.split(cut))), brute_force(net, x))


@pytest.mark.parametrize("cut", [5, 2])
def test_padding_that_only_later_examples_have(cut):
    torch.manual_seed(0)
    net = nets.randomised(Padded())
    ids = torch.tensor([[1, 2, 3, 4], [2, 5, 1, 3], [4, 1, 0, 0], [5, 0, 0, 0], [3, 0, 0, 0]])
    truth = brute_force(net, ids, "categorical")
    everything_agrees(lambda: fv.Probe(net, "categorical").fisher(list(ids.split(cut))), truth)
    row = torch.zeros(len(truth), dtype=torch.float64)
    row[:4] = 1
    fisher = fv.Probe(net, "categorical").fisher(list(ids.split(cut)))
    assert fisher.quadratic(torch.randn(len(truth)).double()) > 0
    assert fisher.quadratic(row) == 0


def test_a_form_after_a_product_that_showed_nothing_is_still_right():
    """A product along directions without the fault verifies nothing about the others."""
    torch.manual_seed(0)
    net = nets.randomised(Padded())
    ids = torch.tensor([[1, 2, 3, 4], [2, 5, 1, 3], [4, 1, 0, 0]])
    truth = brute_force(net, ids, "categorical")
    fisher = fv.Probe(net, "categorical").fisher(list(ids.split(2)))
    silent = torch.randn(len(truth)).double()
    silent[:4] = 0
    assert_matches(fisher @ silent, truth @ silent)
    v = torch.randn(len(truth)).double()
    assert fisher.quadratic(v) == pytest.approx(float(v @ truth @ v), rel=1e-8)


def test_layers_that_some_batches_show_in_part_start_every_request_again():
    torch.manual_seed(0)
    net, x = nets.randomised(Experts()), torch.randn(8, 6).double()
    x[:2, 0] = 1.0
    y = torch.randint(2, (8,))
    truth = brute_force(net, x, "categorical")
    for data in ((x, y), list(zip(x.split(2), y.split(2), strict=True))):
        make = lambda data=data: fv.Probe(net, "categorical").fisher(data)  # noqa: E731
        everything_agrees(make, truth)
        assert_matches(make().diagonal(), truth.diagonal())
        assert_matches(make().block("a"), truth[:42, :42])
        assert make().norm("trace") == pytest.approx(float(truth.trace()))
        gradient = make().gradient()
        step = torch.linalg.solve(truth + 0.1 * torch.eye(len(truth)).double(), gradient)
        assert_matches(make().natural_gradient(0.1), step)
        assert_matches(fv.approximate(make(), "layer").block("last"), truth[84:, 84:])
        assert make().sample(1.0, 2).shape == (2, len(truth))


def test_one_fisher_of_a_probe_that_settles_a_layer_leaves_the_others_right():
    """Captures of a layer that a second Fisher finds to be generic are no longer those of its parameters' order."""
    torch.manual_seed(0)
    net = nets.randomised(Experts())
    x = torch.randn(8, 6).double()
    x[:4, 0], x[4:, 0] = 1.0, torch.tensor([1.0, -1.0, 1.0, -1.0])
    probe = fv.Probe(net, "gaussian")
    first = probe.fisher(x[:4])
    v = torch.randn(first.shape[0]).double()
    first.diagonal(), first.to_dense()
    probe.fisher(x[4:]).to_dense()
    truth = brute_force(net, x[:4])
    assert_matches(first @ v, truth @ v)
    assert_matches(first.diagonal(), truth.diagonal())
    assert_matches(first.to_dense("unit").trace(), truth.trace())


SHARED = {
    "module used twice": lambda: _twice(nn.Linear(4, 4)),
    "module used twice under two parents": lambda: nn.Sequential(
        inner := nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(inner, nn.Linear(4, 3))
    ),
    "tied weights": lambda: _tied(nn.Linear(4, 4), nn.Linear(4, 4)),
    "normalisation used twice": lambda: _twice(nn.LayerNorm(4)),
    "recurrent": lambda: Recurrent(nn.GRU(4, 3, batch_first=True)),
    "weight norm of old": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "parametrised": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)
    ),
}


def _twice(module):
    return nn.Sequential(module, nn.Tanh(), module, nn.Tanh(), nn.Linear(4, 3))


def _tied(one, other):
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other, nn.Tanh(), nn.Linear(4, 3))


class Recurrent(nn.Module):
    """The last state of a recurrent layer over two steps."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.unflatten(1, (1, 4)).expand(-1, 2, -1))[0][:, -1]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("build", SHARED.values(), ids=SHARED)
def test_the_users_parameters_are_theirs_after_every_request(build):
    torch.manual_seed(0)
    net = build().double()
    x = torch.randn(6, 4).double()
    slots = {(id(m), key): p for m in net.modules() for key, p in m._parameters.items()}
    plain = {(id(m), key): v for m in net.modules() for key, v in m.__dict__.items() if isinstance(v, torch.Tensor)}
    before = net(x).detach()
    plain = {(id(m), key): v for m in net.modules() for key, v in m.__dict__.items() if isinstance(v, torch.Tensor)}
    truth = brute_force(net, x, "categorical")
    everything_agrees(lambda: fv.Probe(net, "categorical").fisher(x), truth)
    assert all(p is slots[id(m), key] for m in net.modules() for key, p in m._parameters.items())
    assert all(
        not torch._C._functorch.is_functorch_wrapped_tensor(v)
        for m in net.modules()
        for v in m.__dict__.values()
        if isinstance(v, torch.Tensor)
    )
    assert plain.keys() == {
        (id(m), key) for m in net.modules() for key, v in m.__dict__.items() if isinstance(v, torch.Tensor)
    }
    assert torch.equal(net(x).detach(), before)
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def passes_of(net, batches, request):
    """How often a request runs the model forward on its four batches, looks at a few and in another order aside."""
    seen = []
    handle = net.register_forward_pre_hook(
        lambda module, args: seen.append(any(torch.equal(args[0], x) for x, _ in batches))
    )
    try:
        request()
    finally:
        handle.remove()
    return sum(seen) / 4


def test_a_natural_gradient_takes_one_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    x, y = torch.randn(160, 20).double(), torch.randint(3, (160,))
    data = list(zip(x.split(40), y.split(40), strict=True))
    truth = brute_force(net, x, "categorical")
    for damping in (0.1, 1e-3):
        fisher = fv.Probe(net, "categorical").fisher(data)
        made = []
        assert passes_of(net, data, lambda f=fisher, d=damping, m=made: m.append(f.natural_gradient(d))) == 1
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))]
        )
        assert_matches(fisher.gradient(), gradient)
        assert_matches(made[0], torch.linalg.solve(truth + damping * torch.eye(len(truth)).double(), gradient), 1e-8)
        assert passes_of(net, data, lambda f=fisher: (f.natural_gradient(0.5), f.gradient(), f.norm())) == 0


def test_a_natural_gradient_holds_no_more_captures_than_fit(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(40, 20).double(), torch.randint(3, (40,))
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    whole = fv.Probe(net, "categorical").fisher(batches)
    damped = whole.to_dense() + 0.1 * torch.eye(whole.shape[0], dtype=torch.float64)
    monkeypatch.setattr("fisherviz.exact.passes.keep_limit", lambda device: 0)
    fisher = fv.Probe(net, "categorical").fisher(batches)
    found = fisher.natural_gradient(0.1)  # dense: captures do not fit
    assert not fisher.keeps_captures
    torch.testing.assert_close(found, torch.linalg.solve(damped, whole.gradient()))


def test_what_is_handed_out_is_the_callers():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    truth = brute_force(net, x)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    fisher.solve(torch.ones(len(truth)).double(), 0.1)  # leaves the matrix, to be used again
    handed = [
        fisher.to_dense(), fisher.to_dense("unit"), fisher.to_dense("input"), fisher.block(0), fisher.block(0, 1),
        fisher.diagonal(), fisher.units(0), fisher.spectrum(),
    ]  # fmt: skip
    for matrix in handed:
        matrix.numpy()[:] = 1e9  # no counter of torch's notices
    assert_matches(fisher.to_dense(), truth)
    assert_matches(fisher.block(0, 1), truth[:16, 16:])
    assert_matches(fisher.diagonal(), truth.diagonal())
    assert_matches(fisher.spectrum(1), torch.linalg.eigvalsh(truth)[-1:])
    assert_matches(fv.approximate(fisher, "diagonal").diagonal(), truth.diagonal())


def test_batched_derivatives_that_are_wrong_are_not_believed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.1, 0.5, -0.3, 0.8]))
    x, y = torch.randn(7, 3).double(), torch.randint(2, (7,))
    scores = [
        torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(F.cross_entropy(net(x[n : n + 1]), y[n : n + 1]), list(net.parameters()))
            ]
        )
        for n in range(7)
    ]
    truth = sum(torch.outer(s, s) for s in scores) / 7
    assert_matches(fv.Probe(net, "categorical").fisher(x, y, kind="empirical").to_dense(), truth)
    assert_matches(fv.Probe(net, "categorical").fisher(x).to_dense(), brute_force(net, x, "categorical"))
    copied = copy.deepcopy(net)
    assert_matches(fv.Probe(copied, "categorical").fisher(x).diagonal(), brute_force(net, x, "categorical").diagonal())


class Sorts(nn.Module):
    """Its layers see the examples of a batch in the order of their first entries."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.second(torch.tanh(self.first(x[order])))[order.argsort()]


def test_layers_that_sort_are_seen_in_a_batch_that_is_sorted():
    """Each batch that is looked at stands in order; only later ones do not."""
    torch.manual_seed(0)
    net = Sorts().double()
    data = [x[x[:, 0].argsort(descending=i >= 6)] for i, x in enumerate(torch.randn(8, 2, 3).double())]
    truth = brute_force(net, torch.cat(data))
    everything_agrees(lambda: fv.Probe(net, "gaussian").fisher(data), truth)


class Doubles(torch.autograd.Function):
    """x where it is small, 2 x elsewhere; its rule for vmap forgets the latter."""

    @staticmethod
    def forward(x):
        return torch.where(x.abs() > 4, 2 * x, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() > 4, 2 * g, g)

    @staticmethod
    def vmap(info, in_dims, x):
        return x.clone(), in_dims[0]


def test_a_rule_for_vmap_that_is_wrong_for_some_examples_is_not_believed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.scale * Doubles.apply(x * self.scale) / 5))

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(9, 3).double()
    with torch.no_grad():
        net.scale.fill_(1.0)
    x[6] *= 20  # not among the two whose gradients are compared one by one
    everything_agrees(lambda: fv.Probe(net, "gaussian").fisher(x), brute_force(net, x))
