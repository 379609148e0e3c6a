"""What a user may get wrong: one sentence that names it, never another number, never an internal error."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

KINDS_OF_ERROR = (ValueError, TypeError, RuntimeError, NotImplementedError)


def raises(word):
    return pytest.raises(KINDS_OF_ERROR, match=rf"(?i){word}")


def net_with(module):
    return nets.randomised(nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2)))


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode(affine):
    net = net_with(nn.BatchNorm1d(4, affine=affine))
    net[1].train()
    with raises(r"batch ?norm.*eval"):
        fv.Probe(net, "categorical").fisher(nets.vectors(4, 3)).to_dense()


def test_batch_norm_without_running_statistics_uses_the_batch_even_in_evaluation():
    net = net_with(nn.BatchNorm1d(4, track_running_stats=False))
    with raises(r"batch ?norm"):
        fv.Probe(net, "categorical").fisher(nets.vectors(4, 3)).to_dense()


def test_batch_norm_left_out_of_the_probed_layers_still_couples_the_examples():
    net = net_with(nn.BatchNorm1d(4))
    net[1].train()
    with raises(r"batch ?norm"):
        fv.Probe(net, "categorical", layers=["0"]).fisher(nets.vectors(4, 3)).to_dense()


ACTIVE = {
    "dropout": (nn.Dropout(0.5), "dropout.*eval"),
    "alpha dropout": (nn.AlphaDropout(0.5), "dropout.*eval"),
    "randomised relu": (nn.RReLU(), "(random|rrelu).*eval"),
}


@pytest.mark.parametrize(("module", "word"), ACTIVE.values(), ids=ACTIVE.keys())
def test_active_dropout(module, word):
    net = net_with(module)
    net.train()
    with raises(word):
        fv.Probe(net, "categorical").fisher(nets.vectors(4, 3)).to_dense()


def test_active_dropout_inside_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.attention(x, x, x)[0].mean(1))

    with raises("dropout"):
        fv.Probe(Net().train(), "categorical").fisher(torch.randn(2, 3, 4)).to_dense()


def test_dropout_of_probability_zero_is_no_trouble_in_training_mode():
    net, x = net_with(nn.Dropout(0.0)).train(), nets.vectors(3, 3)
    F = exact.fisher(net, x, laws.Gaussian())
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), F)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(value):
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    x[2, 1] = value
    with raises(r"nan|finite"):
        fv.Probe(net, "categorical").fisher(x).to_dense()


def test_activations_that_are_not_finite_name_the_layer():
    net, x = nets.mlp(3, 4, 3, 2), nets.vectors(4, 3)
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with raises(r"(nan|finite).*['\"]?(2|4)['\"]?"):
        fv.Probe(net, "categorical").fisher(x).to_dense()


@pytest.mark.parametrize("call", [lambda f: f @ torch.ones(26).double(), lambda f: f.diagonal(), lambda f: f.norm()])
def test_activations_that_are_not_finite_in_any_request(call):
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    x[2, 1] = float("nan")
    with raises(r"nan|finite"):
        call(fv.Probe(net, "categorical").fisher(x))


def test_model_without_parameters():
    with raises("parameter"):
        fv.Probe(nn.Tanh(), "gaussian").fisher(nets.vectors(3, 2)).to_dense()


def test_model_with_everything_frozen():
    with raises(r"frozen|requires_grad"):
        fv.Probe(nets.mlp(3, 2).requires_grad_(False), "gaussian").fisher(nets.vectors(3, 3)).to_dense()


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.weight", "0.bias"], []])
def test_a_parameter_frozen_since_the_probe_was_made(frozen):
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    probe = fv.Probe(net, "categorical")
    fisher, other = (probe.fisher(x, torch.arange(4) % 2) for _ in range(2))
    whole, size = fisher.to_dense(), probe.space.size
    for name, p in net.named_parameters():
        p.requires_grad_(bool(frozen) and name not in frozen)
    for call in (
        lambda: probe.fisher(x),
        lambda: probe.look(x),
        lambda: other.to_dense(),
        lambda: other.solve(torch.ones(size, dtype=torch.float64), 0.1),
        lambda: fv.approximate(fisher, "kfac"),
        lambda: fisher.natural_gradient(0.1),
    ):
        with raises(r"parameter '0\.weight' was frozen .*make a new Probe"):
            call()
    assert torch.equal(fisher.to_dense(), whole)  # what is known already takes no pass


def test_something_that_is_no_module():
    with raises("module"):
        fv.Probe(lambda x: x, "gaussian")


def test_output_without_an_example_axis():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x).sum()

    with raises(r"scalar|example|output"):
        fv.Probe(nets.randomised(Scalar()), "gaussian").fisher(nets.vectors(3, 3)).to_dense()


def test_output_with_another_number_of_rows_than_examples():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x).reshape(-1, 4)

    with raises(r"example|row|output"):
        fv.Probe(nets.randomised(Folded()), "gaussian").fisher(nets.vectors(4, 3)).to_dense()


def test_output_that_is_no_tensor():
    class Listing(nn.Linear):
        def forward(self, x):
            return "no tensor"

    with raises("output"):
        fv.Probe(Listing(3, 2), "gaussian").fisher(torch.randn(2, 3)).to_dense()


def test_forward_without_gradients():
    class Silent(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    net = nets.randomised(Silent(3, 2))
    for call in (
        lambda f: f.to_dense(),
        lambda f: f.quadratic(torch.ones(8).double()),
        lambda f: f.diagonal(),
    ):
        with raises(r"no_grad|detach|depend"):
            call(fv.Probe(net, "gaussian").fisher(nets.vectors(3, 3)))


def test_one_logit_is_no_categorical():
    with raises("bernoulli"):
        fv.Probe(nets.mlp(3, 1), "categorical").fisher(nets.vectors(3, 3)).to_dense()


@pytest.mark.parametrize("layers", [["nowhere"], ["1"], [nn.Linear(3, 4)], [], [3]], ids=str)
def test_layers_that_are_not_there_or_own_nothing(layers):
    with raises(r"layer|module|parameter"):
        fv.Probe(nets.mlp(3, 4, 2), "categorical", layers=layers)


def test_a_string_instead_of_a_list_of_layers_means_no_letters():
    net = nets.randomised(nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)]))
    probe = fv.Probe(net, "categorical", layers="11")
    assert [layer.name for layer in probe.layers] == ["11"]


# ---- the data ------------------------------------------------------------------------------------

EMPTY = {
    "tensor": lambda: torch.zeros(0, 3).double(),
    "list": list,
    "tuple": lambda: (torch.zeros(0, 3).double(), torch.zeros(0).long()),
    "loader": lambda: DataLoader(TensorDataset(torch.zeros(0, 3).double())),
    "empty batches": lambda: [torch.zeros(0, 3).double()],
    "an empty batch among others": lambda: [torch.zeros(2, 3).double(), torch.zeros(0, 3).double()],
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_data_set(data):
    with raises(r"empty|no example"):
        fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(data()).to_dense()


ONE_SHOT = {
    "generator": lambda x: (row for row in [x]),
    "iterator": lambda x: iter([x]),
    "iterator of a loader": lambda x: iter(DataLoader(x)),
    "map": lambda x: map(torch.clone, [x]),
    "zip": lambda x: zip([x], [x], strict=True),
}


@pytest.mark.parametrize("data", ONE_SHOT.values(), ids=ONE_SHOT.keys())
def test_a_one_shot_iterator(data):
    with raises(r"iterator|generator|once"):
        fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(data(nets.vectors(4, 3)))


OTHER_DATA = [None, 3, "digits", {"x": 1}, np.zeros((3, 3)), object()]


@pytest.mark.parametrize("data", OTHER_DATA, ids=lambda data: type(data).__name__)
def test_data_of_another_type(data):
    with raises("data must be a tensor|inputs must be tensors"):
        fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(data).to_dense()


def test_batches_of_another_type():
    with raises(r"batch|tensor"):
        fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(["a", "b"]).to_dense()


@pytest.mark.parametrize("y", [[0, 1, 2, 1], [0, -1, 1, 1], [0, 1, 255, 1]], ids=str)
def test_targets_out_of_range(y):
    with raises("range"):
        fv.Probe(nets.mlp(3, 2), "categorical").fisher(nets.vectors(4, 3), torch.tensor(y), kind="empirical").to_dense()


def test_bernoulli_targets_out_of_range():
    with raises("range"):
        fv.Probe(nets.mlp(3, 1), "bernoulli").fisher(
            nets.vectors(2, 3), torch.tensor([[0.0], [3.0]]), kind="empirical"
        ).to_dense()


def test_targets_that_are_not_finite():
    with raises(r"nan|finite"):
        fv.Probe(nets.mlp(3, 1), "gaussian").fisher(
            nets.vectors(2, 3), torch.tensor([[0.0], [float("nan")]]), kind="empirical"
        ).to_dense()


WRONG_TARGETS = {
    "too few": (torch.tensor([0, 1]), "categorical"),
    "floating classes": (torch.rand(4), "categorical"),
    "one-hot classes": (torch.eye(2)[[0, 1, 1, 0]].long(), "categorical"),
    "too few outputs": (torch.rand(4, 1).double(), "gaussian"),
    "broadcasting": (torch.rand(4).double(), "gaussian"),
    "transposed": (torch.rand(2, 4).double(), "bernoulli"),
}


@pytest.mark.parametrize(("y", "likelihood"), WRONG_TARGETS.values(), ids=WRONG_TARGETS.keys())
def test_targets_of_the_wrong_shape_or_type(y, likelihood):
    with raises("target"):
        fv.Probe(nets.mlp(3, 2), likelihood).fisher(nets.vectors(4, 3), y, kind="empirical").to_dense()


def test_empirical_without_targets():
    probe = fv.Probe(nets.mlp(3, 2), "categorical")
    for data in (nets.vectors(4, 3), [nets.vectors(4, 3)], DataLoader(TensorDataset(nets.vectors(4, 3)))):
        with raises("target"):
            probe.fisher(data, kind="empirical").to_dense()


def test_targets_given_twice():
    x, y = nets.vectors(4, 3), torch.tensor([0, 1, 0, 1])
    with raises("target"):
        fv.Probe(nets.mlp(3, 2), "categorical").fisher((x, y), y, kind="empirical").to_dense()


# ---- the request ---------------------------------------------------------------------------------


def small_fisher():
    return fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(nets.vectors(4, 3))


def test_an_unknown_kind():
    with raises("empirical"):
        fv.Probe(nets.mlp(3, 2), "categorical").fisher(nets.vectors(4, 3), kind="sampled")


def test_an_unknown_reduction():
    with raises("sum"):
        fv.Probe(nets.mlp(3, 2), "categorical").fisher(nets.vectors(4, 3), reduction="none")


@pytest.mark.parametrize("samples", [0, -1, 1.5])
def test_a_number_of_samples_that_is_none(samples):
    with raises("samples"):
        fv.Probe(nets.mlp(3, 2), "categorical").fisher(nets.vectors(4, 3), kind="mc", samples=samples)


@pytest.mark.parametrize("method", ["k-fac", "KFAC2", ""])
def test_an_unknown_method_is_refused_with_the_known_ones(method):
    with raises("kfac"):
        fv.approximate(small_fisher(), method)


@pytest.mark.parametrize("method", [3, None, int, fv.Probe], ids=str)
def test_a_method_that_is_no_name_and_no_approximation(method):
    with raises(r"name|approximation"):
        fv.approximate(small_fisher(), method)


def test_an_unknown_option_of_a_method():
    with raises("rnak"):
        fv.approximate(small_fisher(), "nearest-kronecker", rnak=2)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nearest-kronecker", {"rank": 0}),
        ("kfac", {"setting": "shrink"}),
        ("nearest-kronecker", {"rank": "two"}),
    ],
    ids=str,
)
def test_an_option_out_of_range(method, options):
    with raises(next(iter(options))):
        fv.approximate(small_fisher(), method, **options).to_dense()


@pytest.mark.parametrize("layer", ["nowhere", 2, -3, 1.0, None], ids=str)
def test_a_layer_that_is_not_probed(layer):
    fisher = small_fisher()
    with raises("layer"):
        fisher.block(layer)
    with raises("layer"):
        fisher.units(layer)
    with raises("layer"):
        fv.approximate(fisher, "kfac").block(layer, 0)


def test_the_root_layer_is_named_among_those_that_are_probed():
    fisher = fv.Probe(nn.Linear(3, 2).double(), "gaussian").fisher(nets.vectors(4, 3))
    with raises(r"no probed layer 'head'; it must be one of '' \(root\)\."):
        fisher.block("head")
    assert fisher.block("").shape == (8, 8)


def test_a_vector_that_is_no_tensor():
    fisher = small_fisher()
    for v in (3.0, "v", None):
        with raises(r"vector|tensor"):
            fisher @ v


@pytest.mark.parametrize("k", [0, -1, 1.5, "all"])
def test_a_number_of_eigenvalues_that_is_none(k):
    with raises("k must be a positive whole number"):
        small_fisher().spectrum(k)


TOO_LARGE = {
    "dense": lambda f: f.to_dense(),
    "block": lambda f: f.block(0),
    "dense layer approximation": lambda f: fv.approximate(f, "kfac").to_dense(),
    "inverse": lambda f: fv.approximate(f, "kfac").inverse(1.0).to_dense(),
}


@pytest.mark.parametrize("request_for", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_a_matrix_that_cannot_fit_is_refused_with_the_bytes_before_it_is_begun(request_for):
    """A layer of 600,000 weights: its block would take more than a terabyte."""
    fisher = fv.Probe(nn.Linear(1000, 600, bias=False), "gaussian").fisher(torch.randn(2, 1000))
    with pytest.raises(MemoryError, match=r"[GT]i?B"):
        request_for(fisher)
