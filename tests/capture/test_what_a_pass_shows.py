"""What forward and backward passes show of layers, and what is made of it where they show something rare."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherviz as fv
from fisherviz.capture.evidence import TOGETHER
from fisherviz.capture.hooks import absent
from fisherviz.capture.look import glance, late
from fisherviz.capture.take import _piece
from fisherviz.capture.witness import Witness, differs
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.oracles.zoo_modules import OnlySideDoor, SideDoor, Tied, Unsqueezed


def network(net, likelihood="gaussian"):
    return fv.Probe(net, likelihood).network


# ---- pieces of a pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 7, 100])
@pytest.mark.parametrize("inputs", [0, 10, 500])
@pytest.mark.parametrize("slopes", [False, True])
def test_a_piece_of_a_pass_is_as_large_as_fits(vectors, inputs, slopes):
    """Of all vectors where those of one example fit; then one example more would not. Slopes are as large as one."""
    fixed = inputs + 8 * slopes
    for limit in (1, 60, 1000, 10_000):
        structure = SimpleNamespace(example_output=torch.zeros(1, 3), example_bytes=(inputs, 8))
        seen = SimpleNamespace(structure=structure, capture_bytes=limit, slopes=slopes, device=torch.device("cpu"))
        examples, most = _piece(seen, SimpleNamespace(count=lambda z: vectors))
        if fixed + 8 * vectors <= limit:
            assert most == vectors
            assert examples * (fixed + 8 * vectors) <= limit < (examples + 1) * (fixed + 8 * vectors)
        elif most > 1:
            assert examples * (fixed + 8 * most) <= limit < examples * (fixed + 8 * (most + 1))
        else:
            assert examples == 1 or examples * (fixed + 8 * TOGETHER) <= limit


# ---- the backward passes ---------------------------------------------------------------------------------------------


def test_one_vector_at_a_time_gives_the_same_fisher(monkeypatch):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    expected = exact.fisher(net, x, laws.Gaussian())
    for entries in (0, 2**17):
        monkeypatch.setattr("fisherviz.capture.backward.BATCHED_ENTRIES", entries)
        assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), expected)


class NoGradientOfTheOther(nn.Module):
    """An output that depends on the first of two layers alone."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        self.other(x)
        return self.one(x)


def test_a_layer_that_the_output_does_not_depend_on_has_a_block_of_zeros_by_any_pass(monkeypatch):
    net, x = nets.randomised(NoGradientOfTheOther()), nets.vectors(5, 3)
    expected = exact.fisher(net, x, laws.Gaussian())
    for entries in (0, 2**17):
        monkeypatch.setattr("fisherviz.capture.backward.BATCHED_ENTRIES", entries)
        found = fv.Probe(net, "gaussian").fisher(x).to_dense()
        assert_matches(found, expected)
        assert not found[8:].any()


class Refusing(torch.autograd.Function):
    """Refuses its backward pass with a RuntimeError of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("the model's own trouble")


class RefusingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return Refusing.apply(self.last(x))


def test_a_backward_pass_that_fails_by_itself_is_not_explained_away():
    with pytest.raises(RuntimeError, match="the model's own trouble"):
        fv.Probe(nets.randomised(RefusingNet()), "gaussian").fisher(nets.vectors(4, 3)).to_dense()


# ---- inputs that the model overwrites --------------------------------------------------------------------------------


class Overwritten(nn.Module):
    """A layer with a frozen weight, whose input is overwritten once it has run: autograd needs it no more."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.inner.weight.requires_grad_(False)

    def forward(self, x):
        h = x * 2
        y = self.inner(h)
        for _ in range(self.times):
            h.mul_(0)
        return self.last(torch.tanh(y + h))


@pytest.mark.parametrize("times", [0, 1])
def test_an_input_that_is_overwritten_later_is_noted_as_it_was(times):
    net, x = nets.randomised(Overwritten(times)), nets.vectors(5, 3)
    net.inner.weight.requires_grad_(False)
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))
    made = network(net)
    with made.hooked():
        calls = made.record(x)[1]
    assert torch.equal(calls["inner"][0].x, 2 * x)
    assert made.recorder.cloned == ({"inner"} if times else set())


# ---- layers that did not run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.PReLU(2)),
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Conv2d(1, 2, 3)),
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)),
        Tied,
        OnlySideDoor,
    ],
    ids=["vectors", "images", "embedding", "tied", "side door"],
)
def test_a_layer_that_did_not_run_has_gradients_of_zero_and_its_own_size(build):
    for layer in network(nets.randomised(build())).layers:
        made = absent(layer, 2, 4, torch.zeros(1, dtype=torch.float64))
        assert made.gradients.shape == (2, 4, layer.size)
        assert not made.gradients.any()
        assert not made.square_sum().any()
        assert (made.vectors, made.examples, made.size) == (2, 4, layer.size)


# ---- a training loop's own passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "generic"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), set()),
        (OnlySideDoor, {"layer"}),
        (SideDoor, {"layer"}),
        (Unsqueezed, {"layer"}),
    ],
    ids=["plain", "never called", "side door", "example by example"],
)
def test_a_glance_at_somebody_elses_pass_finds_the_layers_without_structure(build, generic):
    net, x = nets.randomised(build()), nets.vectors(5, 3)
    seen = network(net)
    with seen.hooked():
        z, calls = seen.record(x)
    glance(seen, calls, z)
    assert seen.structure.looked
    assert {layer.name for layer in seen.structure.generic} == generic


def test_a_layer_that_runs_late_tells_its_positions_or_that_it_has_no_examples():
    x = nets.vectors(5, 3)
    plain = network(nets.mlp(3, 4, 2))
    with plain.hooked():
        z, calls = plain.record(x)
    assert late({"0"}, calls, z) == {"2": 1}
    assert late({"0", "2"}, calls, z) == {}
    odd = network(nets.randomised(Unsqueezed()))
    with odd.hooked():
        z, calls = odd.record(x)
    with pytest.raises(RuntimeError, match="layer 'layer' ran for the first time after the first pass, and"):
        late(set(), calls, z)


# ---- outputs that change ---------------------------------------------------------------------------------------------


class Factor(nn.Module):
    """Multiplies its output with an attribute, and optionally couples the examples of batches of more than some."""

    def __init__(self, couples=100):
        super().__init__()
        self.last, self.factor, self.couples = nn.Linear(3, 2), 1.0, couples

    def forward(self, x):
        z = self.last(x) * self.factor
        return z - z.mean(0) if len(x) > self.couples else z


def witnessed(net, x):
    seen, witness = network(net), Witness()
    witness.see(seen, x, 0)
    return seen, witness


def test_a_witness_tells_coupled_examples_from_a_model_that_was_changed():
    net, x = nets.randomised(Factor(couples=3)), nets.vectors(6, 3)
    seen, witness = witnessed(net, x)
    with pytest.raises(RuntimeError, match="changes with the other examples of the batch"):
        witness.confirm(seen, net(x), 0)
    net.couples = 100
    seen, witness = witnessed(net, x)
    witness.confirm(seen, net(x), 0)
    net.factor = 2.0
    with pytest.raises(RuntimeError, match="is another than in an earlier pass"):
        witness.confirm(seen, net(x), 0)


def test_a_witness_sees_a_batch_once_and_outputs_of_one_shape_alone():
    net, x = nets.randomised(Factor()), nets.vectors(6, 3)
    seen, witness = witnessed(net, x)
    first = witness.alone[0]
    net.factor = 2.0
    witness.see(seen, x, 0)
    assert witness.alone[0] is first

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 4)

        def forward(self, x):
            return self.last(x)[:, : 2 + int(x[0, 0] > 0)]

    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert not witnessed(nets.randomised(Ragged()), x)[1].alone


def test_outputs_of_another_shape_differ_and_those_without_entries_do_not():
    assert differs(torch.zeros(2), torch.zeros(3), torch.float64)
    assert not differs(torch.zeros(0), torch.zeros(0), torch.float64)
    assert differs(torch.tensor([1.0, 1.1]), torch.ones(2), torch.float64)
    assert not differs(torch.tensor([1.0, 1.0]), torch.ones(2), torch.float64)


class DrawsInEffect(nn.Module):
    """Draws at random in every pass, with or without effect."""

    def __init__(self, effect):
        super().__init__()
        self.last, self.effect = nn.Linear(3, 2), effect

    def forward(self, x):
        return self.last(x) + self.effect * torch.rand(1, dtype=x.dtype)


def test_a_model_that_draws_is_refused_where_it_shows():
    x = nets.vectors(4, 3)
    witnessed(nets.randomised(DrawsInEffect(0.0)), x)
    with pytest.raises(RuntimeError, match="or at random"):
        witnessed(nets.randomised(DrawsInEffect(1.0)), x)


def test_a_sum_that_overflows_is_no_number_that_is_not_finite():
    seen = network(nets.mlp(3, 2))
    z = torch.full((2, 2), 1e308, dtype=torch.float64)
    assert z.sum().isinf()
    seen.check_finite(z, {}, 0)
    z[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"in the output \(first at example 8\)"):
        seen.check_finite(z, {}, 7)


def test_products_of_outputs_that_are_not_finite_are_refused():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    v = torch.ones(fisher.shape[0], dtype=torch.float64)
    expected = torch.as_tensor(exact.fisher(net, x, laws.Gaussian())) @ v
    assert_matches(fisher @ v, expected)
    assert fisher.network.structure.forward_mode
    with torch.no_grad():
        net[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in the output"):
        fv.Probe(net, "gaussian").fisher(x) @ v


def test_a_layer_that_acts_in_a_pass_without_having_run_starts_the_request_again():
    """Its module runs in the first batches and its weight alone acts in the last one."""

    class Shy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            if bool((x[:, 0] > 100).any()):
                return self.last(torch.tanh(F.linear(x / 100, self.inner.weight, self.inner.bias)))
            return self.last(torch.tanh(self.inner(x)))

    net, parts = nets.randomised(Shy()), [nets.vectors(3, 3) for _ in range(8)]
    parts[-1] = parts[-1].abs() * 50 + 101
    expected = sum(torch.as_tensor(exact.fisher(net, part, laws.Gaussian())) for part in parts) / len(parts)
    fisher = fv.Probe(net, "gaussian").fisher(parts)
    assert_matches(fisher.to_dense(), expected)
    assert {layer.name: layer.path for layer in fisher.layers} == {"inner": "generic", "last": "structured"}
