"""Kinds exact, mc and empirical, the nn losses with their own scale, and the sum or mean over examples."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

laws_by_name = pytest.mark.parametrize("likelihood", laws.ALL)
CLASSES = {"categorical": fv.Categorical, "bernoulli": fv.Bernoulli, "gaussian": fv.Gaussian}


def small(likelihood, N=5):
    law = laws.ALL[likelihood]
    return law, nets.mlp(3, 3, 2), nets.vectors(N, 3), law.draw(N, 2)


@laws_by_name
def test_empirical_fisher_is_the_mean_outer_product_of_the_data_scores(likelihood):
    law, net, x, y = small(likelihood)
    F = exact.fisher(net, x, law, targets=y)
    probe = fv.Probe(net, likelihood)
    assert_matches(probe.fisher(x, y, kind="empirical").to_dense(), F)
    assert_matches(probe.fisher((x, y), kind="empirical").to_dense(), F)
    assert_matches(probe.fisher([(x[:3], y[:3]), (x[3:], y[3:])], kind="empirical").to_dense(), F)


@laws_by_name
@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_sum_is_the_mean_times_the_number_of_examples(likelihood, kind):
    _, net, x, y = small(likelihood)
    probe = fv.Probe(net, likelihood)

    def fisher(reduction):
        generator = torch.Generator().manual_seed(1)
        return probe.fisher(x, y, kind=kind, reduction=reduction, generator=generator)

    mean, total = fisher("mean"), fisher("sum")
    v = nets.vectors(mean.shape[0], 1)[:, 0]
    assert_matches(total.to_dense(), 5 * mean.to_dense(), 1e-12)
    assert_matches(total.diagonal(), 5 * mean.diagonal(), 1e-12)
    assert_matches(total.block(0, 1), 5 * mean.block(0, 1), 1e-12)
    assert_matches(total.units(0), 5 * mean.units(0), 1e-12)
    assert_matches(total @ v, 5 * (mean @ v), 1e-12)
    assert float(total.quadratic(v)) == pytest.approx(5 * float(mean.quadratic(v)), rel=1e-12)
    assert_matches(total.spectrum(2), 5 * mean.spectrum(2), 1e-10)
    for ord in ("fro", "spectral", "trace"):
        assert float(total.norm(ord)) == pytest.approx(5 * float(mean.norm(ord)), rel=1e-10)
    assert_matches(
        total.solve(v, 0.7), np.linalg.solve(total.to_dense().numpy() + 0.7 * np.eye(len(v)), v.numpy()), 1e-9
    )


@laws_by_name
def test_summed_exact_fisher_equals_the_oracle(likelihood):
    law, net, x, _ = small(likelihood)
    actual = fv.Probe(net, likelihood).fisher(x, reduction="sum").to_dense()
    assert_matches(actual, exact.fisher(net, x, law, reduction="sum"))


def recording(likelihood):
    """The likelihood, keeping every batch of labels that it draws."""

    class Recording(CLASSES[likelihood]):
        drawn = ()

        def sample(self, z, generator=None):
            y = super().sample(z, generator)
            self.drawn = (*self.drawn, y.clone())
            return y

    return Recording()


@laws_by_name
@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_fisher_is_the_mean_of_the_empirical_fishers_of_its_labels(likelihood, samples):
    law, net, x, _ = small(likelihood)
    recorder = recording(likelihood)
    dense = fv.Probe(net, recorder).fisher(x, kind="mc", samples=samples).to_dense()
    labels = torch.stack(recorder.drawn).reshape(samples, 5, *recorder.drawn[0].shape[1:])
    F = np.mean([exact.fisher(net, x, law, targets=y) for y in labels], axis=0)
    assert_matches(dense, F)


def test_sampled_labels_are_the_same_for_layers_of_either_path():
    law, x = laws.Categorical(), nets.vectors(5, 3)
    net = nets.randomised(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
    recorder = recording("categorical")
    dense = fv.Probe(net, recorder).fisher(x, kind="mc").to_dense()
    assert_matches(dense, exact.fisher(net, x, law, targets=recorder.drawn[0]))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("margin", [5.0, 16.0, 30.0])
def test_scores_of_confident_right_answers_keep_their_digits_in_float32(likelihood, margin):
    """A well-trained network's examples: 1 - p of the right answer is far below float32's resolution at 1."""
    net, x = nets.mlp(2, 3), nets.vectors(4, 2).float().double()
    with torch.no_grad():
        net[0].weight.copy_((0.1 * net[0].weight).float())
        net[0].bias.copy_(torch.tensor([margin, 0.5, -0.5]) if likelihood == "categorical" else margin)
    y = torch.zeros(4, dtype=torch.long) if likelihood == "categorical" else torch.ones(4, 3)
    F = exact.fisher(net, x, laws.ALL[likelihood], targets=y)
    exact_F = exact.fisher(net, x, laws.ALL[likelihood])
    probe = fv.Probe(net.float(), likelihood)
    assert_matches(probe.fisher(x.float(), y, kind="empirical").to_dense(), F, 1e-4)
    assert_matches(probe.fisher(x.float()).to_dense(), exact_F, 1e-4)
    v = nets.vectors(len(F), 1)[:, 0].float()
    product = exact_F @ v.double().numpy()
    assert_matches(probe.fisher(x.float()) @ v, product, 1e-3)
    quadratic = float(probe.fisher(x.float()).quadratic(v))
    assert quadratic == pytest.approx(v.double().numpy() @ product, rel=1e-3)


def test_soft_targets_of_a_bernoulli_are_scored_as_they_are():
    net, x, y = nets.mlp(2, 3), nets.vectors(4, 2), torch.rand(4, 3).double()
    F = exact.fisher(net, x, laws.Bernoulli(), targets=y)
    assert_matches(fv.Probe(net, "bernoulli").fisher(x, y, kind="empirical").to_dense(), F)


@laws_by_name
@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_labels_are_drawn_once_and_kept(likelihood, samples):
    _, net, x, _ = small(likelihood)
    fisher = fv.Probe(net, likelihood).fisher([x[:2], x[2:]], kind="mc", samples=samples)
    dense = fisher.to_dense()
    v = nets.vectors(len(dense), 1)[:, 0]
    assert_matches(fisher.diagonal(), dense.diagonal())
    assert_matches(fisher @ v, dense @ v)
    assert_matches(fisher.block(0, 1), dense[:12, 12:])
    assert float(fisher.quadratic(v)) == pytest.approx(float(v @ dense @ v), rel=1e-9)
    assert float(fisher.norm("trace")) == pytest.approx(float(dense.trace()), rel=1e-9)
    assert_matches(fisher.to_dense(), dense)


@laws_by_name
def test_sampled_fisher_has_the_exact_one_as_expectation(likelihood):
    """Every entry lies within five standard errors, which the law's own fourth moments give (fixed seed)."""
    law, net, x = laws.ALL[likelihood], nets.mlp(2, 2), nets.vectors(3, 2)
    samples = 400
    generator = torch.Generator().manual_seed(7)
    sampled = fv.Probe(net, likelihood).fisher(x, kind="mc", samples=samples, generator=generator)
    dense = sampled.to_dense().numpy()
    variance = 0.0
    for n in range(len(x)):
        first = second = 0.0
        z = net(x[n]).detach()
        J = exact.jacobian(net, x, n)
        draws = torch.stack([torch.as_tensor(y) for y in many_labels(law, z)])
        for y in draws:
            leaf = z.clone().requires_grad_()
            (s,) = torch.autograd.grad(law.log_density(leaf, y), leaf)
            outer = np.outer(J.T @ s.numpy(), J.T @ s.numpy())
            first, second = first + outer / len(draws), second + outer**2 / len(draws)
        variance = variance + (second - first**2) / len(x) ** 2
    exact_F = exact.fisher(net, x, law)
    deviation = np.sqrt(variance / samples)
    assert np.abs((dense - exact_F) / deviation).max() < 5
    assert np.abs(dense - exact_F).max() > 0


def many_labels(law, z, count=150):
    """Independent draws from the law, to estimate fourth moments."""
    if isinstance(law, laws.Categorical):
        return torch.multinomial(z.softmax(0), count, replacement=True)
    if isinstance(law, laws.Bernoulli):
        return torch.bernoulli(z.sigmoid().expand(count, -1))
    return z + torch.randn(count, len(z), dtype=z.dtype) * law.variance**0.5


def test_same_generator_seed_gives_the_same_labels_and_another_seed_others():
    _, net, x, _ = small("categorical", N=20)
    probe = fv.Probe(net, "categorical")

    def dense(seed):
        return probe.fisher(x, kind="mc", generator=torch.Generator().manual_seed(seed)).to_dense()

    assert torch.equal(dense(1), dense(1))
    assert not torch.equal(dense(1), dense(2))


def test_default_generator_follows_the_initial_seed():
    _, net, x, _ = small("categorical", N=20)
    probe = fv.Probe(net, "categorical")
    torch.manual_seed(5)
    first = probe.fisher(x, kind="mc").to_dense()
    torch.rand(3)
    assert torch.equal(first, fv.Probe(net, "categorical").fisher(x, kind="mc").to_dense())


LOSSES = {
    "mean cross-entropy": (nn.CrossEntropyLoss(), laws.Categorical(), 3),
    "summed cross-entropy": (nn.CrossEntropyLoss(reduction="sum"), laws.Categorical(), 3),
    "mean squared error over three outputs": (nn.MSELoss(), laws.Gaussian(1.5), 3),
    "mean squared error over one output": (nn.MSELoss(), laws.Gaussian(0.5), 1),
    "summed squared error": (nn.MSELoss(reduction="sum"), laws.Gaussian(0.5), 3),
    "mean binary cross-entropy of one output": (nn.BCEWithLogitsLoss(), laws.Bernoulli(), 1),
    "summed binary cross-entropy": (nn.BCEWithLogitsLoss(reduction="sum"), laws.Bernoulli(), 3),
}


@pytest.mark.parametrize(("loss", "law", "D"), LOSSES.values(), ids=LOSSES.keys())
def test_a_loss_stands_for_the_likelihood_with_its_own_scale(loss, law, D):
    net, x, y = nets.mlp(2, 3, D), nets.vectors(4, 2), law.draw(4, D)
    probe = fv.Probe(net, loss)
    assert_matches(probe.fisher(x).to_dense(), exact.fisher(net, x, law))
    empirical = probe.fisher(x, y, kind="empirical").to_dense()
    assert_matches(empirical, exact.fisher(net, x, law, targets=y))


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=["mean", "sum"])
def test_empirical_fisher_of_a_squared_error_is_made_of_the_losss_own_gradients(loss):
    net, x = nets.mlp(2, 3), nets.vectors(4, 2)
    y = nets.vectors(4, 3)
    total = 0.0
    for n in range(4):
        gradients = torch.autograd.grad(loss(net(x[n : n + 1]), y[n : n + 1]), list(net.parameters()))
        flat = torch.cat([g.reshape(-1) for g in gradients]).numpy()
        total = total + np.outer(flat, flat) / 4
    assert_matches(fv.Probe(net, loss).fisher(x, y, kind="empirical").to_dense(), total)


def test_cross_entropy_loss_has_its_class_axis_second():
    net, x = nets.conv_net(nn.Conv1d(2, 3, 2))[:1], torch.randn(2, 2, 5, dtype=torch.float64)
    y = torch.randint(3, (2, 4))

    class Positions:
        def log_density(self, z, y):
            return sum(laws.Categorical().log_density(z.reshape(3, 4)[:, t], y[t]) for t in range(4))

    F = exact.fisher(net, x, Positions(), targets=y)
    probe = fv.Probe(net, nn.CrossEntropyLoss(reduction="sum"))
    assert_matches(probe.fisher(x, y, kind="empirical").to_dense(), F)


def test_mean_cross_entropy_over_positions_is_refused():
    net, x = nets.conv_net(nn.Conv1d(2, 3, 2))[:1], torch.randn(2, 2, 5, dtype=torch.float64)
    with pytest.raises((ValueError, NotImplementedError), match=r"mean|average"):
        fv.Probe(net, nn.CrossEntropyLoss()).fisher(x).to_dense()


def test_mean_binary_cross_entropy_of_several_outputs_is_scaled_or_refused():
    """Its gradients are the sum's over D: numbers at the sum's scale would be wrong."""
    net, x = nets.mlp(2, 3), nets.vectors(4, 2)
    with pytest.raises((ValueError, NotImplementedError), match=r"mean|average"):
        fv.Probe(net, nn.BCEWithLogitsLoss()).fisher(x).to_dense()


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_a_fisher_knows_its_kind_and_prints_it(kind):
    _, net, x, y = small("categorical")
    fisher = fv.Probe(net, "categorical").fisher(x, y, kind=kind)
    assert fisher.kind == kind
    assert kind in repr(fisher)
    assert "\n" not in repr(fisher)


@laws_by_name
def test_all_views_of_an_empirical_fisher_agree_with_the_oracle(likelihood):
    law, net, x, y = small(likelihood)
    F = exact.fisher(net, x, law, targets=y)
    fisher = fv.Probe(net, likelihood).fisher(x, y, kind="empirical")
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher.diagonal(), np.diag(F))
    assert_matches(fisher @ v, F @ v.numpy())
    assert float(fisher.quadratic(v)) == pytest.approx(float(v.numpy() @ F @ v.numpy()), rel=1e-9)
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v))
    assert float(fisher.norm("fro")) == pytest.approx(np.linalg.norm(F), rel=1e-9)
