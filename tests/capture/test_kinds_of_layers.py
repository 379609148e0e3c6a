"""Every kind of layer, structured or generic: no parameter is left out, none counted at a wrong scale."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.oracles.zoo import CASES, EACH
from tests.oracles.zoo_modules import Squeezed, Tied, images

every_layer = pytest.mark.parametrize(("build", "data"), CASES.values(), ids=CASES.keys())
layer_of_each_kind = pytest.mark.parametrize(
    ("build", "data"),
    [pytest.param(*case, marks=() if name in EACH else pytest.mark.soak) for name, case in CASES.items()],
    ids=CASES.keys(),
)


@every_layer
def test_exact_fisher(build, data):
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Gaussian())
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), F)


@layer_of_each_kind
def test_empirical_fisher(build, data):
    net, x = nets.randomised(build()), data()
    y = laws.Categorical().draw(len(x), net(x).shape[1])
    F = exact.fisher(net, x, laws.Categorical(), targets=y)
    assert_matches(fv.Probe(net, "categorical").fisher(x, y, kind="empirical").to_dense(), F)


@layer_of_each_kind
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


# each request of a Fisher f with vectors a, b and what it must give
FIRST_REQUESTS = {
    "product": (lambda f, a, b: f @ a, lambda F, a, b: F @ a),
    "product with a matrix": (lambda f, a, b: f @ torch.stack([a, b], 1), lambda F, a, b: F @ np.stack([a, b], 1)),
    "quadratic": (lambda f, a, b: f.quadratic(a), lambda F, a, b: a @ F @ a),
    "bilinear": (lambda f, a, b: f.quadratic(a, b), lambda F, a, b: a @ F @ b),
    "solve": (lambda f, a, b: f.solve(a, 0.1), lambda F, a, b: np.linalg.solve(F + 0.1 * np.eye(len(F)), a)),
    "fro": (lambda f, a, b: f.norm("fro"), lambda F, a, b: np.linalg.norm(F)),
    "spectral": (lambda f, a, b: f.norm("spectral"), lambda F, a, b: np.linalg.norm(F, 2)),
    "leading eigenvalue": (lambda f, a, b: f.spectrum(1), lambda F, a, b: np.linalg.eigvalsh(F)[-1:]),
}


@pytest.mark.covering
@every_layer
@pytest.mark.parametrize(("request_", "expected"), FIRST_REQUESTS.values(), ids=FIRST_REQUESTS.keys())
def test_every_request_may_be_the_first(build, data, request_, expected):
    """What a pass leaves behind must not decide how the next request is answered."""
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Categorical())
    vectors = nets.vectors(2, len(F))
    assert_matches(request_(fv.Probe(net, "categorical").fisher(x), *vectors), expected(F, *vectors.numpy()), 1e-7)


@every_layer
def test_every_parameter_belongs_to_exactly_one_layer(build, data):
    net = nets.randomised(build())
    probe = fv.Probe(net, "gaussian")
    names = [name for layer in probe.layers for name in layer.parameters]
    assert names == [name for name, _ in net.named_parameters()]
    assert sum(layer.num_parameters for layer in probe.layers) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["conv2d", "linear", "module called twice", "layer norm", "conv2d in two groups"])
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
    net, x = nets.randomised(nn.Sequential(nn.EmbeddingBag(3, 2, mode="max"))), torch.randint(3, (4, 1))
    with pytest.raises(NotImplementedError, match="layer '0' has no inputs and pseudo-gradients"):
        fv.Probe(net, "gaussian").fisher(x).units("0")


def test_tied_parameters_count_once():
    net = nets.randomised(Tied())
    probe = fv.Probe(net, "gaussian")
    names = [name for layer in probe.layers for name in layer.parameters]
    assert len(names) == len(set(names)) == len(list(net.parameters()))


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
    net = nets.randomised(nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 2)))
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


@pytest.mark.parametrize(("form", "pick"), [("dictionary", lambda out: out["logits"]), ("tuple", lambda out: out[1])])
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
    assert_matches(fv.approximate(fisher, "kfac").to_dense().float(), fv.approximate(fisher, "kfac").to_dense(), 0)


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


def by_name(kind, place):
    """The kind with a forward of another library, which computes the same."""

    def forward(self, x):
        return kind.forward(self, x)

    forward.__module__, forward.__qualname__ = place.split(" ")
    return type(kind.__name__, (kind,), {"forward": forward})


@pytest.mark.parametrize(("kind", "options", "place"), [
    (nn.Linear, (4, 4), "timm.layers.linear Linear.forward"),
    (nn.LayerNorm, (4,), "timm.layers.norm LayerNorm.forward"),
    (nn.GroupNorm, (2, 4), "timm.layers.norm GroupNorm.forward"),
])  # fmt: skip
def test_layers_of_other_libraries_by_the_name_of_their_forward(kind, options, place):
    x = torch.randn(5, 4, dtype=torch.float64)
    for where, path in ((place, "structured"), (place.replace("timm", "mine"), "generic")):
        net = nets.randomised(nn.Sequential(by_name(kind, where)(*options), nn.Tanh(), nn.Linear(4, 2)))
        fisher = fv.Probe(net, "gaussian").fisher(x)
        assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
        assert fisher.layers[0].path == path


class Activated(nn.Module):
    """A normalisation and what follows it, as one module; or beside one another."""

    def __init__(self, kind, options, place, act, apart):
        super().__init__()
        if apart:
            self.norm = nn.Sequential(kind(*options), act)
        else:
            self.norm = activated(kind, place)(*options)
            self.norm.act = act
        self.first, self.last = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        h = self.first(x)
        h = self.norm(h.movedim(1, -1)).movedim(-1, 1) if isinstance(self.kind, nn.LayerNorm) else self.norm(h)
        return self.last(h).flatten(2).mean(2)

    @property
    def kind(self):
        return self.norm[0] if isinstance(self.norm, nn.Sequential) else self.norm


def activated(kind, place):
    """timm's: the forward of its parent, and an activation, perhaps in place."""

    def forward(self, x):
        return self.act(kind.forward(self, x))

    forward.__module__, forward.__qualname__ = place.split(" ")
    return type(kind.__name__, (kind,), {"forward": forward})


NORMS = [
    (nn.BatchNorm2d, (4,), "timm.layers.norm_act BatchNormAct2d.forward"),
    (nn.GroupNorm, (2, 4), "timm.layers.norm_act GroupNormAct.forward"),
    (nn.LayerNorm, (4,), "timm.layers.norm_act LayerNormAct.forward"),
]
ACTS = {"silu": nn.SiLU, "in place": lambda: nn.LeakyReLU(0.1, inplace=True), "none": nn.Identity}


def both_ways(norm, act):
    made = []
    for apart in (False, True):
        torch.manual_seed(0)
        made.append(nets.randomised(Activated(*norm, ACTS[act](), apart)))
    return *made, torch.randn(5, 2, 3, 2, dtype=torch.float64)


@pytest.mark.covering
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm[0].__name__)
@pytest.mark.parametrize("act", ACTS)
def test_normalisation_and_an_activation_in_one_module(norm, act, monkeypatch):
    net, other, x = both_ways(norm, act)
    monkeypatch.setattr("fisherviz.capture.take.generic_captures", None)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher.fresh().solve(v, 0.3), np.linalg.solve(F + 0.3 * np.eye(len(F)), v))
    assert {layer.path for layer in fisher.layers} == {"structured"}
    its = fv.Probe(other, "gaussian").fisher(x)
    for method in fv.approximations:
        assert_matches(fv.approximate(fisher, method).to_dense(), fv.approximate(its, method).to_dense())
    assert_matches(fv.Probe(net.float(), "gaussian").fisher(x.float()).to_dense(), F, 1e-4)


@pytest.mark.covering
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm[0].__name__)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_optimizers_take_both_for_what_they_are(norm, act, kind):
    *models, x = both_ways(norm, act)
    weights = []
    for net in models:
        torch.manual_seed(1)
        optimizer = fv.optim.NaturalGradient(net.train(), "gaussian", "layer", lr=0.1, damping=0.1, kind=kind)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().sum(1).mean().backward()
            optimizer.step()
        assert all(layer.structured for layer in optimizer.layers)
        weights.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert_matches(*weights, 1e-9)


def test_a_module_that_goes_on_and_whose_parameters_act_apart_is_generic():
    class Apart(nn.GroupNorm):
        def forward(self, x):
            return torch.tanh(nn.functional.group_norm(x, self.num_groups) * self.weight + self.bias)

    Apart.forward.__module__, Apart.forward.__qualname__ = "timm.layers.norm_act", "GroupNormAct.forward"
    net, x = nets.randomised(nn.Sequential(Apart(2, 4), nn.Linear(4, 2))), nets.vectors(5, 4)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert [layer.path for layer in fisher.layers] == ["generic", "structured"]
