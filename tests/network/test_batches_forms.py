"""What a list of two tensors means, inputs that are no examples, and what is refused in one sentence."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_batch_of_a_loader_is_inputs_and_targets(kind):
    net, x, y = nets.mlp(3, 4, 2), nets.vectors(6, 3), laws.Categorical().draw(6, 2)
    batch = next(iter(DataLoader(TensorDataset(x, y), batch_size=6)))
    assert isinstance(batch, list)
    fisher = fv.Probe(net, "categorical").fisher(batch, kind=kind)
    targets = y if kind == "empirical" else None
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical(), targets=targets))
    assert fisher.examples == 6


def test_two_batches_of_inputs_stay_two_batches():
    net, x = nets.mlp(3, 4, 2), nets.vectors(8, 3)
    for cut in (4, 5):
        fisher = fv.Probe(net, "categorical").fisher([x[:cut], x[cut:]])
        assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical()))


def test_a_list_that_may_be_either_is_refused():
    with pytest.raises(TypeError, match=r"pass a tuple \(inputs, targets\)"):
        fv.Probe(nets.mlp(3, 4, 2), "gaussian").fisher([nets.vectors(5, 3), nets.vectors(5, 2)])


ONE_TYPE = {
    "tokens and tags": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), torch.randint(9, (6,)), "categorical"
    ),
    "a denoiser": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)), nets.vectors(6, 4), "gaussian"),
    "images and masks": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1)),
        torch.rand(6, 1, 2, 2, dtype=torch.float64).round(), "bernoulli",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("task", ONE_TYPE)
def test_inputs_and_targets_of_one_type_and_shape_are_no_two_batches(task, kind):
    """A batch of six was read as twelve examples, and the Fisher was up to 42 % off."""
    build, x, law = ONE_TYPE[task]
    net, y = nets.randomised(build()), x.flip(0)
    batch = next(iter(DataLoader(TensorDataset(x, y), batch_size=6)))
    with pytest.raises(TypeError, match=r"pass a tuple \(inputs, targets\), or \[\(first,\), \(second,\)\] for two"):
        fv.Probe(net, law).fisher(batch, kind=kind)
    pair = fv.Probe(net, law).fisher(tuple(batch))
    assert_matches(pair.to_dense(), exact.fisher(net, x, laws.ALL[law]))
    two = fv.Probe(net, law).fisher([(x,), (y,)])
    assert_matches(two.to_dense(), exact.fisher(net, torch.cat([x, y]), laws.ALL[law]))
    assert (pair.examples, two.examples) == (6, 12)


@pytest.mark.parametrize(
    ("law", "x"),
    [("categorical", nets.vectors(6, 3)), ("bernoulli", nets.vectors(6, 3)), ("categorical", nets.vectors(6, 3).exp())],
)
def test_two_batches_that_can_be_no_targets_stay_two_batches(law, x):
    net = nets.mlp(3, 4, 3)
    assert_matches(fv.Probe(net, law).fisher([x[:3], x[3:]]).to_dense(), exact.fisher(net, x, laws.ALL[law]))


@pytest.mark.parametrize("law", ["gaussian", "bernoulli"])
def test_two_batches_that_are_no_targets_of_one_another_by_the_output_s_shape_are_two(law):
    net, x = nets.mlp(3, 4, 2).train(), nets.vectors(6, 3).sigmoid()
    state = torch.get_rng_state()
    fisher = fv.Probe(net, law).fisher([x[:3], x[3:]])
    assert_matches(fisher.to_dense(), fv.Probe(net, law).fisher(x).to_dense().numpy())
    assert fisher.examples == 6
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_two_batches_that_may_be_probabilities_of_classes_are_refused():
    x = nets.vectors(6, 3).softmax(1)
    with pytest.raises(TypeError, match=r"pass a tuple \(inputs, targets\)"):
        fv.Probe(nets.mlp(3, 4, 3), "categorical").fisher([x[:3], x[3:]])


def test_a_batch_of_a_loader_of_dictionaries_is_inputs_and_targets():
    """Its dictionary and its targets were two batches, of which the second ran as inputs."""
    net, x, y = nets.mlp(3, 4, 2), nets.vectors(6, 3), laws.Categorical().draw(6, 2)
    batch = next(iter(DataLoader([({"input": a}, b) for a, b in zip(x, y, strict=True)], batch_size=6)))
    assert isinstance(batch, list)
    fisher = fv.Probe(net, "categorical").fisher(batch, kind="empirical")
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical(), targets=y))


def test_a_list_of_a_pair_and_a_tensor_is_refused():
    x = nets.vectors(4, 4)
    with pytest.raises(TypeError, match=r"pass a tuple \(\(first, second\), targets\)"):
        fv.Probe(nets.randomised(Mixing()), "gaussian").fisher([[x[:, :3], x], nets.vectors(4, 2)])


def test_tensors_of_several_kinds_are_no_list_of_batches():
    """A batch of two inputs and targets was read as three batches of inputs."""
    net, tokens = nets.randomised(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))), torch.randint(9, (6,))
    batch = next(iter(DataLoader(TensorDataset(tokens, torch.rand(6, 2) > 0.5, tokens % 3), batch_size=6)))
    with pytest.raises(TypeError, match=r"pass one batch of several inputs as a tuple \(\(first, second\), targets\)"):
        fv.Probe(net, "categorical").fisher(batch)


@pytest.mark.parametrize(
    "optimizer",
    [lambda net, law, data: fv.optim.SubsampledNaturalGradient(net, law, fisher_data=data),
     lambda net, law, data: fv.optim.KBFGS(net, law, data=data)],
    ids=["SubsampledNaturalGradient", "KBFGS"],
)  # fmt: skip
def test_optimizers_read_a_list_as_the_fisher_does(optimizer):
    net, x = nets.mlp(3, 4, 3), nets.vectors(6, 3)
    with pytest.raises(TypeError, match=r"pass a tuple \(inputs, targets\)"):
        optimizer(net, "gaussian", [x[:3], x[3:]])
    optimizer(net, "categorical", [x[:3], x[3:]])


class Mixing(nn.Module):
    """Adds to every example what a matrix that belongs to no example gives."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, matrix):
        return self.layer(x) * matrix.sum()


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (4, 4)])
def test_a_side_input_as_long_as_a_batch_is_refused(sizes):
    net, matrix = nets.randomised(Mixing()), torch.rand(4, 4, dtype=torch.float64)
    data = [((nets.vectors(n, 3), matrix), None) for n in sizes]
    with pytest.raises(
        (ValueError, RuntimeError), match=r"belongs to no single example|changes with the other examples"
    ):
        fv.Probe(net, "gaussian").fisher(data).to_dense()


def test_a_side_input_of_another_length_is_whole_in_every_batch():
    net, matrix = nets.randomised(Mixing()), torch.rand(4, 4, dtype=torch.float64)
    x = nets.vectors(8, 3)
    fisher = fv.Probe(net, "gaussian").fisher([((x[:3], matrix), None), ((x[3:], matrix), None)])
    F = exact.fisher(Bound(net, matrix), x, laws.Gaussian())
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher @ torch.ones(len(F), dtype=torch.float64), F.sum(1))


class Bound(nn.Module):
    def __init__(self, net, matrix):
        super().__init__()
        self.net, self.matrix = net, matrix

    def forward(self, x):
        return self.net(x, self.matrix)


def test_repeated_batches_are_examples():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    fisher = fv.Probe(net, "categorical").fisher([(x, torch.zeros(4, dtype=torch.long))] * 3)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical()))


@pytest.mark.parametrize(
    "inputs",
    [torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.eye(3) * 1j],
    ids=["sparse", "nested", "complex"],
)
def test_inputs_that_are_refused(inputs):
    with pytest.raises(TypeError, match="must be dense and real"):
        fv.Probe(nn.Linear(3, 2), "gaussian").fisher(inputs).to_dense()


def test_models_that_are_refused():
    with pytest.raises(TypeError, match="which takes no hooks"):
        fv.Probe(torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)), "gaussian")
    with pytest.raises(TypeError, match="'weight' is on the meta device"):
        fv.Probe(nn.Linear(3, 2, device="meta"), "gaussian")
    with pytest.raises(TypeError, match="'weight' is complex"):
        fv.Probe(nn.Linear(3, 2, dtype=torch.complex64), "gaussian")
