"""The model is a guest: after any call, and after any exception in it, nothing of it has changed."""

import random
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
]


class Failing(nn.Module):
    """Raises on the calls that it is told to."""

    def __init__(self):
        super().__init__()
        self.calls, self.fails_at = 0, None

    def forward(self, x):
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise ZeroDivisionError("the model's own trouble")
        return x


class Counting(nn.Module):
    """Keeps count of its calls: one buffer in place, one replaced at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("replaced", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        self.in_place.add_(1)
        self.replaced = self.replaced + 1
        return x


class FailingBackwards(nn.Module):
    """Raises in the backward pass."""

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(self.fail)
        return x * 1.0

    @staticmethod
    def fail(gradient):
        raise ZeroDivisionError("trouble on the way back")


class Drawing(nn.Module):
    """Draws from the global generator in its forward, as some models do."""

    def forward(self, x):
        torch.rand(2)
        return x


def model():
    """Structured, generic, frozen and stateful parts, mixed modes, a user's hooks and gradient."""
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), Failing(),
        nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2),
    )  # fmt: skip
    net = nets.randomised(net)
    net[0].train()
    net[7].train()
    net[6].bias.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: None)
    net[8].weight.register_hook(lambda g: g)
    net[0].weight.grad = torch.randn_like(net[0].weight)
    return net


def tensor_state(t):
    return None if t is None else (id(t), t._version, t.detach().clone())


def same(before, after):
    if isinstance(before, tuple) and len(before) == 3 and isinstance(before[2], torch.Tensor):
        return before[:2] == after[:2] and torch.equal(before[2], after[2])
    return before == after


def snapshot(net):
    state = {}
    for name, module in net.named_modules():
        state[name, "training"] = module.training
        state[name, "attributes"] = sorted(set(module.__dict__))
        for kind in HOOKS:
            state[name, kind] = list(getattr(module, kind, {}).items()) if hasattr(module, kind) else None
    for name, p in net.named_parameters():
        state[name, "value"] = tensor_state(p)
        state[name, "grad"] = tensor_state(p.grad)
        state[name, "requires_grad"] = p.requires_grad
        state[name, "hooks"] = len(p._backward_hooks or {})
        state[name, "after hooks"] = len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
    for name, buffer in net.named_buffers():
        state[name, "buffer"] = tensor_state(buffer)
    state["global", "torch"] = torch.get_rng_state().tolist()
    state["global", "numpy"] = np.random.get_state()[1].tolist()  # noqa: NPY002
    state["global", "python"] = random.getstate()
    state["global", "gradients on"] = torch.is_grad_enabled()
    state["global", "dtype"] = torch.get_default_dtype()
    state["global", "deterministic"] = torch.are_deterministic_algorithms_enabled()
    state["global", "threads"] = torch.get_num_threads()
    return state


def assert_untouched(before, net):
    after = snapshot(net)
    assert set(before) == set(after)
    assert not [key for key in before if not same(before[key], after[key])]


def vector(fisher, k=None):
    """Some vector (P,) or matrix (P, k) that takes nothing from the random state."""
    v = torch.linspace(-1, 1, fisher.shape[0] * (k or 1), dtype=torch.float64)
    return v if k is None else v.reshape(-1, k)


CALLS = {
    "to_dense": lambda f: f.to_dense(),
    "block": lambda f: f.block("0", "6"),
    "generic block": lambda f: f.block("5"),
    "units": lambda f: f.units("0"),
    "diagonal": lambda f: f.diagonal(),
    "product": lambda f: f @ vector(f),
    "product with a matrix": lambda f: f @ vector(f, 2),
    "quadratic": lambda f: f.quadratic(vector(f)),
    "solve": lambda f: f.solve(vector(f), 0.1),
    "fro": lambda f: f.norm("fro"),
    "spectral": lambda f: f.norm("spectral"),
    "trace": lambda f: f.norm("trace"),
    "spectrum": lambda f: f.spectrum(),
    "leading eigenvalue": lambda f: f.spectrum(1),
    "posterior samples": lambda f: f.sample(1.0, 2),
    **{method: (lambda f, m=method: fv.approximate(f, m).to_dense()) for method in (
        "identity", "diagonal", "layer", "cw-ngd", "kfac-full", "kfac", "kfac-tridiagonal", "ekfac", "foof",
    )},
}  # fmt: skip
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def batches(N=6):
    x = nets.vectors(N, 3)
    return [x[: N // 2], x[N // 2 :]]


@pytest.mark.covering
@every_call
@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_nothing_changes_after_a_call(call, kind):
    net, data = model(), batches()
    before = snapshot(net)
    fisher = fv.Probe(net, "categorical").fisher(data, kind=kind)
    assert_untouched(before, net)
    call(fisher)
    assert_untouched(before, net)


@pytest.mark.parametrize("name", ["to_dense", "quadratic", "kfac", "ekfac", "posterior samples", "leading eigenvalue"])
def test_global_random_state_is_not_consumed_even_by_a_model_that_draws(name):
    net, data = nets.randomised(nn.Sequential(nn.Linear(3, 2), Drawing())), batches()
    before = torch.get_rng_state()
    CALLS[name](fv.Probe(net, "categorical").fisher(data, kind="mc"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.covering
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
@every_call
def test_nothing_changes_after_an_exception_in_the_model(call, fails_at):
    net, data = model(), batches()
    net[4].fails_at = fails_at
    before = snapshot(net)
    with suppress(ZeroDivisionError):
        call(fv.Probe(net, "categorical").fisher(data))
    assert_untouched(before, net)


def test_the_models_own_exception_reaches_the_user():
    net = model()
    net[4].fails_at = 1
    with pytest.raises(ZeroDivisionError, match="own trouble"):
        fv.Probe(net, "categorical").fisher(batches()).to_dense()


@pytest.mark.parametrize("name", ["to_dense", "product", "quadratic", "spectral", "kfac"])
def test_buffers_that_the_forward_pass_changes_are_put_back(name):
    net, data = nets.randomised(nn.Sequential(nn.Linear(3, 3), Counting(), nn.Linear(3, 2))), batches()
    before = {key: (buffer, buffer.clone()) for key, buffer in net.named_buffers()}
    CALLS[name](fv.Probe(net, "categorical").fisher(data))
    for key, buffer in net.named_buffers():
        assert buffer is before[key][0]
        assert torch.equal(buffer, before[key][1])


@pytest.mark.parametrize("name", ["to_dense", "product", "solve", "spectral", "ekfac"])
def test_nothing_changes_after_an_exception_in_the_backward_pass(name):
    net, data = (
        nets.randomised(nn.Sequential(nn.Linear(3, 3), FailingBackwards(), nn.Linear(3, 2))),
        batches(),
    )
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError, match="way back"):
        CALLS[name](fv.Probe(net, "categorical").fisher(data))
    assert_untouched(before, net)


def test_a_comparison_leaves_the_model_alone():
    net, data = model(), batches()
    before = snapshot(net)
    fv.compare(fv.Probe(net, "categorical").fisher(data), damping=0.1)
    assert_untouched(before, net)


def test_an_exception_in_the_data_leaves_the_model_alone():
    class Broken:
        def __iter__(self):
            yield torch.ones(2, 3, dtype=torch.float64)
            raise OSError("disk gone")

    net = model()
    before = snapshot(net)
    with pytest.raises(OSError, match="disk gone"):
        fv.Probe(net, "categorical").fisher(Broken()).to_dense()
    assert_untouched(before, net)


def test_hooks_live_until_the_context_ends():
    net, x = model(), nets.vectors(3, 3)
    before = snapshot(net)
    with fv.Probe(net, "categorical") as probe:
        assert any(len(module._forward_hooks) > (name == "0") for name, module in net.named_modules())
        probe.fisher(x).to_dense()
    assert_untouched(before, net)


def test_hooks_end_with_the_context_after_an_exception():
    net = model()
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt), fv.Probe(net, "categorical"):
        raise KeyboardInterrupt
    assert_untouched(before, net)


def test_attach_and_detach_by_hand():
    net = model()
    before = snapshot(net)
    probe = fv.Probe(net, "categorical")
    probe.attach()
    probe.detach()
    probe.detach()
    assert_untouched(before, net)


def test_making_a_probe_and_reading_its_layers_touches_nothing():
    net = model()
    before = snapshot(net)
    probe = fv.Probe(net, "categorical")
    assert probe.layers
    assert str(probe)
    assert_untouched(before, net)


def test_two_probes_do_not_disturb_each_other():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    alone = fv.Probe(net, "categorical").fisher(x).to_dense()
    with fv.Probe(net, "categorical") as one, fv.Probe(net, "gaussian", layers=["0"]) as two:
        together = one.fisher(x).to_dense()
        two.fisher(x).to_dense()
        again = one.fisher(x).to_dense()
    assert torch.equal(alone, together)
    assert torch.equal(alone, again)
    assert not any(module._forward_hooks for module in net.modules())


def test_user_gradients_flow_through_an_attached_model_as_before():
    net, x, y = nets.mlp(3, 4, 2), nets.vectors(4, 3), laws.Categorical().draw(4, 2)
    loss = nn.CrossEntropyLoss()
    expected = torch.autograd.grad(loss(net(x), y), list(net.parameters()))
    with fv.Probe(net, "categorical") as probe:
        actual = torch.autograd.grad(loss(net(x), y), list(net.parameters()))
        probe.fisher(x)
        again = torch.autograd.grad(loss(net(x), y), list(net.parameters()))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, actual, again, strict=True))


class Normed(nn.Module):
    """A reparametrised layer whose weight the forward may keep for its length."""

    def __init__(self, keeps):
        super().__init__()
        self.first, self.last, self.keeps = parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2), keeps

    def forward(self, x):
        with parametrize.cached() if self.keeps else nullcontext():
            return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


ASKED = {
    "product": (lambda f, v: f @ v, lambda F, v: F @ v),
    "form": (lambda f, v: f.quadratic(v), lambda F, v: v @ F @ v),
    "solve": (lambda f, v: f.solve(v, 0.1), lambda F, v: np.linalg.solve(F + 0.1 * np.eye(len(F)), v)),
    "matrix": (lambda f, v: f.to_dense(), lambda F, v: F),
}
CONTEXTS = {
    "weights that are kept": parametrize.cached,
    "saved tensors that may change": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("around", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize(("request_", "expected"), ASKED.values(), ids=ASKED)
def test_contexts_of_torch_around_a_request_change_no_number(request_, expected, around, keeps):
    net, x = nets.randomised(Normed(keeps)), nets.vectors(4, 3)
    F = exact.fisher(net, x, laws.Gaussian())
    v = nets.vectors(len(F), 1)[:, 0]
    with around():
        z, kept = net(x), net.first.weight
        found = request_(fv.Probe(net, "gaussian").fisher(x), v)
        z.sum().backward()
        assert (kept is net.first.weight) == (around is parametrize.cached)  # the user's own is still there
    assert_matches(found, expected(F, v.numpy()))


def test_data_are_not_changed():
    net, x = model(), nets.vectors(4, 3)
    kept = x.clone()
    fisher = fv.Probe(net, "categorical").fisher(x)
    fisher.to_dense()
    assert torch.equal(x, kept)
    assert x._version == 0


def test_results_do_not_share_memory_with_what_the_fisher_keeps():
    net, x = nets.mlp(3, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    for call in (fisher.to_dense, fisher.diagonal, lambda: fisher.block(0), lambda: fisher.units(0)):
        first = call()
        kept = first.clone()
        first.zero_()
        assert torch.equal(call(), kept)


def test_nested_layers_have_dotted_names_and_keep_no_hooks():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    wrapper = nn.Sequential(net)
    fisher = fv.Probe(wrapper, "categorical").fisher(x)
    fisher.to_dense()
    assert [layer.name for layer in fisher.layers] == ["0.0", "0.2"]
    assert not any(module._forward_hooks for module in wrapper.modules())


class OwnDraws(nn.Module):
    """Draws from its own generator, keeps what it drew, and moves its weight to other memory, all without effect."""

    def __init__(self, generator, draw):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.generator, self.draw = generator, draw

    def forward(self, x):
        self.drawn = self.draw(self.generator)
        self.weight.data = self.weight.data.clone()
        return x @ self.weight.T


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(5), lambda g: float(torch.rand((), generator=g))),
    "numpy": (lambda: np.random.default_rng(5), lambda g: g.random()),
    "numpy's older": (lambda: np.random.RandomState(5), lambda g: g.rand()),
    "python": (lambda: random.Random(5), lambda g: g.random()),
}


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=GENERATORS.keys())
def test_a_models_own_generators_attributes_and_memory_stand_as_they_stood(make, draw):
    net, x = OwnDraws(make(), draw), nets.vectors(4, 3)
    place = net.weight.data_ptr()
    found = fv.Probe(net, "gaussian").fisher(x).to_dense()
    assert net.weight.data_ptr() == place
    assert not hasattr(net, "drawn")
    assert draw(net.generator) == draw(make())
    torch.testing.assert_close(found, torch.block_diag(x.T @ x / 4, x.T @ x / 4))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "quantized"],
)
def test_buffers_without_plain_values_change_nothing(buffer):
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    expected = fv.Probe(net, "gaussian").fisher(x).to_dense()
    net.register_buffer("odd", buffer)
    assert torch.equal(fv.Probe(net, "gaussian").fisher(x).to_dense(), expected)
    assert net.odd is buffer


class Stepping(nn.Module):
    """Its output grows with the number of its forwards, which it counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.forwards += 1
        return x * self.forwards


@pytest.mark.parametrize("name", ["to_dense", "product", "quadratic", "fro"])
def test_every_forward_of_a_visit_sees_the_buffers_as_the_first_found_them(name):
    plain = nets.randomised(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    stepping = nn.Sequential(plain[0], plain[1], Stepping(), plain[2])
    data = [nets.vectors(4, 3), nets.vectors(3, 3), nets.vectors(5, 3)]
    found, expected = (CALLS[name](fv.Probe(net, "gaussian").fisher(data)) for net in (stepping, plain))
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-12)
    assert float(stepping[2].forwards) == 0


class ClampsLater(nn.Module):
    """A forward that clamps its weights for large inputs only."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.head = nn.Linear(width, 4), nn.Linear(4, 3)

    def forward(self, x):
        if float(x.detach().abs().max()) > 5:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.1, 0.1)
        return self.head(self.layer(x).tanh())


@pytest.mark.parametrize(
    "ask", [lambda f: f.to_dense(), lambda f: f @ torch.ones(f.shape[0]).double()], ids=["dense", "product"]
)
def test_weights_that_a_later_batch_alone_rewrites_are_put_back(ask):
    torch.manual_seed(0)
    net = ClampsLater(4).double()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    batches = [torch.rand(3, 4).double() for _ in range(6)]
    batches[5] += 10
    ask(fv.Probe(net, "categorical").fisher(batches))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name


def test_many_weights_that_a_later_batch_alone_rewrites_are_told(monkeypatch):
    monkeypatch.setattr("fisherviz.network.belongings.COPIED", 0)
    net = ClampsLater(4).double()
    batches = [torch.rand(3, 4).double() for _ in range(6)]
    batches[5] += 10
    with pytest.warns(UserWarning, match=r"rewrote the weight 'layer\.weight' for some examples only"):
        fv.Probe(net, "categorical").fisher(batches).diagonal()
