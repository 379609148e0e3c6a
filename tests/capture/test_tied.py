"""Weights that modules share: exact quantities are sums over all uses, without per-example passes of the model."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations import LayerWise
from fisherviz.capture.captures import TiedCapture
from fisherviz.statistics.gradients import example_gram
from tests.covering import some
from tests.oracles import exact, kronecker, laws, nets, positions
from tests.oracles.checks import FLOAT32, assert_matches
from tests.training_runs import assert_resumes

pytestmark = pytest.mark.filterwarnings("ignore:.*chain", "ignore:.*share the weight", "ignore:.*exact 2 x 2")

V, D = 6, 3


class Language(nn.Module):
    """Tokens in, a softmax over tokens at every position; each position reads those before it."""

    def __init__(self, bias=False, padding_idx=None, table=nn.Embedding, head_first=False, classes_last=True):
        super().__init__()
        if head_first:
            self.head = nn.Linear(D, V, bias=bias)
        self.table = table(V, D, padding_idx=padding_idx)
        self.mix = nn.Linear(D, D)
        if head_first:
            self.table.weight = self.head.weight
        else:
            self.head = nn.Linear(D, V, bias=bias)
            self.head.weight = self.table.weight
        self.classes_last = classes_last

    def forward(self, x):
        h = self.table(x).cumsum(1) if isinstance(self.table, nn.Embedding) else self.table(x).unsqueeze(1)
        z = self.head(torch.tanh(self.mix(h)))
        return z if self.classes_last else z.movedim(-1, 1)


class Bert(Language):
    """The decoder's weight is the table's, its bias the root's: Hugging Face's BERT."""

    def __init__(self):
        super().__init__(bias=True)
        self.bias = nn.Parameter(torch.zeros(V))
        self.head.bias = self.bias


class Twice(Language):
    """A table and a head that are each used twice, and a second table."""

    def __init__(self):
        super().__init__(bias=True)
        self.types = nn.Embedding(V, D)
        self.types.weight = self.table.weight

    def forward(self, x):
        h = torch.tanh(self.mix(self.table(x) * self.types(x.flip(1)) + self.table(x.roll(1, 1))))
        return self.head(h).cumsum(1) + torch.tanh(self.head(h.square()))


class Pair(nn.Module):
    """Two modules of one kind, with some of their parameters in common, and one that is called twice."""

    def __init__(self, build, shared, last=None):
        super().__init__()
        self.one, self.two, self.last = build(), build(), last or nn.Linear(D, 2)
        for name in shared:
            setattr(self.two, name, getattr(self.one, name))

    def forward(self, x):
        h = torch.tanh(self.one(torch.tanh(self.one(x))))
        return self.last(torch.tanh(self.two(h)))


def words(*shape):
    return lambda: torch.randint(V, shape)


def vectors(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def pixels():
    return nn.Sequential(nn.Conv1d(D, 2, 1), nets.MeanPixels())


LANGUAGE = {
    "embedding and head": (Language, words(4, 3)),
    "head with a bias": (lambda: Language(bias=True), words(4, 3)),
    "padding": (lambda: Language(bias=True, padding_idx=1), words(4, 3)),
    "head first": (lambda: Language(bias=True, head_first=True), words(4, 3)),
    "head first, padding": (lambda: Language(padding_idx=1, head_first=True), words(4, 3)),
    "one token": (lambda: Language(bias=True), words(4, 1)),
    "bag": (lambda: Language(table=nn.EmbeddingBag), words(4, 3)),
    "both used twice": (Twice, words(4, 3)),
}
PAIRS = {
    "linears, weight": (lambda: Pair(lambda: nn.Linear(D, D), ["weight"]), vectors(5, D)),
    "linears, bias": (lambda: Pair(lambda: nn.Linear(D, D), ["bias"]), vectors(5, D)),
    "linears, both": (lambda: Pair(lambda: nn.Linear(D, D), ["weight", "bias"]), vectors(5, D)),
    "linears on tokens": (
        lambda: Pair(lambda: nn.Linear(D, D), ["weight"], nn.Sequential(nn.Linear(D, 2), nets.MeanTokens())),
        vectors(4, 2, D),
    ),
    "convolutions": (lambda: Pair(lambda: nn.Conv1d(D, D, 3, padding=1), ["weight"], pixels()), vectors(3, D, 4)),
    "depthwise convolutions": (
        lambda: Pair(lambda: nn.Conv1d(D, D, 3, padding=1, groups=D), ["weight"], pixels()),
        vectors(3, D, 4),
    ),
    "normalisation": (lambda: Pair(lambda: nn.LayerNorm(D), ["weight"]), vectors(5, D)),
    "normalisation, bias": (lambda: Pair(lambda: nn.LayerNorm(D), ["bias"]), vectors(5, D)),
}
NETS = LANGUAGE | PAIRS | {"a bias of the root's": (Bert, words(4, 3))}
FEW = (
    "embedding and head", "head first, padding", "one token", "bag", "linears, both", "convolutions",
    "normalisation, bias", "a bias of the root's",
)  # fmt: skip
"""One of each kind."""
every = pytest.mark.parametrize("name", NETS)
language = pytest.mark.parametrize("name", LANGUAGE)


def made(name):
    torch.manual_seed(0)
    build, data = NETS[name]
    return nets.randomised(build()), data()


def structured_only(monkeypatch):
    """No layer may take the generic path."""
    for place in ("take", "evidence"):
        monkeypatch.setattr(f"fisherviz.capture.{place}.generic_captures", None)


def blocks_of(probe, F):
    """Where each layer's parameters stand in the Fisher."""
    sizes = {name: p.numel() for name, p in probe.model.named_parameters()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    return [
        np.concatenate([np.arange(starts[name], starts[name] + sizes[name]) for name in layer.parameters])
        for layer in probe.layers
    ]


@every
def test_exact_quantities_are_sums_over_the_uses(name, monkeypatch):
    net, x = made(name)
    if name != "a bias of the root's":
        structured_only(monkeypatch)
    F = exact.fisher(net, x, laws.Gaussian())
    probe = fv.Probe(net, "gaussian")
    fisher, v = probe.fisher(x), torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fisher.to_dense(), F)
    assert [p for layer in probe.layers if layer.path == "generic" for p in layer.parameters] == (
        ["bias"] if name == "a bias of the root's" else []
    )
    where = blocks_of(probe, F)
    for i, rows in enumerate(where):
        for j, cols in enumerate(where):
            assert_matches(fisher.fresh().block(i, j), F[np.ix_(rows, cols)])
            expected = np.linalg.norm(F[np.ix_(rows, cols)])
            assert fisher.fresh().norm("fro", block=(i, j)) == pytest.approx(expected)
    for made_of in (fisher.fresh(), fisher.fresh().with_captures()):
        assert_matches(made_of @ v, F @ v.numpy())
        assert_matches(made_of.solve(v[:, 0], 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v[:, 0].numpy()), 1e-9)
        assert_matches(made_of.diagonal(), np.diag(F))
        assert made_of.norm("spectral") == pytest.approx(np.linalg.norm(F, 2), rel=1e-7)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_of_examples_are_symmetric_bit_for_bit(head_first, dtype):
    torch.manual_seed(0)
    net = nets.randomised(Language(bias=True, head_first=head_first)).to(dtype)
    gram = fv.Probe(net, "gaussian").fisher(torch.randint(V, (9, 3))).example_space()
    found = example_gram(next(c for c in gram.values() if isinstance(c, TiedCapture)))
    assert torch.equal(found, found.T)


@pytest.mark.covering
@pytest.mark.parametrize("name", some(NETS, *FEW))
@pytest.mark.parametrize("bytes_", [1, 10**9], ids=["vector by vector", "at once"])
def test_in_batches_of_other_lengths_vector_by_vector_and_in_single_precision(name, bytes_, monkeypatch):
    net, x = made(name)
    short = x if x.dim() == 2 and name in PAIRS else x[..., :1] if "convolutions" in name else x[:, :1]
    F = (exact.fisher(net, x, laws.Gaussian()) + exact.fisher(net, short, laws.Gaussian())) / 2
    v = torch.randn(len(F), dtype=torch.float64)
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
    fisher = fv.Probe(net, "gaussian").fisher([(x,), (short,)])
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
    assert_matches(fisher.to_dense(), F)
    single = net.float()
    data = [x.float(), short.float()] if name in PAIRS else [x, short]
    found = fv.Probe(single, "gaussian").fisher([(b,) for b in data])
    F = sum(exact.fisher(net.double(), b.double() if name in PAIRS else b, laws.Gaussian()) for b in data) / 2
    found_products = fv.Probe(net.float(), "gaussian").fisher([(b,) for b in data])
    assert_matches(found_products @ v.float(), F @ v.numpy(), FLOAT32)
    assert_matches(found.to_dense(), F, FLOAT32)


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
def test_positions_that_are_left_out(head_first, axis, kind):
    torch.manual_seed(0)
    net = nets.randomised(Language(bias=True, head_first=head_first, classes_last=axis == -1))
    x, y, counted = torch.randint(V, (4, 5)), torch.randint(V, (4, 5)), torch.rand(4, 5) < 0.5
    counted[:, 2] = True
    fisher = fv.Probe(net, fv.Categorical(axis)).fisher(x, y.masked_fill(~counted, -100), kind=kind)
    dense = fisher.to_dense()
    if kind == "mc":
        y = fisher.vectors.labels(net(x).detach(), 0)[0]
    rows = positions.rows(net, [(x[n : n + 1],) for n in range(4)], counted, None if kind == "exact" else y, axis)
    F = positions.mean(rows).numpy()
    assert_matches(dense, F)
    fresh, v = fisher.fresh(), np.arange(len(F)) / len(F)
    assert_matches(fresh.solve(torch.from_numpy(v), 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
    assert_matches(fv.approximate(fresh, "diagonal").diagonal(), np.diag(F))


@language
def test_units_are_rows_of_the_first_modules_matrix(name):
    net, x = made(name)
    F, head_first = exact.fisher(net, x, laws.Gaussian()), "head first" in name
    probe = fv.Probe(net, "gaussian")
    table = next(
        layer for layer in probe.layers if any(p.endswith("e.weight") or "head.w" in p for p in layer.parameters)
    )
    weight = np.arange(V * D).reshape(V, D)
    rows = weight if head_first else weight.T
    if head_first and net.head.bias is not None:
        rows = np.concatenate([rows, V * D + np.arange(V)[:, None]], 1)
    assert_matches(probe.fisher(x).units(table.name), np.stack([F[np.ix_(row, row)] for row in rows]))


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(NETS, *FEW))
def test_layerwise_methods_are_parts_of_the_exact_fisher(name):
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    probe = fv.Probe(net, "gaussian")
    layerwise = np.zeros_like(F)
    for rows in blocks_of(probe, F):
        layerwise[np.ix_(rows, rows)] = F[np.ix_(rows, rows)]
    v = torch.randn(len(F), dtype=torch.float64)
    for dense in (1, 4096):
        found = fv.approximate(probe.fisher(x), "layer", dense_parameters=dense)
        assert_matches(found.to_dense(), layerwise)
        assert_matches(found.solve(v, 0.1), np.linalg.solve(layerwise + 0.1 * np.eye(len(F)), v), 1e-9)
    assert_matches(fv.approximate(probe.fisher(x), "diagonal").to_dense(), np.diag(np.diag(F)))


SUMS = ["kfac", "kfac-full", "kfac-tridiagonal", "ekfac", "foof"]
HEAD_FIRST = {name for name in LANGUAGE if "head first" in name}


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in LANGUAGE for method in ["nearest-kronecker", *(SUMS if name in HEAD_FIRST else [])]],
)
def test_a_table_that_is_a_head_has_its_exact_diagonal_in_some_and_it_is_said(name, method):
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    probe = fv.Probe(net, "gaussian")
    with pytest.warns(UserWarning, match="an embedding and a Linear share the weight of '(table|head)'"):
        found = fv.approximate(probe.fisher(x), method)
    i = next(i for i, layer in enumerate(probe.layers) if layer.num_parameters >= V * D)
    rows = blocks_of(probe, F)[i]
    dense = found.to_dense().numpy()
    assert_matches(dense[np.ix_(rows, rows)], np.diag(np.diag(F)[rows]))
    others = np.setdiff1d(np.arange(len(F)), rows)
    assert not dense[np.ix_(rows, others)].any()


def uses(net, x):
    """What the table's readers and the head show of each call: rows that are read, inputs, and output gradients.

    For each use, (w (N, T, V), g (K, N, T, D)) where rows are read, and (a (N, T, D), g (K, N, T, V)) of the head.
    """
    held = []
    readers = [m for m in net.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    hooks = [m.register_forward_hook(lambda m, given, z: held.append((m, given[0], z))) for m in [*readers, net.head]]
    z = net(x).flatten(1)
    for hook in hooks:
        hook.remove()
    read, used = [], []
    for module, given, out in held:
        g = torch.stack([torch.autograd.grad(z[:, k].sum(), out, retain_graph=True)[0] for k in range(z.shape[1])])
        g = g.view(*g.shape[:2], -1, g.shape[-1])
        if module is net.head:
            used.append((given.detach(), g))
            continue
        w = nn.functional.one_hot(given, V).double()
        if module.padding_idx is not None:
            w[..., module.padding_idx] = 0
        if isinstance(module, nn.EmbeddingBag):
            w /= w.shape[1]
        read.append((w, g.expand(-1, -1, w.shape[1], -1)))
    return read, used


def of_the_table(name, method):
    """A method's block of the table in its own order (V, D), and the exact one."""
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    probe = fv.Probe(net, "gaussian")
    dense = fv.approximate(probe.fisher(x), method).to_dense().numpy()
    i = next(i for i, layer in enumerate(probe.layers) if layer.num_parameters >= V * D)
    rows = blocks_of(probe, F)[i]
    others = np.setdiff1d(np.arange(len(F)), rows)
    assert not dense[np.ix_(rows, others)].any()
    return dense[np.ix_(rows, rows)], F[np.ix_(rows, rows)], uses(net, x), len(x)


table_first = pytest.mark.parametrize("name", [name for name in LANGUAGE if name not in HEAD_FIRST])


@table_first
def test_foof_is_the_sum_over_both_uses(name):
    with pytest.warns(UserWarning, match="share the weight of 'table': the sum over both uses is taken there"):
        found, _, (read, used), n = of_the_table(name, "foof")
    counts = sum(w.square().sum((0, 1)) for w, _ in read).numpy() / n
    A = sum(torch.einsum("nti,ntj->ij", a, a) for a, _ in used).numpy() / n
    assert_matches(found, np.kron(np.eye(V), A) + np.kron(np.diag(counts), np.eye(D)))


def factors(read, used, n):
    """A and G of both uses, positions expanded: (A, G) of the weight and (C, G) of the table."""
    found = []
    for calls in (used, read):
        a, g = torch.cat([a for a, _ in calls], 1), torch.cat([g for _, g in calls], 2)
        g = g * (a != 0).any(2, keepdim=True)  # of padding there is nothing
        A = torch.einsum("nti,ntj->ij", a, a) / n / a.shape[1]
        found.append((A.numpy(), torch.einsum("knti,kntj->ij", g, g).numpy() / n))
    return found


def common_basis(weight, table):
    (A, G), (C, S) = weight, table
    whole = np.trace(G) * A + np.trace(C) * S
    kronecker.assert_basis_is_unique(whole)
    return np.linalg.eigh(whole)[1]


def diagonal_in(Q, M):
    return Q @ np.diag(np.diag(Q.T @ M @ Q)) @ Q.T


@pytest.mark.covering
@table_first
@pytest.mark.parametrize("method", ["kfac", "kfac-full", "kfac-tridiagonal"])
def test_kfac_is_the_sum_over_both_uses_in_an_eigenbasis_that_they_share(name, method):
    with pytest.warns(UserWarning, match="the sum over both uses, in an eigenbasis that they share, is taken there"):
        found, _, (read, used), n = of_the_table(name, method)
    weight, table = factors(read, used, n)
    Q = np.kron(np.eye(V), common_basis(weight, table))
    (A, G), (C, S) = weight, table
    assert_matches(found, diagonal_in(Q, np.kron(np.diag(np.diag(G)), A) + np.kron(C, S)))


@table_first
def test_ekfac_is_the_best_diagonal_in_an_eigenbasis_of_both_uses(name):
    with pytest.warns(UserWarning, match="the exact second moment in an eigenbasis of both uses is taken there"):
        found, F, (read, used), n = of_the_table(name, "ekfac")
    assert_matches(found, diagonal_in(np.kron(np.eye(V), common_basis(*factors(read, used, n))), F))


@pytest.mark.covering
@language
@pytest.mark.parametrize(("formed", "entries"), [(2**27, 2**26), (0, 2**26), (0, 1)])
def test_unit_blocks_are_exact(name, formed, entries, monkeypatch):
    monkeypatch.setattr(sys.modules["fisherviz.approximations.units"], "FORMED_ENTRIES", formed)
    monkeypatch.setattr(sys.modules["fisherviz.approximations.example_units"], "_ENTRIES", entries)
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    probe = fv.Probe(net, "gaussian")
    found = fv.approximate(probe.fisher(x), "cw-ngd")
    i = next(i for i, layer in enumerate(probe.layers) if layer.num_parameters >= V * D)
    rows = blocks_of(probe, F)[i]
    unit = np.arange(V * D) // D if name in HEAD_FIRST else np.arange(V * D) % D
    unit = np.concatenate([unit, np.arange(len(rows) - V * D)])
    dense = np.zeros_like(F)
    for other in blocks_of(probe, F):
        dense[np.ix_(other, other)] = found.to_dense()[other][:, other]
    dense[np.ix_(rows, rows)] = np.where(unit[:, None] == unit, F[np.ix_(rows, rows)], 0)
    assert_matches(found.to_dense(), dense)
    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(found @ v, dense @ v.numpy())
    assert_matches(found.solve(v, 0.1), np.linalg.solve(dense + 0.1 * np.eye(len(F)), v.numpy()), 1e-9)
    assert found.norm("fro") == pytest.approx(np.linalg.norm(dense))
    assert found.norm("spectral") == pytest.approx(np.linalg.norm(dense, 2))


@language
def test_comparisons_without_matrices_are_those_with_them(name, monkeypatch):
    net, x = made(name)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    methods, metrics = ["foof", "ekfac", "cw-ngd", "kfac"], ["relative_frobenius", "frobenius_cosine"]
    one = fv.compare(fisher, methods, metrics=metrics, progress=False).frame
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    two = fv.compare(fisher.fresh(), methods, metrics=metrics, progress=False).frame
    both = one.merge(two, on=["method", "row", "col", "metric"])
    assert len(both) >= 2 * len(methods)
    assert_matches(both["value_x"], both["value_y"], 1e-6)


@pytest.mark.covering
@table_first
@pytest.mark.parametrize("method", ["kfac", "foof", "ekfac", "cw-ngd"])
def test_methods_in_single_precision(name, method):
    net, x = made(name)
    expected = fv.approximate(fv.Probe(net, "gaussian").fisher(x), method)
    found = fv.approximate(fv.Probe(copy.deepcopy(net).float(), "gaussian").fisher(x), method)
    v = torch.randn(len(expected.to_dense()), dtype=torch.float64)
    assert_matches(found @ v.float(), expected @ v, FLOAT32)
    assert_matches(found.solve(v.float(), 0.5), expected.solve(v, 0.5), FLOAT32)


def twins(bias):
    """A module that is called three times, and the same with a second one in its place that shares all parameters."""
    torch.manual_seed(0)
    build = lambda: nn.Linear(D, D, bias=bias)  # noqa: E731
    tied = nets.randomised(Pair(build, ["weight", "bias"] if bias else ["weight"]))
    one = copy.deepcopy(tied)
    one.two = one.one
    return tied, one, torch.randn(5, D, dtype=torch.float64)


@pytest.mark.covering
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", list(fv.approximations))
def test_tied_linears_are_one_module_that_is_called_more_often(method, bias):
    tied, one, x = twins(bias)
    found, expected = (fv.approximate(fv.Probe(net, "gaussian").fisher(x), method) for net in (tied, one))
    assert_matches(found.to_dense(), expected.to_dense())


@pytest.mark.covering
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("optimizer", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree", "layer"])
def test_optimizers_take_tied_linears_for_one_module(optimizer, bias):
    tied, one, x = twins(bias)
    y = torch.tensor([0, 1, 1, 0, 1])
    weights = []
    for net in (tied, one):
        torch.manual_seed(1)
        stepping = optimizer_of(net.train(), optimizer)

        def closure(net=net, stepping=stepping):
            stepping.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(1 if optimizer == "HessianFree" else 3):
            stepping.step(closure)
        weights.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert_matches(weights[0], weights[1], 1e-8)


def optimizer_of(net, name):
    if hasattr(fv.optim, name):
        return getattr(fv.optim, name)(net, "categorical")
    return fv.optim.NaturalGradient(net, "categorical", name, damping=0.1, lr=0.1)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_uses_of_a_tied_weight_are_positions_of_its_factors(setting):
    """With a bias of the first module's alone: the second one's inputs have a 0 in its place."""
    net, x = made("linears, weight")
    inputs, outputs = [], []

    def note(module, given, z):
        inputs.append((module, given[0].detach()))
        outputs.append(z)

    hooks = [module.register_forward_hook(note) for module in (net.one, net.two)]
    z = net(x)
    for hook in hooks:
        hook.remove()
    a = torch.stack([torch.cat([v, torch.full((len(v), 1), float(m is net.one)).double()], 1) for m, v in inputs], 1)
    g = torch.stack([torch.stack(torch.autograd.grad(z[:, k].sum(), outputs, retain_graph=True), 1) for k in range(2)])
    if setting == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    A = torch.einsum("nti,ntj->ij", a, a).numpy() / len(x) / a.shape[1]
    G = torch.einsum("knto,kntp->op", g, g).numpy() / len(x)
    found = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "kfac", setting=setting)
    index = np.concatenate(
        [np.arange(D * (D + 1)).reshape(D, D + 1)[:, :D].reshape(-1), np.arange(D, D * (D + 1), D + 1)]
    )
    assert_matches(found.block("one", "one"), np.kron(G, A)[np.ix_(index, index)])


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.covering
@every
@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "cw-ngd", "layer", "diagonal"])
def test_a_step_is_the_damped_inverse_times_the_gradient(name, method):
    net, x = made(name)
    parameters = list(net.parameters())
    dense = fv.approximate(fv.Probe(net, "gaussian").fisher(x), method).to_dense()
    optimizer = fv.optim.NaturalGradient(net.train(), "gaussian", method, lr=1.0, damping=0.3, kind="exact")
    before = torch.cat([p.detach().reshape(-1).clone() for p in parameters])
    (0.5 * net(x).square().flatten(1).sum(1).mean()).backward()
    v = torch.cat([p.grad.reshape(-1) for p in parameters])
    optimizer.step()
    moved = before - torch.cat([p.detach().reshape(-1) for p in parameters])
    assert_matches(moved, torch.linalg.solve(dense + 0.3 * torch.eye(len(v)).double(), v), 1e-8)


@pytest.mark.parametrize("head_first", [False, True])
def test_two_backwards_through_one_forward_show_the_sum_of_their_scores(head_first):
    torch.manual_seed(0)
    net, x = nets.randomised(Language(bias=True, head_first=head_first)), torch.randint(V, (4, 3))
    moved = []
    for whole in (True, False):
        model = copy.deepcopy(net).train()
        options = {"kind": "empirical", "lr": 1.0, "damping": 0.3, "loss_scale": 0.25}
        optimizer = fv.optim.NaturalGradient(model, "gaussian", "layer", **options)
        z = model(x)
        parts = [z.square().sum() / 8] if whole else [z[:, :, :2].square().sum() / 8, z[:, :, 2:].square().sum() / 8]
        for part in parts:
            part.backward(retain_graph=True)
        optimizer.step()
        moved.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert_matches(moved[1], moved[0], 1e-9)


def test_an_optimizer_that_keeps_the_captures_resumes(tmp_path):
    torch.manual_seed(0)
    net, x = nets.randomised(Language(bias=True)).train(), torch.randint(V, (4, 3))

    def build(model):
        approximation = LayerWise(dense_parameters=1)
        return fv.optim.NaturalGradient(model, "gaussian", approximation, lr=0.1, damping=0.1, T=3)

    assert_resumes(build, net, lambda model: model(x).square().mean(), tmp_path)


def test_optimizers_say_once_what_is_taken():
    net, x = made("embedding and head")
    optimizer = fv.optim.KFAC(net.train(), "gaussian", rescale=False, adapt=False, lr=0.1, damping=0.1)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="share the weight of 'table': the sum over both uses") as said:
        run(2)
    assert sum("share the weight" in str(one.message) for one in said) == 1


@pytest.mark.parametrize("name", ["one token", "linears, weight"])
def test_k_bfgs_leaves_them_plain_and_says_so(name):
    net, x = made(name)
    tied = {"one token": "table", "linears, weight": "one"}[name]
    weight = dict(net.named_parameters())[f"{tied}.weight"]

    def loss():
        return 0.5 * net(x).square().flatten(1).sum(1).mean()

    expected = weight.detach() - 0.1 * torch.autograd.grad(loss(), weight)[0]
    optimizer = fv.optim.KBFGS(net.train(), "gaussian", lr=0.1, damping=0.3, momentum=0.0)

    def closure():
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    with pytest.warns(UserWarning, match=f"layers '{tied}' have no factors and are left plain"):
        optimizer.step(closure)
    assert_matches(weight, expected)


# ---- what has no structure -------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A weight (D, D) that is a Linear's and, as its transpose, a bare function's."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Bilinear(1, D, D)
        self.two.weight = nn.Parameter(torch.zeros(D, 1, D))
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.two(torch.ones_like(x[:, :1]), torch.tanh(self.one(x)))


def test_another_use_of_a_shared_parameter_is_exact_on_the_generic_path():
    torch.manual_seed(0)
    net, x = nets.randomised(Transposed()), torch.randn(4, D, dtype=torch.float64)
    probe = fv.Probe(net, "gaussian")
    assert_matches(probe.fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert probe.layers[0].note == ("a parameter is shared with another module, in which it has another use (Bilinear)")


class SometimesHead(Language):
    """The head is left out where all tokens are below 3."""

    def forward(self, x):
        h = torch.tanh(self.mix(self.table(x).cumsum(1)))
        return self.head(h) if int(x.max()) >= 3 else torch.cat([h, h], -1)


def test_a_batch_that_does_not_run_one_of_the_uses():
    torch.manual_seed(0)
    net = nets.randomised(SometimesHead())
    full, part = torch.randint(3, V, (3, 2)), torch.randint(3, (3, 2))
    F = (exact.fisher(net, full, laws.Gaussian()) + exact.fisher(net, part, laws.Gaussian())) / 2
    probe = fv.Probe(net, "gaussian")
    fisher = probe.fisher([(full,), (part,)])
    v = np.arange(len(F)) / len(F)
    assert_matches(fisher.solve(torch.from_numpy(v), 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
    assert_matches(fisher.to_dense(), F)
    assert {layer.path for layer in probe.layers} == {"structured"}
