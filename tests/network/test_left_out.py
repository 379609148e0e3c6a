"""Positions that targets leave out (`ignore_index`): they contribute nothing to anything, whatever is asked."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import nets, positions
from tests.oracles.checks import FLOAT32, assert_matches

CLASSES = 4


class Second(nn.Module):
    """Classes on the second axis."""

    def forward(self, z):
        return z.movedim(-1, 1)


class Attention(nn.Module):
    """Each token reads those before it: a masked prompt acts on the answer, later tokens on nothing that counts."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        scores = (self.query(x) @ self.key(x).mT).masked_fill(later, -torch.inf)
        return self.head(torch.tanh(x + scores.softmax(-1) @ self.value(x)))


def reader():
    return nn.Sequential(nn.Embedding(9, 3), Attention())


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, CLASSES)), (5, 2)),
    "normalised": (lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, CLASSES)), (5, 2)),
    "attention": (Attention, (5, 3)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, CLASSES, 1)), (2, 5)),
}
networks = pytest.mark.parametrize("name", NETS)
kinds = pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])


def setting(name, axis=-1, n=4):
    """A network with its classes on an axis, inputs, labels and a random mask with a position for each example."""
    build, shape = NETS[name]
    net, second = nets.randomised(build()), name == "convolution"
    if second != (axis == 1):
        net = nn.Sequential(net, Second() if axis == 1 else First())
    x = torch.randn(n, *shape, dtype=torch.float64)
    counted = torch.rand(n, 5) < 0.5
    counted[torch.arange(n), torch.randint(5, (n,))] = True
    return net, x, torch.randint(CLASSES, (n, 5)), counted


class First(nn.Module):
    """Classes on the last axis."""

    def forward(self, z):
        return z.movedim(1, -1)


def oracle(net, x, labels, counted, axis=-1):
    one = [(x[n : n + 1],) for n in range(len(x))]
    return positions.rows(net, one, counted, labels, axis)


def check(fisher, F):
    v = torch.randn(len(F), dtype=torch.float64)
    damped = F + 0.1 * torch.eye(len(F)).double()
    assert_matches(fisher @ v, F @ v)
    assert fisher.fresh().quadratic(v) == pytest.approx(float(v @ F @ v), rel=1e-9)
    assert_matches(fisher.diagonal(), F.diagonal())
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher.fresh().solve(v, 0.1), torch.linalg.solve(damped, v))
    for order, expected in (("fro", F.norm()), ("trace", F.trace()), ("spectral", torch.linalg.matrix_norm(F, 2))):
        assert fisher.fresh().norm(order) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.covering
@kinds
@networks
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("bytes_", [1, 10**9], ids=["one example at a time", "whole batches"])
def test_the_fisher_is_that_without_the_logits(monkeypatch, kind, name, axis, bytes_):
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
    net, x, y, counted = setting(name, axis)
    fisher = fv.Probe(net, fv.Categorical(axis, ignore_index=7)).fisher(x, y.masked_fill(~counted, 7), kind=kind)
    dense = fisher.to_dense()
    if kind == "mc":
        y = fisher.vectors.labels(net(x).detach(), 0)[0]  # those that were drawn
    F = positions.mean(oracle(net, x, None if kind == "exact" else y, counted, axis))
    assert_matches(dense, F)
    check(fisher.fresh(), F)


@kinds
def test_the_fisher_in_single_precision(kind):
    net, x, y, counted = setting("attention")
    single = net.to(torch.float32)
    fisher = fv.Probe(single, "categorical").fisher(x.float(), y.masked_fill(~counted, -100), kind=kind)
    dense = fisher.to_dense()
    if kind == "mc":
        y = fisher.vectors.labels(single(x.float()).detach(), 0)[0]
    product = fisher.fresh() @ torch.ones(fisher.shape[0])
    F = positions.mean(oracle(net.double(), x.float().double(), None if kind == "exact" else y, counted))
    assert_matches(dense, F, FLOAT32)
    assert_matches(product, F.sum(1), FLOAT32)


@networks
def test_the_gradient_and_the_natural_gradient(name):
    net, x, y, counted = setting(name)
    found = oracle(net, x, y, counted)
    g = sum(row[0] for row in found) / len(x)
    F = positions.mean(oracle(net, x, None, counted))
    fisher = fv.Probe(net, "categorical").fisher(x, y.masked_fill(~counted, -100))
    assert_matches(fisher.gradient(), g)
    assert_matches(fisher.fresh().natural_gradient(0.1), torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), g))


@kinds
@pytest.mark.parametrize("ignore_index", [-100, 0, 2])
def test_vectors_at_positions_that_are_left_out_are_exactly_zero(kind, ignore_index):
    """Also where ignore_index is a class, which may be drawn, and elsewhere counts."""
    z, counted = nets.vectors(6, 15).reshape(6, 5, 3), torch.rand(6, 5) < 0.5
    y = torch.where(counted, 1, ignore_index)
    fisher = fv.Probe(nets.mlp(2, 3), fv.Categorical(ignore_index=ignore_index)).fisher(z, kind=kind, targets=y)
    v = fisher.vectors(z, y, 0)
    whole = fv.Probe(nets.mlp(2, 3), "categorical").fisher(z, kind=kind, targets=torch.ones_like(y)).vectors
    assert len(v) == whole.count(z) == fisher.vectors.count(z)
    assert (v[:, ~counted] == 0).all()
    assert torch.equal(v[:, counted], whole(z, torch.ones_like(y), 0)[:, counted])


def test_a_mask_costs_no_pass():
    net, x, y, counted = setting("attention")
    calls, made = [], []
    net.register_forward_hook(lambda *_: calls.append(1))
    for targets in (y, y.masked_fill(~counted, -100)):
        fisher = fv.Probe(net, "categorical").fisher(x, targets)
        calls.clear()
        fisher.to_dense(), fisher.norm(), fv.approximate(fisher, "kfac"), fv.approximate(fisher, "foof")
        made.append(len(calls))
    assert made[0] == made[1]


@pytest.mark.parametrize("shape", [(6,), (6, 5)])
@kinds
def test_examples_of_which_nothing_counts_are_as_if_they_were_not_there(shape, kind):
    torch.manual_seed(0)
    net, x = nets.mlp(3, 4, 3), torch.randn(*shape, 3, dtype=torch.float64)
    y = torch.randint(3, shape)
    y[[1, 4]] = -100
    left = torch.tensor([0, 2, 3, 5])
    probe = fv.Probe(net, "categorical")
    fisher, without = probe.fisher(x, y, kind=kind), probe.fisher(x[left], y[left], kind=kind)
    assert_matches(fisher.to_dense(), without.to_dense())
    assert fisher.examples == 4
    assert_matches(fisher.gradient(), without.gradient())
    batches = [(x[:1], y[:1]), (x[1:2], y[1:2]), (x[2:], y[2:])]  # one of them is empty
    if kind != "mc":  # which depends on the batches
        assert_matches(probe.fisher(batches, kind=kind).to_dense(), without.to_dense())
    assert_matches(fv.approximate(fisher, "kfac").to_dense(), fv.approximate(without, "kfac").to_dense())
    if shape == (6,):
        assert fv.cumulants(fisher).bound == pytest.approx(fv.cumulants(without).bound, rel=1e-9)
        z = net(x)
        nn.functional.cross_entropy(z, y).backward()
        g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        assert_matches(fv.Probe(net, nn.CrossEntropyLoss()).fisher(x, y).gradient(), g)


def test_data_of_which_nothing_counts_are_refused():
    with pytest.raises(ValueError, match="leave out every position of the data"):
        fv.Probe(nets.mlp(2, 3), "categorical").fisher(nets.vectors(4, 2), torch.full((4,), -100)).to_dense()


# ---- batches of different lengths, and the same padded to one -------------------------------------------------------


def ragged_and_padded(name, lengths=(5, 2, 4, 1)):
    torch.manual_seed(1)
    build, _ = NETS.get(name, (reader, None))
    net, n, longest = nets.randomised(build()), len(lengths), max(lengths)
    x = (
        torch.randint(9, (n, longest))
        if name == "reader"
        else torch.randn(n, longest, 3 - (name != "attention")).double()
    )
    y = torch.randint(CLASSES, (n, longest))
    prompt = torch.arange(longest) == 1  # a position in the middle is left out of both
    y[:, prompt] = -100
    ragged = [(x[i : i + 1, :t], y[i : i + 1, :t]) for i, t in enumerate(lengths)]
    for i, t in enumerate(lengths):
        y[i, t:] = -100
    return net, ragged, (x, y)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["linear", "normalised", "attention", "reader"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_padding_that_is_left_out_changes_nothing(name, kind):
    net, ragged, padded = ragged_and_padded(name)
    one, other = (fv.Probe(net, "categorical").fisher(data, kind=kind) for data in (ragged, padded))
    assert_matches(other.to_dense(), one.to_dense())
    v = torch.randn(one.shape[0], dtype=torch.float64)
    assert_matches(other.fresh() @ v, one.fresh() @ v)
    assert_matches(other.fresh().solve(v, 0.1), one.fresh().solve(v, 0.1))
    assert other.fresh().norm() == pytest.approx(one.fresh().norm(), rel=1e-9)
    assert_matches(other.gradient(), one.gradient())


SETTINGS = {method: (method, {}) for method in fv.approximations} | {
    f"{method}, reduce": (method, {"setting": "reduce"})
    for method in fv.approximations
    if method.startswith(("kfac", "ekfac"))
}


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*(chain|structure|scaled)")
@pytest.mark.parametrize("chosen", SETTINGS)
@pytest.mark.parametrize("name", ["linear", "normalised", "attention", "reader"])
def test_no_approximation_sees_padding(name, chosen):
    """Inputs of padded positions are in no average, those of a prompt that acts on what counts are."""
    method, options = SETTINGS[chosen]
    net, ragged, padded = ragged_and_padded(name)
    one, other = (fv.Probe(net, "categorical").fisher(data) for data in (ragged, padded))
    other.norm()  # the captures are kept by now
    found = [fv.approximate(fisher, method, **options) for fisher in (one, other)]
    assert_matches(found[1].to_dense(), found[0].to_dense(), 1e-7)
    v = torch.randn(one.shape[0], dtype=torch.float64)
    if method != "kfac-tridiagonal":
        assert_matches(found[1].solve(v, 0.1), found[0].solve(v, 0.1), 1e-6)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof"])
def test_captures_that_are_kept_know_what_counts(method):
    """Of batches of which only some leave anything out, read as one."""
    net, _, (x, y) = ragged_and_padded("attention", (5, 5, 4, 2))
    whole, batches = (fv.Probe(net, "categorical").fisher(d) for d in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])]))
    batches.norm()
    assert_matches(fv.approximate(batches, method).to_dense(), fv.approximate(whole, method).to_dense())


class Pooled(nn.Module):
    """Half as many outputs as inputs: each reads two positions."""

    def __init__(self):
        super().__init__()
        self.read, self.head = nn.Linear(2, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.read(x)).unflatten(1, (-1, 2)).mean(2))


def test_positions_of_layers_that_have_others_than_the_output():
    net, x = nets.randomised(Pooled()), torch.randn(3, 6, 2).double()
    y = torch.tensor([[1, 0, -100], [2, -100, -100], [3, 1, 0]])
    A = fv.approximate(fv.Probe(net, "categorical").fisher(x, y), "kfac").operator(0, 0).A
    a = torch.cat([x, torch.ones(3, 6, 1).double()], 2)
    assert_matches(A, sum(part[: 2 * t].T @ part[: 2 * t] / (2 * t) for part, t in zip(a, (2, 1, 3), strict=True)) / 3)


def test_a_prompt_acts_on_what_counts():
    """The inputs of a position whose own output is left out are in the average of a layer before the attention."""
    net = nets.randomised(Attention())
    x, y = torch.randn(1, 3, 3).double(), torch.tensor([[-100, 1, -100]])
    kfac = fv.approximate(fv.Probe(net, "categorical").fisher(x, y), "kfac")
    value, head = (kfac.operator(i, i) for i in (2, 3))
    a = torch.cat([x[0], torch.ones(3, 1).double()], 1)[:2]  # the last one acts on nothing that counts
    assert_matches(value.A, a.T @ a / 2)
    assert torch.linalg.matrix_rank(head.A) == 1


def test_comparisons_and_sums_over_batches_agree():
    net, ragged, padded = ragged_and_padded("attention")
    methods = ["kfac", "ekfac", "foof", "diagonal"]
    one, other = (fv.compare(fv.Probe(net, "categorical").fisher(d), methods, progress=False) for d in (ragged, padded))
    for metric in ("relative_frobenius", "frobenius_cosine"):
        assert_matches(other.summary()[metric], one.summary()[metric], 1e-7)


# ---- what is told, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_targets_of_another_shape_are_refused_where_they_leave_something_out(kind):
    net, x, y, _ = setting("linear")
    fisher = fv.Probe(net, "categorical").fisher(x, torch.cat([y, torch.full_like(y[:, :1], -100)], 1), kind=kind)
    with pytest.raises(ValueError, match=r"targets must have shape \(4, 5\), got \(4, 6\)"):
        fisher.diagonal()
    with pytest.raises(ValueError, match=r"targets must have shape \(4, 5\), got \(4, 6\)"):
        fisher @ torch.ones(fisher.shape[0], dtype=torch.float64)
