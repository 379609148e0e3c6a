"""nn.MultiheadAttention: its projections are linear layers, whatever the call asks for; else the reason is told."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches
from tests.training_runs import half_squares, trained

E, T = 4, 3


class Attending(nn.Module):
    """Self-attention over (N, T, E), then a mean over tokens."""

    def __init__(self, *, need_weights=True, average=True, causal=False, padding=False, floating=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, **options)
        self.last = nn.Linear(E, 2)
        self.calls = {"need_weights": need_weights, "average_attn_weights": average}
        self.causal, self.padding, self.floating = causal, padding, floating

    def masks(self, x):
        """Of the attention and of the keys: the last two tokens of examples that begin below zero are padding."""
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        padding = (torch.arange(x.shape[1]) > 0) & (x[:, 0, :1] < 0) if self.padding else None
        given = (causal, padding)
        if self.floating:
            given = [None if m is None else torch.zeros(m.shape).to(x).masked_fill(m, -torch.inf) for m in given]
        return dict(zip(("attn_mask", "key_padding_mask"), given, strict=True))

    def forward(self, x):
        tokens = x if self.attention.batch_first else x.transpose(0, 1)
        z, _ = self.attention(tokens, tokens, tokens, **self.masks(x), **self.calls)
        z = z if self.attention.batch_first else z.transpose(0, 1)
        return self.last(torch.tanh(z)).mean(1)


class ByLinear(Attending):
    """The same function of Linear layers, by the formula."""

    def __init__(self, **options):
        super().__init__(**options)
        bias = self.attention.in_proj_bias is not None
        del self.attention, self.last
        self.project, self.out = nn.Linear(E, 3 * E, bias), nn.Linear(E, E, bias)
        self.last = nn.Linear(E, 2)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, E // 2)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        scores = q @ k.mT / (E // 2) ** 0.5
        masks = self.masks(x)
        if masks["attn_mask"] is not None:
            scores = scores.masked_fill(masks["attn_mask"], -torch.inf)
        if masks["key_padding_mask"] is not None:
            scores = scores.masked_fill(masks["key_padding_mask"][:, None, None], -torch.inf)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.last(torch.tanh(self.out(z))).mean(1)


def tokens(N=4):
    return torch.randn(N, T, E, dtype=torch.float64)


def paths(probe):
    return {layer.name: layer.path for layer in probe.layers}


OPTIONS = [
    dict(zip(("batch_first", "need_weights", "average", "causal", "padding", "floating"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=6)
    if not (chosen[-1] and not (chosen[3] or chosen[4])) and not (chosen[2] and not chosen[1])
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(k for k, on in o.items() if on) or "none")
def test_exact_fisher(options):
    net, x = nets.randomised(Attending(**options)), tokens()
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    assert set(paths(fisher).values()) == {"structured"}
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy())
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()))


MORE = {
    "without bias": {"bias": False},
    "zero attention": {"add_zero_attn": True},
    "dropout in evaluation": {"dropout": 0.3},
}


@pytest.mark.parametrize("options", MORE.values(), ids=MORE.keys())
def test_options_of_the_module(options):
    net, x = nets.randomised(Attending(**options)), tokens()
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical()))
    assert set(paths(fisher).values()) == {"structured"}


def test_units_and_blocks():
    net, x = nets.randomised(Attending()), tokens()
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    rows = np.concatenate([np.arange(48).reshape(12, 4), 48 + np.arange(12)[:, None]], 1)
    assert_matches(fisher.units("attention"), np.stack([F[np.ix_(row, row)] for row in rows]))
    assert_matches(fisher.block("attention", "attention.out_proj"), F[:60, 60:80])
    assert [(i.out_features, i.in_features, i.bias) for i in fisher.layers[:2]] == [(12, 4, True), (4, 4, True)]


def test_float32():
    net, x = nets.randomised(Attending(batch_first=True)), tokens()
    F = exact.fisher(net, x, laws.Gaussian())
    assert_matches(fv.Probe(net.float(), "gaussian").fisher(x.float()).to_dense(), F, FLOAT32)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_frozen_parts(frozen):
    net, x = nets.randomised(Attending()), tokens()
    net.attention.get_parameter(frozen).requires_grad_(False)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert set(paths(fisher).values()) == {"structured"}


@pytest.mark.parametrize(("chosen", "names"), [
    ("attention.out_proj", ["attention.out_proj.weight", "attention.out_proj.bias"]),
    ("last", ["last.weight", "last.bias"]),
])  # fmt: skip
def test_some_layers(chosen, names):
    net, x = nets.randomised(Attending()), tokens()
    fisher = fv.Probe(net, "gaussian", layers=[chosen]).fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian(), names=names))
    assert paths(fisher) == {chosen: "structured"}


# ---- the same as Linear layers -----------------------------------------------------------------------------------


def twins(**options):
    torch.manual_seed(0)
    net, other = nets.randomised(Attending(**options)), ByLinear(**options).double().eval()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.data = p.data.clone()
    return net, other, tokens(6)


TWINS = [{"padding": True}, {"batch_first": True, "causal": True, "need_weights": False}]


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*chain")
@pytest.mark.parametrize("method", list(fv.approximations))
@pytest.mark.parametrize("options", TWINS, ids=str)
def test_methods_are_those_of_the_twin(options, method):
    net, other, x = twins(**options)
    torch.testing.assert_close(net(x), other(x))
    found, twin = (fv.approximate(fv.Probe(m, "gaussian").fisher(x), method) for m in (net, other))
    assert_matches(found.to_dense(), twin.to_dense(), 1e-9)
    v = torch.randn(len(found.to_dense()), dtype=torch.float64)
    assert_matches(found.solve(v, 0.1), twin.solve(v, 0.1), 1e-8)


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*lambda", "ignore:.*damping")
@pytest.mark.parametrize("optimizer", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree"])
@pytest.mark.parametrize("options", TWINS, ids=str)
def test_optimizers_step_as_on_the_twin(options, optimizer):
    net, other, x = twins(**options)
    loss = half_squares(x, torch.randn(6, 2, dtype=torch.float64))
    assert_matches(trained(optimizer, net, loss), trained(optimizer, other, loss), 1e-8)


# ---- what has no structure, and why ------------------------------------------------------------------------------


class Crossing(nn.Module):
    """Attention to other tokens, and to its own in the same module if `both`."""

    def __init__(self, *, both=False, **options):
        super().__init__()
        self.attention, self.last, self.both = (
            nn.MultiheadAttention(E, 2, batch_first=True, **options),
            nn.Linear(E, 2),
            both,
        )

    def forward(self, x):
        memory = torch.sin(x[:, 1:]) if self.attention.kdim == E else torch.sin(x[:, 1:, : self.attention.kdim])
        z = self.attention(x, memory, memory)[0]
        if self.both:
            z = self.attention(z, z, z)[0]
        return self.last(z).mean(1)


GENERIC = {
    "other tokens": (Crossing(), "do not come from one tensor"),
    "both": (Crossing(both=True), "outside its forward"),
    "other widths": (Crossing(kdim=3, vdim=3), "matrices of their own"),
    "keys of its own": (Attending(add_bias_kv=True), "add_bias_kv"),
}  # fmt: skip


@pytest.mark.parametrize(("net", "why"), GENERIC.values(), ids=GENERIC.keys())
def test_other_attention_is_exact_without_structure_and_says_why(net, why):
    net, x = nets.randomised(copy.deepcopy(net)), tokens()
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert paths(fisher) == {"attention": "generic", "attention.out_proj": "structured", "last": "structured"}
    assert why in fisher.layers[0].note


class Subclass(nn.MultiheadAttention):
    """Another formula."""

    def forward(self, x):
        return self.out_proj(torch.tanh(nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias))[..., :E])


def test_a_subclass_with_a_forward_of_its_own():
    net, x = nets.randomised(nn.Sequential(Subclass(E, 2), nets.MeanTokens())), tokens()
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert paths(fisher) == {"0": "generic", "0.out_proj": "structured"}


# ---- inside larger modules and under torch's machinery -----------------------------------------------------------


class Translating(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(E, 2, 1, 1, 4, batch_first=True)

    def forward(self, x):
        return self.net(x, x[:, 1:]).mean(1)


class Twice(nn.Module):
    """One module in two places."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2)

    def forward(self, x):
        for _ in range(2):
            x = x + self.attention(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1)
        return x.mean(1)


class InPlace(Twice):
    """A residual added in place to what attention gives."""

    def forward(self, x):
        z = self.attention(*[x.transpose(0, 1)] * 3)[0]
        z += x.transpose(0, 1)
        return z.relu_().mean(0)


class Checkpointed(Attending):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class WithDevice(Attending):
    """Under a mode of torch's own."""

    def forward(self, x):
        with torch.device("cpu"):
            return super().forward(x)


LARGER = {
    "encoder": (lambda: nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 4, batch_first=True), 2), nets.MeanTokens()), 0),
    "tokens first": (lambda: nn.Sequential(
        Transposed(), nn.TransformerEncoderLayer(E, 2, 4), Transposed(), nets.MeanTokens()), 0),
    "encoder and decoder": (Translating, 1),
    "called twice": (Twice, 0),
    "in place": (InPlace, 0),
    "checkpoint": (Checkpointed, 0),
    "default device": (WithDevice, 0),
}  # fmt: skip


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


@pytest.mark.parametrize(("build", "generic"), LARGER.values(), ids=LARGER.keys())
def test_larger_modules(build, generic):
    """As many tokens as examples: attention knows where they are, of a Linear or LayerNorm evidence tells."""
    net, x = nets.randomised(build()), tokens(3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert list(paths(fisher).values()).count("generic") == generic


def modes():
    return torch._C._len_torch_function_stack()


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_a_forward_that_fails_leaves_nothing_behind():
    net, x = nets.randomised(Attending()), tokens()
    probe = fv.Probe(net, "gaussian")
    with pytest.raises(Exception, match="embedding dimension"):
        probe.fisher(torch.randn(4, T, E + 1).double()).to_dense()
    assert (modes(), hooks(net)) == (0, 0)
    assert_matches(probe.fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))


def train(net, x, optimizer=None):
    net.zero_grad()
    torch.manual_seed(3)
    nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 2).backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "need_weights": False}], ids=str)
def test_users_gradients_are_bitwise_what_they_were_also_with_dropout(options):
    net, x = nets.randomised(Attending(dropout=0.5, **options)).train(), tokens()
    alone = train(copy.deepcopy(net), x)
    opt = fv.optim.KFAC(net, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1)
    assert all(map(torch.equal, train(net, x), alone))
    opt.step()
    assert all(layer.structured for layer in opt.layers)
    assert modes() == 0


def test_copies_and_pickles_of_a_watched_model_are_free():
    net, x = nets.randomised(Attending()).train(), tokens()
    opt = fv.optim.FOOF(net, "categorical", damping=0.1)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x))
        assert hooks(other) == 0
    train(net, x)
    opt.step()
    del opt
    assert hooks(net) == 0
