"""The exact Fisher of small networks: every view of it against the sum over labels, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets, order, trace
from tests.oracles.checks import FLOAT32, assert_matches

LAWS = {name: (name, law) for name, law in laws.ALL.items()} | {
    "gaussian of variance 0.3": (lambda: fv.Gaussian(variance=0.3), laws.Gaussian(0.3))
}


def given(likelihood):
    return likelihood if isinstance(likelihood, str) else likelihood()


@pytest.fixture(params=LAWS.values(), ids=LAWS.keys())
def case(request):
    likelihood, law = request.param
    net, x = nets.mlp(3, 4, 3, 2), nets.vectors(5, 3)
    return net, x, fv.Probe(net, given(likelihood)).fisher(x), exact.fisher(net, x, law)


def test_dense_fisher_is_the_expected_outer_product_of_scores(case):
    _, _, fisher, F = case
    assert_matches(fisher.to_dense(), F)


def test_shape_is_the_number_of_parameters_twice(case):
    _, _, fisher, F = case
    assert tuple(fisher.shape) == F.shape


def test_layers_are_in_the_order_of_named_parameters(case):
    net, _, fisher, _ = case
    assert [layer.name for layer in fisher.layers] == ["0", "2", "4"]
    assert fisher.layers == fv.Probe(net, "gaussian").layers
    parameters = [name for layer in fisher.layers for name in layer.parameters]
    assert parameters == [name for name, _ in net.named_parameters()]


def test_every_block_is_a_slice_of_the_dense_fisher(case):
    net, _, fisher, F = case
    parts = order.segments(trace.layers_of(net))
    for i, name in enumerate(["0", "2", "4"]):
        assert_matches(fisher.block(i), F[parts[i], parts[i]])
        for j, other in enumerate(["0", "2", "4"]):
            assert_matches(fisher.block(i, j), F[parts[i], parts[j]])
            assert_matches(fisher.block(name, other), F[parts[i], parts[j]])


def test_blocks_below_the_diagonal_are_transposes_of_those_above(case):
    _, _, fisher, _ = case
    assert_matches(fisher.block(2, 0), fisher.block(0, 2).T, 1e-13)


def test_units_are_the_blocks_of_one_output_unit_with_the_bias_last(case):
    net, _, fisher, F = case
    layers = trace.layers_of(net)
    unit_order = order.reorder(F, layers, "unit")
    for i, (part, (d_out, fan_in, _)) in enumerate(zip(order.segments(layers), layers, strict=True)):
        layer = unit_order[part, part].reshape(d_out, fan_in + 1, d_out, fan_in + 1)
        assert_matches(fisher.units(i), np.stack([layer[o, :, o, :] for o in range(d_out)]))


def test_diagonal_is_the_diagonal_in_torch_order(case):
    _, _, fisher, F = case
    assert_matches(fisher.diagonal(), np.diag(F))


def test_dense_fisher_is_symmetric_and_positive_semidefinite(case):
    _, _, fisher, _ = case
    dense = fisher.to_dense()
    assert_matches(dense, dense.T, 1e-14)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12 * torch.linalg.matrix_norm(dense, 2)


@pytest.mark.parametrize("likelihood", laws.ALL)
def test_float32_model_gives_float32_results_close_to_float64(likelihood):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    F = exact.fisher(net, x, laws.ALL[likelihood])
    fisher = fv.Probe(net.float(), likelihood).fisher(x.float())
    assert fisher.to_dense().dtype == torch.float32
    assert_matches(fisher.to_dense(), F, FLOAT32)
    assert_matches(fisher.diagonal(), np.diag(F), FLOAT32)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_one_dimensional_outputs_mean_one_output(likelihood):
    net, x = nets.mlp(3, 2, 1), nets.vectors(4, 3)
    flat = nn.Sequential(net, nn.Flatten(0))
    F = exact.fisher(net, x, laws.ALL[likelihood])
    assert_matches(fv.Probe(flat, likelihood).fisher(x).to_dense(), F)
    assert_matches(fv.Probe(net, likelihood).fisher(x).to_dense(), F)


def test_exact_fisher_asks_for_no_targets_and_ignores_them():
    net, x, law = nets.mlp(3, 4, 2), nets.vectors(5, 3), laws.Categorical()
    y = law.draw(5, 2)
    F = exact.fisher(net, x, law)
    probe = fv.Probe(net, "categorical")
    assert_matches(probe.fisher(x, y).to_dense(), F)
    assert_matches(probe.fisher((x, y)).to_dense(), F)


def test_many_classes():
    net, x = nets.mlp(2, 3, 7), nets.vectors(3, 2)
    F = exact.fisher(net, x, laws.Categorical())
    assert_matches(fv.Probe(net, "categorical").fisher(x).to_dense(), F)


def test_single_example():
    net, x = nets.mlp(2, 3, 2), nets.vectors(1, 2)
    assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), exact.fisher(net, x, laws.Gaussian()))


def test_one_layer_network():
    net, x = nets.mlp(2, 3), nets.vectors(4, 2)
    F = exact.fisher(net, x, laws.Categorical())
    assert_matches(fv.Probe(net, "categorical").fisher(x).to_dense(), F)


def test_root_module_may_be_the_layer_itself():
    net, x = nets.randomised(nn.Linear(2, 3)), nets.vectors(4, 2)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert [layer.name for layer in fisher.layers] == [""]
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical()))
    assert_matches(fisher.block(""), exact.fisher(net, x, laws.Categorical()))


def test_more_examples_than_parameters():
    net, x = nets.mlp(1, 2, 1), nets.vectors(40, 1)
    assert_matches(fv.Probe(net, "bernoulli").fisher(x).to_dense(), exact.fisher(net, x, laws.Bernoulli()))


def test_categorical_outputs_over_positions_have_the_class_axis_last():
    net = nets.randomised(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)))
    x = torch.randn(3, 4, 3, dtype=torch.float64)

    class Positions:
        def log_density(self, z, y):
            rows = zip(z.reshape(4, 3), y, strict=True)
            return sum(laws.Categorical().log_density(row, c) for row, c in rows)

    y = torch.randint(3, (3, 4))
    by_labels = exact.fisher(net, x, Positions(), targets=y)
    assert_matches(fv.Probe(net, "categorical").fisher(x, y, kind="empirical").to_dense(), by_labels)


@pytest.mark.parametrize("names", [["2"], ["0", "4"], ["4", "0"]], ids=str)
def test_a_choice_of_layers_gives_their_part_of_the_fisher(names):
    net, x = nets.mlp(3, 4, 3, 2), nets.vectors(5, 3)
    kept = [f"{name}.{own}" for name in sorted(names) for own in ("weight", "bias")]
    F = exact.fisher(net, x, laws.Categorical(), names=kept)
    by_name = fv.Probe(net, "categorical", layers=names).fisher(x)
    by_module = fv.Probe(net, "categorical", layers=[net[int(name)] for name in names]).fisher(x)
    assert [layer.name for layer in by_name.layers] == sorted(names)
    assert_matches(by_name.to_dense(), F)
    assert_matches(by_module.to_dense(), F)


@pytest.mark.parametrize("T", [2, 3])
def test_sum_over_positions_of_categorical_outputs(T):
    net = nets.randomised(nn.Sequential(nn.Linear(2, 3)))
    x = torch.randn(2, T, 2, dtype=torch.float64)
    J = [exact.jacobian(net, x, n) for n in range(2)]
    total = 0.0
    for n in range(2):
        z = net(x[n]).detach()
        blocks = torch.block_diag(*[laws.Categorical().output_fisher(row) for row in z]).numpy()
        total = total + J[n].T @ blocks @ J[n]
    assert_matches(fv.Probe(net, "categorical").fisher(x).to_dense(), total / 2)


def test_a_drawn_fisher_says_how_many_labels_were_drawn():
    probe = fv.Probe(nn.Linear(3, 2), "categorical")
    assert "mc, 3 samples" in repr(probe.fisher(torch.randn(4, 3), kind="mc", samples=3))
    assert "mc" not in repr(probe.fisher(torch.randn(4, 3)))
