"""Layers whose examples are not their first axis: behind the positions, or as one axis with them, by evidence."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherviz as fv
from fisherviz.capture.ways import FIRST
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches
from tests.training_runs import assert_resumes, half_squares, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*chain", "ignore:.*exact 2 x 2", "ignore:.*no structure")

T, D = 3, 4


class Inside(nn.Module):
    """Layers between two that have the examples (N, T, D) first; `there` and `back` change what they see."""

    def __init__(self, layers, there, back, dropout=0.0):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(D, D), layers, nn.Linear(D, 2)
        self.there, self.back, self.dropout = there, back, nn.Dropout(dropout)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.back(self.inner(self.there(h)), len(x))
        return self.dropout(self.last(h.cumsum(1)).mean(1))


def dense():
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D, bias=False))


def pixels():
    return nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Tanh(), nn.Conv1d(2, 1, 1))


WAYS = {
    "positions first": (dense, lambda h: h.transpose(0, 1), lambda h, n: h.transpose(0, 1)),
    "positions first, merged": (
        dense,
        lambda h: h.transpose(0, 1).flatten(0, 1),
        lambda h, n: h.unflatten(0, (-1, n)).transpose(0, 1),
    ),
    "merged": (dense, lambda h: h.flatten(0, 1), lambda h, n: h.unflatten(0, (n, -1))),
    "windows": (
        dense,
        lambda h: h.unflatten(2, (2, 2)).movedim(2, 1).flatten(0, 1).repeat(1, 1, 2).roll(1, 1),
        lambda h, n: h[..., :2].unflatten(0, (n, 2)).movedim(1, 2).flatten(2),
    ),
    "frames": (pixels, lambda h: h.flatten(0, 1).unsqueeze(1), lambda h, n: h.squeeze(1).unflatten(0, (n, -1))),
    "checkpointed": (
        lambda: Checkpointed(dense()),
        lambda h: h.transpose(0, 1),
        lambda h, n: h.transpose(0, 1),
    ),
}


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


ways = pytest.mark.parametrize("way", WAYS)


def made(way, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    layers, there, back = WAYS[way]
    net = nets.randomised(Inside(layers(), there, back, dropout))
    return net, torch.randn(5, T, D, dtype=torch.float64)


def structured_only(monkeypatch):
    monkeypatch.setattr("fisherviz.capture.take.generic_captures", None)


@ways
def test_exact_quantities(way, monkeypatch):
    net, x = made(way)
    structured_only(monkeypatch)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    assert {layer.path for layer in fisher.layers} == {"structured"}
    v = torch.randn(len(F), 2, dtype=torch.float64)
    for asked in (fisher.fresh(), fisher.fresh().with_captures()):
        assert_matches(asked @ v, F @ v.numpy())
        assert_matches(asked.solve(v[:, 0], 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v[:, 0].numpy()), 1e-9)
        assert_matches(asked.diagonal(), np.diag(F))


@ways
def test_labels_batches_and_single_precision(way, monkeypatch):
    net, x = made(way)
    structured_only(monkeypatch)
    parts = [x, x[:1], x[1:4], torch.cat([x, x + 1], 1)[:2], x[:T]]
    labels = [torch.arange(len(part)) % 2 for part in parts]
    data = list(zip(parts, labels, strict=True))
    sums = [exact.fisher(net, p, laws.Categorical(), targets=y, reduction="sum") for p, y in data]
    F = sum(sums) / sum(map(len, parts))
    for bytes_ in (1, 10**9):
        monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
        assert_matches(fv.Probe(net, "categorical").fisher(data, kind="empirical").to_dense(), F)
    single = fv.Probe(copy.deepcopy(net).float(), "categorical")
    found = single.fisher([(p.float(), y) for p, y in data], kind="empirical")
    assert_matches(found.to_dense(), F, FLOAT32)


@pytest.mark.covering
@ways
@pytest.mark.parametrize("n", [2, T, 32])
def test_as_many_examples_as_positions(way, n):
    net, _ = made(way)
    x = torch.randn(n, T, D, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    if n == 2:
        x = torch.randn(n, n, D, dtype=torch.float64)
        fisher = fv.Probe(net, "gaussian").fisher(x)
        assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
        assert {layer.path for layer in fisher.layers} == {"structured"}


TWINS = {
    "positions first": (lambda h: h, lambda h, n: h),
    "positions first, merged": (lambda h: h, lambda h, n: h),
    "merged": (lambda h: h, lambda h, n: h),
    "checkpointed": (lambda h: h, lambda h, n: h),
}


def twins(way, dropout=0.0):
    """The same function with the examples where the user has them and first."""
    net, x = made(way, dropout)
    other = copy.deepcopy(net)
    other.there, other.back = TWINS[way]
    return net, other, x


@pytest.mark.covering
@pytest.mark.parametrize("way", TWINS)
@pytest.mark.parametrize("method", list(fv.approximations))
def test_methods_are_those_with_the_examples_first(way, method):
    net, other, x = twins(way)
    one, two = (fv.approximate(fv.Probe(model, "gaussian").fisher(x), method).to_dense() for model in (net, other))
    assert_matches(one, two)


OPTIMIZERS = ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree", "layer"]


@pytest.mark.covering
@pytest.mark.parametrize("way", TWINS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_step_as_with_the_examples_first(way, optimizer):
    net, other, x = twins(way)
    loss = half_squares(x, torch.linspace(-1, 1, 10).double().view(5, 2))

    def build(model):
        if hasattr(fv.optim, optimizer):
            return getattr(fv.optim, optimizer)(model, "gaussian")
        return fv.optim.NaturalGradient(model, "gaussian", optimizer, damping=0.1, lr=0.1)

    assert_matches(trained(build, net, loss), trained(build, other, loss), 1e-9)


@pytest.mark.parametrize("way", TWINS)
@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_an_optimizer_without_evidence_of_single_examples(way, kind):
    """Under dropout no example's output is its own: which gradients vanish tells whose rows are whose."""
    weights = []
    for model in twins(way, dropout=0.5)[:2]:
        torch.manual_seed(2)
        optimizer = fv.optim.NaturalGradient(model.train(), "gaussian", "layer", damping=0.1, lr=0.1, kind=kind)
        for n in (5, 3):
            optimizer.zero_grad()
            model(twins(way)[2][:n]).square().sum(1).mean().backward()
            optimizer.step()
        assert all(layer.structured for layer in optimizer.layers)
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert_matches(*weights, 1e-9)


def test_an_optimizer_resumes(tmp_path):
    net, _, x = twins("positions first")

    def build(model):
        return fv.optim.NaturalGradient(model, "gaussian", "layer", lr=0.01, damping=0.1, T=3)

    assert_resumes(build, net.train(), lambda model: model(x).square().mean(), tmp_path)


class TimeFirst(nn.Module):
    """What torch's own layers do with their default `batch_first=False`."""

    def __init__(self, inner, tokens=False):
        super().__init__()
        self.inner, self.norm, self.last = inner, nn.LayerNorm(D), nn.Linear(D, 2)
        self.tokens = nn.Embedding(5, D) if tokens else None

    def forward(self, x):
        h = x.transpose(0, 1) if self.tokens is None else self.tokens(x.T)
        h = self.inner(h)
        h = h[0] if isinstance(h, tuple) else h
        return self.last(torch.tanh(self.norm(h)))[-1]


TORCH = {
    "encoder": (lambda: nn.TransformerEncoderLayer(D, 2, 5), ()),
    "two encoders": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 5), 2, enable_nested_tensor=False),
        (),
    ),
    "norm first": (lambda: nn.TransformerEncoderLayer(D, 2, 5, norm_first=True), ()),
    "GRU": (lambda: nn.GRU(D, D), ("inner",)),
}


@pytest.mark.covering
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("tokens", [False, True])
def test_torchs_own_layers(name, tokens):
    torch.manual_seed(0)
    build, generic = TORCH[name]
    net = nets.randomised(TimeFirst(build(), tokens))
    x = torch.randint(5, (4, T)) if tokens else torch.randn(4, T, D, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    assert tuple(layer.name for layer in fisher.layers if layer.path == "generic") == generic
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher.fresh().solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()), 1e-9)


class Chosen(nn.Module):
    """Rows of all examples that are chosen by what they hold; here, all of them in every batch but the last."""

    def __init__(self, choose):
        super().__init__()
        self.first, self.expert, self.last, self.choose = nn.Linear(D, D), dense(), nn.Linear(D, 2), choose

    def forward(self, x):
        flat = self.first(x).tanh().flatten(0, 1)
        there = (x.flatten(0, 1)[:, 0] < 9).nonzero().squeeze(1)
        out = torch.zeros_like(flat).index_copy(0, there, self.expert(self.choose(flat, there)))
        return self.last((flat + out).unflatten(0, (len(x), -1)).mean(1))


CHOICES = {
    "index": lambda flat, there: flat[there],
    "index_select": lambda flat, there: flat.index_select(0, there),
    "gather": lambda flat, there: flat.gather(0, there.unsqueeze(1).expand(-1, D)),
    "rows put together": lambda flat, there: torch.cat([flat[int(i) : int(i) + 1] for i in there]),
    "rows put together, counted from the end": lambda flat, there: torch.cat([flat[int(i), None] for i in there], -2),
    "rows stacked": lambda flat, there: torch.stack([flat[int(i)] for i in there]),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_rows_that_were_chosen_are_generic_even_if_all_were(choose):
    torch.manual_seed(0)
    net, x = nets.randomised(Chosen(choose)), torch.randn(8, T, D, dtype=torch.float64)
    x[4:, 0, 0] = 10.0  # two thirds of the rows are left: as many for each example as in windows
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher([(x[:4],), (x[4:],)])
    assert_matches(fisher.to_dense(), F)
    generic = [layer.name for layer in fisher.layers if layer.path == "generic"]
    assert generic == ["expert.0", "expert.1", "expert.3"]


class OneByOne(nn.Module):
    """A layer that sees each example alone, without an axis of examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x])


@pytest.mark.parametrize("n", [1, 2, D])
def test_vectors_as_wide_as_the_examples_are_many(n):
    net, x = nets.randomised(OneByOne()), torch.randn(n, D, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert fisher.layers[0].path == ("structured" if n == 1 else "generic")  # all that it sees is the one example's


def test_examples_in_another_order_are_not_taken_for_positions():
    torch.manual_seed(0)
    net = nets.randomised(
        Inside(dense(), lambda h: h.flip(0).flatten(0, 1), lambda h, n: h.unflatten(0, (n, -1)).flip(0))
    )
    x = torch.randn(5, T, D, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert [layer.path for layer in fisher.layers].count("generic") == 3


def _chooses_later(approximation, **options):
    """An optimizer after its first steps, in which all rows were there, and a batch of which some are left out."""
    torch.manual_seed(0)
    net, x = nets.randomised(Chosen(CHOICES["index"])).train(), torch.randn(4, T, D, dtype=torch.float64)
    net.choose = lambda flat, there: flat if len(there) == len(flat) else flat[there]
    optimizer = fv.optim.NaturalGradient(net, "gaussian", approximation, lr=0.1, damping=0.1, **options)
    for _ in range(FIRST):  # later passes are no longer looked at for evidence, unless they go a new way
        optimizer.zero_grad()
        net(x).square().sum(1).mean().backward()
        optimizer.step()
    x[:, 0, 0] = 10.0
    return net, x, optimizer


def test_an_optimizer_begins_anew_where_a_later_pass_goes_a_new_way():
    net, x, optimizer = _chooses_later("exact", kind="exact", decay=0.0)
    F = torch.as_tensor(exact.fisher(net.eval(), x, laws.Gaussian()))
    before = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    optimizer.zero_grad()
    net.train()(x).square().sum(1).mean().backward()
    g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in net.parameters()]) - before
    assert_matches(moved, -0.1 * torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), g), 1e-9)


def test_an_optimizer_says_where_it_loses_the_examples(monkeypatch):
    """Where several processes train together, the first pass decides for all of them."""
    monkeypatch.setattr("fisherviz.optim.watching.grouped", lambda: True)
    net, x, _held = _chooses_later("kfac")
    with pytest.raises(
        RuntimeError, match=r"layer 'expert.0' has changed since the first pass: .* approximation='none'"
    ):
        net(x).square().sum(1).mean().backward()


def test_an_optimizer_looks_for_evidence_in_its_first_passes():
    """One example tells nothing of how a batch is laid out; in the same step it is too late to begin anew."""
    net = nets.randomised(Inside(dense(), lambda h: h.flip(0), lambda h, n: h.flip(0))).train()
    x = torch.randn(5, T, D, dtype=torch.float64)
    optimizer = fv.optim.NaturalGradient(net, "gaussian", "exact", lr=0.1, damping=0.1, kind="exact", decay=0.0)
    net(x[:1]).square().sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    F = torch.as_tensor(exact.fisher(net.eval(), x, laws.Gaussian()))
    before = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    net.train()(x).square().sum(1).mean().backward()
    g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in net.parameters()]) - before
    wanted = -0.1 * torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), g)
    assert_matches(moved, wanted, 1e-9)


def test_evidence_that_comes_in_the_middle_of_a_step_is_told():
    net = nets.randomised(Inside(dense(), lambda h: h.flip(0), lambda h, n: h.flip(0))).train()
    x = torch.randn(5, T, D, dtype=torch.float64)
    optimizer = fv.optim.NaturalGradient(net, "gaussian", "kfac", lr=0.1, damping=0.1)
    assert [layer.name for layer in optimizer.layers if not layer.structured] == []
    net(x[:1]).square().sum(1).mean().backward()
    with pytest.raises(RuntimeError, match=r"turn out to have no structure .* let the first pass be such a batch"):
        net(x).square().sum(1).mean().backward()


@pytest.mark.parametrize("sizes", [[3] * 5 + [1], [1] * 16, [15, 1]])
@pytest.mark.parametrize("contiguous", [True, False])
def test_outputs_that_are_changed_in_place_are_right_whether_or_not_they_are_views(sizes, contiguous):
    """What a Linear gives is a view where its input is contiguous, as in a last batch of one example."""

    def there(h):
        return h.contiguous() if contiguous else h.transpose(0, 1).contiguous().transpose(0, 1)

    net = nets.randomised(Inside(nn.Linear(D, D), there, lambda h, n: torch.tanh(h.add_(1.0).mul_(0.5))))
    x = torch.randn(16, T, D, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(list(x.split(sizes)))
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
