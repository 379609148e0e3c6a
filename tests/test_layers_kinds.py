"""Every kind of layer, structured or generic: no parameter is left out, none counted at a wrong scale."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


def images(*size, N=3):
    return torch.randn(N, *size, dtype=torch.float64)


class Recurring(nn.Module):
    """One Linear used twice, the second time on its own output."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))))


class TwoScales(nn.Module):
    """One convolution used on two image sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)

    def forward(self, x):
        return self.conv(x).flatten(2).mean(2) + torch.tanh(self.conv(x[..., ::2, ::2])).flatten(2).sum(2)


class Residual(nn.Module):
    """Additions in place on what a layer gave, and an activation in place after a layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.inner(x)
        h += x
        h = torch.sigmoid(h)
        s = self.outer(h)
        s += h
        return self.last(functional.relu(s, inplace=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Bare(nn.Module):
    """Parameters of the root itself, beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 1))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x * self.scale) + self.shift[:, 0] * x.sum(1, keepdim=True)


class Tied(nn.Module):
    """A decoder that is the encoder transposed, and two modules that share one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.mix, self.same = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.same.weight = self.mix.weight

    def forward(self, x):
        h = torch.tanh(self.encode(x))
        return self.same(torch.tanh(self.mix(h))) @ self.encode.weight


class TiedEmbedding(nn.Module):
    """A language model's habit: the output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.embed(tokens).mean(1)))


class Cubic(nn.Module):
    """A module of one's own, with its own formula."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        return (x @ self.w.T) ** 3 + self.w.sum(1)


class Doubled(nn.Linear):
    """Looks like a Linear and isn't one."""

    def forward(self, x):
        return 2 * super().forward(x) + x.sum(-1, keepdim=True) * self.bias


class TokensFirst(nn.Module):
    """The token axis leads inside: a layer's first axis is not the examples'."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Merged(nn.Module):
    """Examples and tokens merged into one axis for a layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        N, T, _ = x.shape
        return self.last(torch.tanh(self.inner(x.reshape(N * T, 3))).reshape(N, T, 4).mean(1))


class SideDoor(nn.Module):
    """A Linear that is called and whose weight is also used directly."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return functional.linear(torch.tanh(self.layer(x)), self.layer.weight)


class OnlySideDoor(nn.Module):
    """A Linear that is never called, only its weight used."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(functional.linear(x, self.layer.weight, self.layer.bias)))


class Unused(nn.Module):
    """A layer that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.idle, self.layer = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


class Discarded(nn.Module):
    """A layer that runs and whose result goes nowhere."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        self.idle(x)
        return self.layer(x)


class PartlyFrozenByNoGrad(nn.Module):
    """Features computed without gradients: their parameters have none."""

    def __init__(self):
        super().__init__()
        self.features, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.features(x))
        return self.last(h)


class Keyword(nn.Module):
    """A Linear called by keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(input=x)


class Unsqueezed(nn.Module):
    """A layer that sees each example alone, without a batch axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x])


class LastToken(nn.Module):
    """A sequence model read off at its last position."""

    def __init__(self, sequence_model, last):
        super().__init__()
        self.model, self.last = sequence_model, last

    def forward(self, x):
        out = self.model(x)
        return self.last((out[0] if isinstance(out, tuple) else out)[:, -1])


class Checkpointed(nn.Module):
    """A layer that is run a second time during the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(checkpoint(lambda h: torch.tanh(self.inner(h)), x, use_reentrant=False))


class Experts(nn.Module):
    """A layer sees only the examples that are sent to it; the first two go the same way."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        first = x[:, 0] > 0
        h = torch.zeros(len(x), 3, dtype=x.dtype)
        h = h.index_put((first,), self.one(x[first])).index_put((~first,), self.two(x[~first]))
        return self.last(torch.tanh(h))


def sent_to_experts():
    """Three of six examples to each expert."""
    x = images(3, N=6)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, 1, -1, 1, -1, -1])
    return x


class Siamese(nn.Module):
    """A layer that sees two versions of every example in one batch of 2 N."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        both = torch.tanh(self.inner(torch.cat([x, x.flip(1)])))
        return self.last(both[: len(x)] * both[len(x) :])


class Square(torch.autograd.Function):
    """A function of one's own, with a derivative backwards only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Squaring(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Squeezed(nn.Module):
    """The habit of squeezing one output away, which for a single example leaves a scalar."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1))

    def forward(self, x):
        return self.net(x).squeeze()


class Detached(nn.Module):
    """A path whose gradient is stopped beside one that goes on."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.last(h) + h.detach()[:, :2]


def with_hook(kind):
    """A user's own hook that changes what the layer gives or gets."""

    def build():
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        if kind == "before":
            net[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            net[0].register_forward_hook(lambda module, args, out: 2 * out)
        return net

    return build


def pruned():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    prune.random_unstructured(net[0], "weight", 0.3)
    return net


def sequence(*modules):
    """A builder of networks that share nothing: modules are copied, classes called."""
    return lambda: nn.Sequential(*[m() if isinstance(m, type) else deepcopy(m) for m in modules])


def conv(kind, *arguments, size, **options):
    """A case with two convolutions, so that cross blocks are checked too."""

    def build():
        out = arguments[1]
        return nn.Sequential(kind(*arguments, **options), nn.Tanh(), kind(out, 2, 1), nets.MeanPixels())

    return build, lambda: images(arguments[0], *size, N=2)


LINEAR = {
    "linear": (sequence(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lambda: images(3)),
    "linear without bias": (
        sequence(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)),
        lambda: images(3),
    ),
    "linear on tokens": (
        sequence(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nets.MeanTokens),
        lambda: images(5, 3),
    ),
    "linear on a grid of tokens": (
        sequence(nn.Linear(3, 2), nn.Tanh(), nets.MeanTokens, nn.Linear(2, 2), nets.MeanTokens),
        lambda: images(2, 3, 3),
    ),
    "relu in place": (
        sequence(
            nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
        ),
        lambda: images(3),
    ),
    "module called twice": (Recurring, lambda: images(3)),
    "convolution called on two sizes": (TwoScales, lambda: images(1, 4, 4)),
    "residual additions in place": (Residual, lambda: images(3)),
    "linear called by keyword": (Keyword, lambda: images(3)),
    "both versions of an example in one batch": (Siamese, lambda: images(3)),
    "mixture of experts": (Experts, sent_to_experts),
    "linear without a batch axis": (Unsqueezed, lambda: images(3)),
    "token axis first": (TokensFirst, lambda: images(4, 3)),
    "as many tokens as examples, token axis first": (TokensFirst, lambda: images(3, 3)),
    "examples and tokens merged": (Merged, lambda: images(4, 3)),
}
CONVOLUTION = {
    "conv1d": conv(nn.Conv1d, 2, 3, 3, size=(6,)),
    "conv1d stride and padding": conv(nn.Conv1d, 2, 3, 3, size=(6,), stride=2, padding=2),
    "conv1d same, dilated": conv(nn.Conv1d, 2, 3, 3, size=(6,), padding="same", dilation=2),
    "conv1d same, even kernel": conv(nn.Conv1d, 2, 3, 4, size=(6,), padding="same"),
    "conv2d": conv(nn.Conv2d, 2, 3, (3, 2), size=(5, 4)),
    "conv2d one pixel out": conv(nn.Conv2d, 2, 3, (5, 4), size=(5, 4)),
    "conv2d stride, padding, dilation": conv(
        nn.Conv2d, 2, 3, (2, 3), size=(5, 6), stride=(2, 1), padding=(1, 2), dilation=(1, 2)
    ),
    "conv2d valid": conv(nn.Conv2d, 2, 3, 2, size=(3, 4), padding="valid"),
    "conv2d same, even kernel": conv(nn.Conv2d, 2, 3, (2, 4), size=(4, 5), padding="same"),
    "conv2d without bias": conv(nn.Conv2d, 2, 3, 2, size=(3, 3), bias=False),
    "conv2d in two groups": conv(nn.Conv2d, 4, 6, 2, size=(3, 3), groups=2),
    "conv2d depthwise": conv(nn.Conv2d, 3, 6, 2, size=(3, 3), groups=3, bias=False),
    "conv3d": conv(nn.Conv3d, 2, 2, 2, size=(3, 3, 2)),
    "conv3d everything": conv(
        nn.Conv3d, 2, 2, 2, size=(4, 3, 3), stride=(2, 1, 1), padding=(1, 0, 1), dilation=(1, 2, 1), groups=2
    ),
    **{
        f"conv{dims}d {mode}, padding {padding}": conv(
            kind, 2, 2, 3, size=(4,) * dims, padding=padding, padding_mode=mode
        )
        for dims, kind in ((1, nn.Conv1d), (2, nn.Conv2d))
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (1, "same")
    },
    **{
        f"conv3d {mode}": conv(nn.Conv3d, 1, 2, 3, size=(3, 3, 3), padding=(1, 0, 1), padding_mode=mode)
        for mode in ("reflect", "replicate", "circular")
    },
}
GENERIC = {
    "layer norm": (sequence(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)), lambda: images(3)),
    "batch norm in evaluation": (
        sequence(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: images(3),
    ),
    "batch norm 2d in evaluation": (
        sequence(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nets.MeanPixels),
        lambda: images(1, 3, 3),
    ),
    "group norm": (
        sequence(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nets.MeanPixels),
        lambda: images(1, 3, 3),
    ),
    "prelu": (sequence(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 2)), lambda: images(3)),
    "embedding": (
        sequence(nn.Embedding(5, 3), nets.MeanTokens, nn.Linear(3, 2)),
        lambda: torch.randint(5, (4, 3)),
    ),
    "embedding with padding": (
        sequence(nn.Embedding(5, 3, padding_idx=0), nets.MeanTokens, nn.Linear(3, 2)),
        lambda: torch.tensor([[0, 1], [2, 0], [3, 3]]),
    ),
    "attention": (Attention, lambda: images(3, 4)),
    "transposed convolution": (
        sequence(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nets.MeanPixels),
        lambda: images(2, 2, 2),
    ),
    "bare parameters of the root": (Bare, lambda: images(3)),
    "tied parameters": (Tied, lambda: images(3)),
    "embedding tied to the output": (TiedEmbedding, lambda: torch.randint(5, (4, 3))),
    "module of one's own": (sequence(nn.Linear(3, 3), nn.Tanh(), Cubic), lambda: images(3)),
    "subclass of Linear with another formula": (
        lambda: nn.Sequential(Doubled(3, 2), nn.Tanh(), nn.Linear(2, 2)),
        lambda: images(3),
    ),
    "weight normalised by a parametrisation": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Tanh(), nn.Linear(2, 2)
        ),
        lambda: images(3),
    ),
    "weight of a called layer used directly too": (SideDoor, lambda: images(3)),
    "weight used directly only": (OnlySideDoor, lambda: images(3)),
    "layer that is never called": (Unused, lambda: images(3)),
    "layer whose result is discarded": (Discarded, lambda: images(3)),
    "features under no_grad": (PartlyFrozenByNoGrad, lambda: images(3)),
    "lstm": (lambda: LastToken(nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)), lambda: images(3, 2)),
    "transformer layer": (
        lambda: LastToken(
            nn.TransformerEncoderLayer(4, 2, 4, dropout=0.1, batch_first=True), nn.Linear(4, 2)
        ),
        lambda: images(2, 4, N=2),
    ),
    "max pooling": (
        sequence(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
        lambda: images(1, 5, 5),
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 2)),
        lambda: images(3),
    ),
    "checkpointed": (Checkpointed, lambda: images(3)),
    "function of one's own": (
        sequence(nn.Linear(3, 3), nn.LayerNorm(3), Squaring, nn.Linear(3, 2)),
        lambda: images(3),
    ),
    "a path detached": (Detached, lambda: images(3)),
    "user's hook on the output": (with_hook("after"), lambda: images(3)),
    "user's hook on the input": (with_hook("before"), lambda: images(3)),
    "pruned": (pruned, lambda: images(3)),
    "sparse embedding": (
        sequence(nn.Embedding(5, 3, sparse=True), nets.MeanTokens, nn.Linear(3, 2)),
        lambda: torch.randint(5, (4, 3)),
    ),
    "bilinear root": (lambda: SelfBilinear(), lambda: images(3)),
}


class SelfBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.form(x, x)


CASES = LINEAR | CONVOLUTION | GENERIC
every_layer = pytest.mark.parametrize(("build", "data"), CASES.values(), ids=CASES.keys())


@every_layer
def test_exact_fisher(build, data):
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Gaussian())
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), F)


@every_layer
def test_empirical_fisher(build, data):
    net, x = nets.randomised(build()), data()
    y = laws.Categorical().draw(len(x), net(x).shape[1])
    F = exact.fisher(net, x, laws.Categorical(), targets=y)
    assert_matches(fv.Probe(net, "categorical").fisher(x, y, kind="empirical").to_dense(), F)


@every_layer
def test_views_that_never_form_the_matrix(build, data):
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Categorical())
    v, w = nets.vectors(2, len(F)).numpy()
    u, t = torch.from_numpy(v), torch.from_numpy(w)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher.diagonal(), np.diag(F))
    assert_matches(fisher @ u, F @ v)
    assert float(fisher.quadratic(u)) == pytest.approx(v @ F @ v, rel=1e-9)
    assert float(fisher.quadratic(u, t)) == pytest.approx(v @ F @ w, rel=1e-7)
    assert float(fisher.norm("fro")) == pytest.approx(np.linalg.norm(F), rel=1e-9)
    assert float(fisher.norm("trace")) == pytest.approx(np.trace(F), rel=1e-9)
    assert float(fisher.norm("spectral")) == pytest.approx(np.linalg.norm(F, 2), rel=1e-6)
    assert_matches(fisher.solve(u, 0.3), np.linalg.solve(F + 0.3 * np.eye(len(F)), v))


def first_requests(F, u, v):
    """Each request and what it must give, for vectors u, v of numpy."""
    a, b = torch.from_numpy(u), torch.from_numpy(v)
    return {
        "product": (lambda f: f @ a, F @ u),
        "product with a matrix": (lambda f: f @ torch.stack([a, b], 1), F @ np.stack([u, v], 1)),
        "quadratic": (lambda f: f.quadratic(a), u @ F @ u),
        "bilinear": (lambda f: f.quadratic(a, b), u @ F @ v),
        "solve": (lambda f: f.solve(a, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), u)),
        "fro": (lambda f: f.norm("fro"), np.linalg.norm(F)),
        "spectral": (lambda f: f.norm("spectral"), np.linalg.norm(F, 2)),
        "leading eigenvalue": (lambda f: f.spectrum(1), np.linalg.eigvalsh(F)[-1:]),
    }


@every_layer
def test_every_request_may_be_the_first(build, data):
    """What a pass leaves behind must not decide how the next request is answered."""
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Categorical())
    for request, expected in first_requests(F, *nets.vectors(2, len(F)).numpy()).values():
        assert_matches(request(fv.Probe(net, "categorical").fisher(x)), expected, 1e-7)


@every_layer
def test_every_parameter_belongs_to_exactly_one_layer(build, data):
    net = nets.randomised(build())
    probe = fv.Probe(net, "gaussian")
    names = [name for layer in probe.layers for name in layer.parameters]
    assert names == [name for name, _ in net.named_parameters()]
    assert sum(layer.num_parameters for layer in probe.layers) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "name", ["conv2d", "linear", "module called twice", "layer norm", "conv2d in two groups"]
)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_exact_fisher_of_other_likelihoods(name, likelihood):
    build, data = CASES[name]
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.ALL[likelihood])
    assert_matches(fv.Probe(net, likelihood).fisher(x).to_dense(), F)


@pytest.mark.parametrize("name", ["conv2d", "linear on tokens", "layer norm", "attention", "tied parameters"])
def test_blocks_between_layers(name):
    build, data = CASES[name]
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Gaussian())
    probe = fv.Probe(net, "gaussian")
    fisher = probe.fisher(x)
    edges = np.cumsum([0] + [layer.num_parameters for layer in probe.layers])
    for i, row in enumerate(probe.layers):
        for j, col in enumerate(probe.layers):
            expected = F[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
            assert_matches(fisher.block(row.name, col.name), expected)


UNITS = [
    "conv1d stride and padding",
    "conv2d in two groups",
    "conv2d depthwise",
    "linear on tokens",
    "module called twice",
]


@pytest.mark.parametrize("name", UNITS)
def test_units_of_shared_weights(name):
    build, data = CASES[name]
    net, x = nets.randomised(build()), data()
    probe = fv.Probe(net, "categorical")
    fisher = probe.fisher(x)
    F = exact.fisher(net, x, laws.Categorical())
    start = 0
    for layer in probe.layers:
        module = net.get_submodule(layer.name)
        d_out, fan_in = len(module.weight), module.weight[0].numel()
        weights = start + np.arange(d_out * fan_in).reshape(d_out, fan_in)
        biases = [] if module.bias is None else [start + d_out * fan_in + np.arange(d_out)[:, None]]
        rows = np.concatenate([weights, *biases], axis=1)
        assert_matches(fisher.units(layer.name), np.stack([F[np.ix_(row, row)] for row in rows]))
        start += layer.num_parameters


def test_units_of_a_layer_without_units_are_refused():
    net, x = nets.randomised(CASES["layer norm"][0]()), images(3)
    with pytest.raises((ValueError, TypeError, NotImplementedError), match="1"):
        fv.Probe(net, "gaussian").fisher(x).units("1")


def test_tied_parameters_count_once_and_leave_the_structured_path():
    net = nets.randomised(Tied())
    probe = fv.Probe(net, "gaussian")
    names = [name for layer in probe.layers for name in layer.parameters]
    assert len(names) == len(set(names)) == len(list(net.parameters()))
    shared = next(layer for layer in probe.layers if "mix.weight" in layer.parameters)
    assert shared.path == "generic"


def test_shared_parameter_probed_at_its_second_owner_keeps_its_whole_derivative():
    net, x = nets.randomised(Tied()), images(3)
    F = exact.fisher(net, x, laws.Gaussian(), names=["mix.weight", "same.bias"])
    probe = fv.Probe(net, "gaussian", layers=["same"])
    assert [name for layer in probe.layers for name in layer.parameters] == ["mix.weight", "same.bias"]
    assert_matches(probe.fisher(x).to_dense(), F)


def freeze(net, *names):
    for name, p in net.named_parameters():
        if name in names:
            p.requires_grad_(False)
    return net


FROZEN = {
    "a weight": ["2.weight"],
    "a bias": ["2.bias"],
    "a layer": ["2.weight", "2.bias"],
    "the first layer": ["0.weight", "0.bias"],
    "all but the last bias": ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"],
}


@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters_are_no_part_of_the_fisher(names):
    net, x = freeze(nets.mlp(3, 4, 3, 2), *names), nets.vectors(4, 3)
    F = exact.fisher(net, x, laws.Categorical())
    probe = fv.Probe(net, "categorical")
    fisher = probe.fisher(x)
    assert not {name for layer in probe.layers for name in layer.parameters} & set(names)
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher.diagonal(), np.diag(F))
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher @ v, F @ v.numpy())


@pytest.mark.parametrize("names", [["0.weight"], ["0.bias"]], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_frozen_half_of_a_convolution(names, groups):
    net = freeze(nets.conv_net(nn.Conv2d(2, 4, 2, groups=groups, padding=1), nn.Conv2d(4, 2, 1)), *names)
    x = images(2, 3, 3)
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))


def test_frozen_parameters_appear_in_the_table_as_left_out():
    probe = fv.Probe(freeze(nets.mlp(3, 4, 2), "0.weight", "0.bias"), "categorical")
    assert "frozen" in str(probe) or "requires_grad" in str(probe)


def test_table_names_every_layer_and_its_path():
    net = nets.randomised(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    text = str(fv.Probe(net, "gaussian"))
    assert "structured" in text
    assert "generic" in text


@pytest.mark.parametrize("name", ["linear", "conv2d", "linear on tokens"])
def test_layer_info_describes_the_layer(name):
    build, _ = CASES[name]
    net = nets.randomised(build())
    for layer in fv.Probe(net, "gaussian").layers:
        module = net.get_submodule(layer.name)
        assert layer.num_parameters == sum(p.numel() for p in module.parameters())
        assert layer.out_features == len(module.weight)
        assert layer.bias is True
        assert layer.in_features * layer.out_features == module.weight.numel()


class Dictionary(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.net, self.form = nn.Linear(3, 2), form

    def forward(self, x):
        z = self.net(x)
        return {"logits": z, "hidden": x} if self.form == "dictionary" else (x, z)


@pytest.mark.parametrize(
    ("form", "pick"), [("dictionary", lambda out: out["logits"]), ("tuple", lambda out: out[1])]
)
def test_output_picks_the_tensor_of_a_model_that_returns_several(form, pick):
    net, x = nets.randomised(Dictionary(form)), images(3)
    F = exact.fisher(net, x, laws.Categorical(), output=pick)
    fisher = fv.Probe(net, "categorical", output=pick).fisher(x)
    assert_matches(fisher.to_dense(), F)
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher @ v, F @ v.numpy())
    assert float(fisher.quadratic(v)) == pytest.approx(v.numpy() @ F @ v.numpy(), rel=1e-9)


@pytest.mark.parametrize("form", ["dictionary", "tuple"])
def test_several_outputs_without_a_choice_are_refused(form):
    with pytest.raises((TypeError, ValueError), match="output="):
        fv.Probe(nets.randomised(Dictionary(form)), "categorical").fisher(images(3)).to_dense()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm", "attention"])
def test_gradients_turned_off_around_the_call_do_not_matter(context, name):
    build, data = CASES[name]
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Gaussian())
    v = nets.vectors(len(F), 1)[:, 0]
    with context():
        fisher = fv.Probe(net, "gaussian").fisher(x)
        dense, product = fisher.to_dense(), fisher @ v
    assert_matches(dense, F)
    assert_matches(product, F @ v.numpy())


def test_inputs_that_want_gradients_are_left_alone():
    net, x = nets.mlp(3, 2), images(3).requires_grad_()
    F = exact.fisher(net, x.detach(), laws.Gaussian())
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), F)
    assert x.grad is None


def test_results_carry_no_graph():
    net, x = nets.mlp(3, 2), images(3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    v = nets.vectors(8, 1)[:, 0]
    for result in (fisher.to_dense(), fisher @ v, fisher.diagonal(), fisher.block(0), fisher.units(0)):
        assert not result.requires_grad


@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm", "attention"])
def test_float32_layers(name):
    build, data = CASES[name]
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net.float(), "gaussian").fisher(x.float())
    assert_matches(fisher.to_dense(), F, 1e-4)
    v = nets.vectors(len(F), 1)[:, 0].float()
    assert_matches(fisher @ v, F @ v.double().numpy(), 1e-4)


@pytest.mark.parametrize("batches", [[3], [3, 1], [1]], ids=str)
def test_output_that_is_squeezed_to_a_scalar_for_a_single_example(batches):
    net, x = nets.randomised(Squeezed()), images(3, N=sum(batches))
    F = exact.fisher(net, x, laws.Bernoulli())
    fisher = fv.Probe(net, "bernoulli").fisher(list(x.split(batches)))
    assert_matches(fisher.to_dense(), F)
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fv.Probe(net, "bernoulli").fisher(x) @ v, F @ v.numpy())


def test_bfloat16_models_are_accumulated_in_float32():
    net, x = nets.mlp(3, 4, 2).bfloat16(), nets.vectors(40, 3).bfloat16()
    F = exact.fisher(net.double(), x.double(), laws.Gaussian())
    fisher = fv.Probe(net.bfloat16(), "gaussian").fisher(x)
    assert_matches(fisher.to_dense().float(), F, 3e-2)
    assert_matches(fisher.diagonal().float(), np.diag(F), 3e-2)
    assert_matches(
        fv.approximate(fisher, "kfac").to_dense().float(), fv.approximate(fisher, "kfac").to_dense(), 0
    )


def test_inputs_of_several_tensors_come_as_a_tuple_or_dictionary_in_a_batch():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x, h):
            return torch.tanh(self.left(x)) * self.right(h)

    net = nets.randomised(Both())
    x, h, y = images(3), images(2), torch.tensor([0, 1, 1])

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, both):
            return self.net(both[:, :3], both[:, 3:])

    F = exact.fisher(Joined(), torch.cat([x, h], 1), laws.Categorical())
    probe = fv.Probe(net, "categorical")
    assert_matches(probe.fisher([((x, h), y)]).to_dense(), F)
    assert_matches(probe.fisher([((x[:2], h[:2]), y[:2]), ((x[2:], h[2:]), y[2:])]).to_dense(), F)
    assert_matches(probe.fisher([({"x": x, "h": h}, y)]).to_dense(), F)


class Permuting(nn.Module):
    """Examples in another order inside, and back again at the end."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(x.flip(0))).flip(0))


def test_examples_in_another_order_inside_give_the_right_numbers_or_a_sentence():
    net, x = nets.randomised(Permuting()), images(3)
    F = exact.fisher(net, x, laws.Gaussian())
    try:
        dense = fv.Probe(net, "gaussian").fisher(x).to_dense()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        assert "inner" in str(error)  # noqa: PT017
    else:
        assert_matches(dense, F)
