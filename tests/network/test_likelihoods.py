"""The predictive distributions: densities, samples and output Fishers against their definitions."""

import math

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import laws, nets
from tests.oracles.checks import assert_matches

PAIRS = {
    "categorical": (fv.Categorical(), laws.Categorical()),
    "bernoulli": (fv.Bernoulli(), laws.Bernoulli()),
    "gaussian": (fv.Gaussian(), laws.Gaussian(1.0)),
    "gaussian of variance 0.3": (fv.Gaussian(variance=0.3), laws.Gaussian(0.3)),
}
pairs = pytest.mark.parametrize(("likelihood", "law"), PAIRS.values(), ids=PAIRS.keys())


@pairs
def test_nll_is_minus_the_log_density_up_to_a_constant(likelihood, law):
    z, y = nets.vectors(5, 3), law.draw(5, 3)
    expected = -torch.stack([law.log_density(z[n], y[n]) for n in range(5)])
    assert likelihood.nll(z, y).shape == (5,)
    assert_matches(likelihood.nll(z, y), expected, 1e-12)


@pairs
def test_nll_gradient_is_the_score(likelihood, law):
    z, y = nets.vectors(5, 3).requires_grad_(), law.draw(5, 3)
    (actual,) = torch.autograd.grad(likelihood.nll(z, y).sum(), z)
    (expected,) = torch.autograd.grad(-sum(law.log_density(z[n], y[n]) for n in range(5)), z)
    assert_matches(actual, expected, 1e-12)


@pairs
def test_output_fisher_is_the_second_moment_of_the_score(likelihood, law):
    z = nets.vectors(4, 3)
    expected = torch.stack([law.output_fisher(row) for row in z])
    assert_matches(likelihood.fisher(z), expected, 1e-12)


@pairs
def test_factor_is_a_square_root_of_the_output_fisher(likelihood, law):
    z = nets.vectors(4, 3)
    S = likelihood.factor(z)
    assert S.shape[:2] == (4, 3)
    assert_matches(S @ S.mT, torch.stack([law.output_fisher(row) for row in z]), 1e-12)


def test_categorical_factor_spends_no_column_on_the_direction_that_leaves_the_softmax_alone():
    S = fv.Categorical().factor(nets.vectors(4, 5))
    assert S.shape[2] <= 5
    assert (torch.linalg.matrix_rank(S) == 4).all()


@pytest.mark.parametrize("z", [40.0, -40.0, 700.0])
def test_confident_bernoulli_keeps_its_tiny_variance(z):
    actual = fv.Bernoulli().fisher(torch.tensor([[z]], dtype=torch.float64))
    assert float(actual) == pytest.approx(math.exp(-abs(z)), rel=1e-10)


@pytest.mark.parametrize("surest", [0, 1, 3])
@pytest.mark.parametrize("margin", [5.0, 16.0, 25.0])
def test_confident_categorical_factor_keeps_its_digits_in_float32(surest, margin):
    z = torch.tensor([0.25, -0.75, 0.125, 0.5], dtype=torch.float64)
    z[surest] = margin
    actual = fv.Categorical().fisher(z[None].float())[0]
    assert_matches(actual, laws.Categorical().output_fisher(z), 2e-5)


def test_confident_categorical_stays_finite():
    z = torch.tensor([[800.0, 0.0, -800.0]], dtype=torch.float64)
    assert torch.isfinite(fv.Categorical().factor(z)).all()
    assert torch.isfinite(fv.Categorical().nll(z, torch.tensor([2]))).all()


def standardised(counts_mean, expected, deviation):
    return ((counts_mean - expected).abs() / deviation).max()


def test_categorical_samples_follow_the_softmax():
    z = torch.tensor([[0.3, -1.0, 1.2]], dtype=torch.float64).repeat(20000, 1)
    y = fv.Categorical().sample(z, torch.Generator().manual_seed(0))
    p = z[0].softmax(0)
    frequency = torch.bincount(y, minlength=3) / 20000
    assert y.shape == (20000,)
    assert standardised(frequency, p, (p * (1 - p) / 20000).sqrt()) < 4.5


def test_classes_without_probability_are_never_drawn():
    z = torch.full((500, 6), -1e4)
    z[:, [1, 4]] = 0.0
    y = fv.Categorical().sample(z, torch.Generator().manual_seed(0))
    assert set(y.tolist()) == {1, 4}


def test_bernoulli_samples_follow_the_logistic_and_are_independent():
    z = torch.tensor([[0.3, -1.0]], dtype=torch.float64).repeat(20000, 1)
    y = fv.Bernoulli().sample(z, torch.Generator().manual_seed(0)).double()
    p = z[0].sigmoid()
    assert y.shape == z.shape
    assert standardised(y.mean(0), p, (p * (1 - p) / 20000).sqrt()) < 4.5
    both, q = (y[:, 0] * y[:, 1]).mean(), p[0] * p[1]
    assert standardised(both, q, (q * (1 - q) / 20000).sqrt()) < 4.5


def test_gaussian_samples_have_the_mean_and_the_variance():
    z = torch.tensor([[0.3, -1.0]], dtype=torch.float64).repeat(20000, 1)
    y = fv.Gaussian(variance=0.3).sample(z, torch.Generator().manual_seed(0))
    assert y.shape == z.shape
    assert standardised(y.mean(0), z[0], (0.3 / 20000) ** 0.5) < 4.5
    assert standardised(y.var(0), torch.tensor(0.3), 0.3 * (2 / 20000) ** 0.5) < 4.5


@pytest.mark.parametrize("shift", [1e4, 1e7, 1e9, -1e11])
def test_the_scores_of_gaussian_samples_do_not_depend_on_where_the_outputs_are(shift):
    """z - y is the noise, of which float32 keeps nothing at z = 1e9."""
    z, gaussian = torch.randn(50, 3), fv.Gaussian(variance=0.3)
    near, far = (
        gaussian.score(at, gaussian.sample(at, torch.Generator().manual_seed(0))) for at in (z, (z + shift).float())
    )
    assert near.dtype == far.dtype == torch.float32
    assert float((far - near).abs().max()) < 1e-4


def test_gaussian_samples_that_cannot_be_told_from_the_outputs_are_refused():
    with pytest.raises(ValueError, match="cannot be told from them; pass kind='exact'"):
        fv.Gaussian().sample(torch.full((2, 1), 1e20))
    with pytest.raises(ValueError, match="so far beyond the standard deviation"):
        fv.Probe(scaled := torch.nn.Linear(2, 1), fv.Gaussian(variance=1e-30)).fisher(
            torch.ones(3, 2), kind="mc"
        ).diagonal()
    assert all(p.grad is None for p in scaled.parameters())


@pairs
def test_samples_come_from_the_given_generator_alone(likelihood, law):
    z = nets.vectors(50, 3)
    before = torch.get_rng_state()
    first = likelihood.sample(z, torch.Generator().manual_seed(3))
    assert torch.equal(first, likelihood.sample(z, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, likelihood.sample(z, torch.Generator().manual_seed(4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("y", [[0, 1, 3], [0, -1, 2], [-100, -100, 255]])
def test_categorical_refuses_labels_out_of_range(y):
    with pytest.raises(ValueError, match=r"range.*ignore_index"):
        fv.Categorical().nll(nets.vectors(3, 3), torch.tensor(y))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_labels_that_are_left_out_add_nothing(axis, ignore_index, dtype):
    z = nets.vectors(4, 15).reshape(4, 5, 3).to(dtype).movedim(-1, axis).requires_grad_()
    y = torch.randint(1, 3, (4, 5)).masked_fill(torch.rand(4, 5) < 0.4, ignore_index)
    y[2] = ignore_index
    likelihood = fv.Categorical(axis, ignore_index)
    loss = likelihood.nll(z, y)
    expected = nn.functional.cross_entropy(z.movedim(axis, 1), y, reduction="none", ignore_index=ignore_index).sum(1)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    score = likelihood.score(z.detach(), likelihood.check_targets(z, y))
    assert_matches(score, gradient, 1e-12 if dtype == torch.float64 else 1e-5)
    assert (score.movedim(axis, -1)[y == ignore_index] == 0).all()


def test_losses_with_an_ignore_index():
    net, x, y = nets.mlp(2, 3), nets.vectors(5, 2), torch.tensor([0, 2, 1, 2, 0])
    left = y != 0
    for reduction in ("mean", "sum"):
        probe = fv.Probe(net, nn.CrossEntropyLoss(ignore_index=0, reduction=reduction))
        assert "ignore_index=0" in repr(probe)
        expected = fv.Probe(net, "categorical").fisher(x[left], y[left])
        assert_matches(probe.fisher(x, y).to_dense(), expected.to_dense())
        assert_matches(probe.fisher(x, y, kind="empirical").gradient(), expected.gradient())


@pytest.mark.parametrize("value", [None, 0.5, True, "pad"])
def test_an_ignore_index_is_a_label(value):
    with pytest.raises(TypeError, match="ignore_index must be a whole number"):
        fv.Categorical(ignore_index=value)


def test_categorical_refuses_floating_labels():
    with pytest.raises((TypeError, ValueError), match=r"integer|long|class"):
        fv.Categorical().nll(nets.vectors(3, 3), torch.rand(3))


def test_bernoulli_refuses_targets_outside_zero_and_one():
    with pytest.raises(ValueError, match="range"):
        fv.Bernoulli().nll(nets.vectors(2, 1), torch.tensor([[0.0], [2.0]]))


def test_gaussian_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match="shape"):
        fv.Gaussian().nll(nets.vectors(2, 3), nets.vectors(2, 2))


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_gaussian_refuses_a_variance_that_is_not_positive(variance):
    with pytest.raises(ValueError, match="variance"):
        fv.Gaussian(variance=variance)


REFUSED = {
    "class weights": (nn.CrossEntropyLoss(weight=torch.ones(3)), "class weights", "Categorical"),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), "label smoothing", "Categorical"),
    "binary weights": (nn.BCEWithLogitsLoss(weight=torch.ones(3)), "weights", "Bernoulli"),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "pos_weight", "Bernoulli"),
}


@pytest.mark.parametrize(("loss", "what", "instead"), REFUSED.values(), ids=REFUSED.keys())
def test_a_reweighted_loss_is_refused_with_the_way_out(loss, what, instead):
    with pytest.raises(ValueError, match=rf"^a loss with {what} is not the negative .*: pass fv\.{instead}\(\)\.$"):
        fv.Probe(nets.mlp(2, 3), loss)


UNKNOWN = [nn.L1Loss(), nn.HuberLoss(), nn.NLLLoss(), nn.BCELoss(), nn.functional.mse_loss]


@pytest.mark.parametrize("loss", UNKNOWN, ids=lambda loss: getattr(loss, "__name__", type(loss).__name__))
def test_an_unknown_loss_is_refused(loss):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=r"categorical.*gaussian"):
        fv.Probe(nets.mlp(2, 3), loss)


def test_a_subclass_of_a_known_loss_is_not_taken_for_it():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, z, y):
            return (1 - z.softmax(1).gather(1, y[:, None])).square().mean() * super().forward(z, y)

    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        fv.Probe(nets.mlp(2, 3), Focal())


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'categorical'"):
        fv.Probe(nets.mlp(2, 3), "categorial")


# Which axis holds the classes


class Rows(nn.Module):
    """Outputs (N, 5, 4) of a linear layer at five positions; with the classes second, (N, 4, 5)."""

    def __init__(self, second=False):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.second = second

    def forward(self, x):
        z = self.layer(x)
        return z.mT if self.second else z


@pytest.fixture
def sequences():
    torch.manual_seed(0)
    return torch.randn(6, 5, 3, dtype=torch.float64), torch.randint(4, (6, 5))


def brute_force(net, x, classes):
    """Mean over examples of E[score scoreᵀ], position by position and label by label."""
    parameters = list(net.parameters())
    size = sum(p.numel() for p in parameters)
    F = torch.zeros(size, size, dtype=torch.float64)
    for n in range(len(x)):
        z = net(x[n : n + 1])[0].movedim(classes, -1).reshape(-1, 4)
        for row in z:
            logs = row - row.logsumexp(0)
            for c in range(4):
                g = torch.cat([v.flatten() for v in torch.autograd.grad(logs[c], parameters, retain_graph=True)])
                F += logs[c].exp().detach() * torch.outer(g, g)
    return F / len(x)


@pytest.mark.parametrize("kind", ["exact", "mc"])
@pytest.mark.parametrize(
    ("second", "likelihood", "instead"),
    [
        (False, fv.Categorical(class_axis=1), r"fv\.Categorical\(\)"),
        (False, nn.CrossEntropyLoss(reduction="sum"), r"fv\.Categorical\(\)"),
        (True, fv.Categorical(), r"fv\.Categorical\(class_axis=1\)"),
        (True, "categorical", r"fv\.Categorical\(class_axis=1\)"),
    ],
)
def test_targets_that_contradict_the_axis_of_the_classes_are_refused(sequences, kind, second, likelihood, instead):
    f = fv.Probe(Rows(second).double(), likelihood).fisher(*sequences, kind=kind)
    with pytest.raises(ValueError, match=rf"targets of shape \(6, 5\) .* pass {instead}"):
        f.to_dense()


def test_a_label_is_the_quantile_of_one_number_of_double_precision():
    """So that a seed gives the same labels in every version, and rare classes have their share."""
    z = torch.randn(1000, 7, generator=torch.Generator().manual_seed(3))
    found = fv.Categorical().sample(z, torch.Generator().manual_seed(4))
    u = torch.rand(1000, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    total = torch.softmax(z, 1).double().cumsum(1)
    assert torch.equal(found, (total <= u * total[:, -1:]).sum(1))


def test_products_refuse_the_wrong_axis_too(sequences):
    f = fv.Probe(Rows().double(), fv.Categorical(class_axis=1)).fisher(*sequences)
    with pytest.raises(ValueError, match=r"say that the classes .* are on axis -1, not 1"):
        f @ torch.ones(16, dtype=torch.float64)


@pytest.mark.parametrize(("second", "axis"), [(False, -1), (True, 1)])
@pytest.mark.parametrize("given", [True, False])
def test_with_the_right_axis_the_fisher_sums_over_positions(sequences, second, axis, given):
    net = Rows(second).double()
    x, y = sequences
    f = fv.Probe(net, fv.Categorical(class_axis=axis)).fisher(x, y if given else None)
    assert_matches(f.to_dense(), brute_force(net, x, 1 if not second else 0), 1e-10)


def test_images_of_logits_are_not_read_along_their_width():
    torch.manual_seed(0)
    net = nn.Conv2d(2, 3, 1).double()
    x, y = torch.randn(4, 2, 5, 6, dtype=torch.float64), torch.randint(3, (4, 5, 6))
    with pytest.raises(ValueError, match=r"pass fv\.Categorical\(class_axis=1\)"):
        fv.Probe(net, "categorical").fisher(x, y).diagonal()


@pytest.mark.parametrize(("loss", "given"), [(nn.CrossEntropyLoss(), ""), (nn.CrossEntropyLoss(ignore_index=2), "2")])
def test_the_mean_over_positions_is_refused_with_both_axes(sequences, loss, given):
    last, second = (rf"ignore_index={given}", rf"class_axis=1, ignore_index={given}") if given else ("", "class_axis=1")
    with pytest.raises(ValueError, match=rf"fv\.Categorical\({last}\) for .*fv\.Categorical\({second}\) for"):
        fv.Probe(Rows().double(), loss).fisher(*sequences).to_dense()


@pytest.mark.parametrize(("second", "axis"), [(False, -1), (True, 1)])
def test_the_advice_of_a_mean_over_positions_leads_to_the_fisher(sequences, second, axis):
    """Whichever of the two forms is tried first, the targets tell where the classes are."""
    net, (x, y) = Rows(second).double(), sequences
    right, wrong = fv.Categorical(axis, 2), fv.Categorical(-axis, 2)
    with pytest.raises(ValueError, match=rf"pass fv\.{right!r}".replace("(", r"\(").replace(")", r"\)")):
        fv.Probe(net, wrong).fisher(x, y).to_dense()
    F = fv.Probe(net, right).fisher(x, y).to_dense()
    twin = fv.Probe(net, fv.Categorical(axis)).fisher(x, y.masked_fill(y == 2, -100)).to_dense()
    assert torch.equal(F, twin)


# Complex numbers


class Wave(nn.Module):
    """Real outputs from complex weights, or complex outputs from real ones."""

    def __init__(self, complex_weights):
        super().__init__()
        dtype = torch.complex128 if complex_weights else torch.float64
        self.weight = nn.Parameter(torch.ones(3, 2, dtype=dtype))

    def forward(self, x):
        z = x.to(self.weight.dtype) @ self.weight
        return z.abs().square() if z.is_complex() else torch.complex(z, z)


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="'weight' is complex; freeze it"):
        fv.Probe(Wave(True), "gaussian")


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli"])
def test_complex_outputs_are_refused(likelihood):
    f = fv.Probe(Wave(False), likelihood).fisher(torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="the model's output is complex"):
        f.to_dense()


def test_a_gradient_of_zero_at_a_softmax_that_is_one_hot_counts_and_another_does_not():
    z = torch.tensor([[[1e4, 0.0], [0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    gradient = torch.tensor([[[0.0, 0.0], [0.5, -0.5], [0.0, 0.0]]], dtype=torch.float64)
    likelihood = fv.Categorical(class_axis=-1)
    assert likelihood.reached(z, gradient).tolist() == [[True, True, False]]
    assert likelihood.reached(z[:, :2], gradient[:, :2]) is None


@pytest.mark.parametrize("axis", [-1, 1])
def test_factors_of_plain_outputs_do_not_hang_on_where_positions_would_stand(axis):
    z = torch.randn(4, 3, dtype=torch.float64)
    p = torch.softmax(z, 1)
    factor = fv.Categorical(class_axis=axis).factor(z)
    assert_matches(factor @ factor.mT, torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))
