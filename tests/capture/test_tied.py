"""Weights that modules share: exact quantities are sums over all uses, without per-example passes of the model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations import LayerWise
from fisherviz.capture.captures import TiedCapture
from fisherviz.statistics.gradients import example_gram
from tests.oracles import exact, laws, nets, positions
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
every = pytest.mark.parametrize("name", NETS)
language = pytest.mark.parametrize("name", LANGUAGE)


def made(name):
    torch.manual_seed(0)
    build, data = NETS[name]
    return nets.randomised(build()), data()


def structured_only(monkeypatch):
    """No layer may take the generic path."""
    for place in ("take", "look"):
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


@every
def test_in_batches_of_other_lengths_vector_by_vector_and_in_single_precision(name, monkeypatch):
    net, x = made(name)
    short = x if x.dim() == 2 and name in PAIRS else x[..., :1] if "convolutions" in name else x[:, :1]
    F = (exact.fisher(net, x, laws.Gaussian()) + exact.fisher(net, short, laws.Gaussian())) / 2
    v = torch.randn(len(F), dtype=torch.float64)
    for bytes_ in (1, 10**9):
        monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
        fisher = fv.Probe(net, "gaussian").fisher([x, short])
        assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
        assert_matches(fisher.to_dense(), F)
    single = net.float()
    data = [x.float(), short.float()] if name in PAIRS else [x, short]
    found = fv.Probe(single, "gaussian").fisher(data)
    F = sum(exact.fisher(net.double(), b.double() if name in PAIRS else b, laws.Gaussian()) for b in data) / 2
    found_products = fv.Probe(net.float(), "gaussian").fisher(data)
    assert_matches(found_products @ v.float(), F @ v.numpy(), FLOAT32)
    assert_matches(found.to_dense(), F, FLOAT32)


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


@every
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


KRONECKER = ["kfac", "ekfac", "foof", "kfac-full", "kfac-tridiagonal", "nearest-kronecker", "cw-ngd"]


@language
@pytest.mark.parametrize("method", KRONECKER)
def test_a_table_that_is_a_head_has_its_exact_diagonal_in_the_others_and_it_is_said(name, method):
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


def twins(bias):
    """A module that is called three times, and the same with a second one in its place that shares all parameters."""
    torch.manual_seed(0)
    build = lambda: nn.Linear(D, D, bias=bias)  # noqa: E731
    tied = nets.randomised(Pair(build, ["weight", "bias"] if bias else ["weight"]))
    one = copy.deepcopy(tied)
    one.two = one.one
    return tied, one, torch.randn(5, D, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", list(fv.approximations))
def test_tied_linears_are_one_module_that_is_called_more_often(method, bias):
    tied, one, x = twins(bias)
    found, expected = (fv.approximate(fv.Probe(net, "gaussian").fisher(x), method) for net in (tied, one))
    assert_matches(found.to_dense(), expected.to_dense())


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

    with pytest.warns(UserWarning, match="share the weight of 'table': the exact diagonal is taken there") as said:
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
    fisher = probe.fisher([full, part])
    v = np.arange(len(F)) / len(F)
    assert_matches(fisher.solve(torch.from_numpy(v), 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
    assert_matches(fisher.to_dense(), F)
    assert {layer.path for layer in probe.layers} == {"structured"}
