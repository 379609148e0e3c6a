"""Benzing 2021: its rules, its settings, and K-FAC with equation 3's damping."""

import functools

import pytest
import torch

from fisherviz.papers.benzing import ablations, training
from fisherviz.papers.benzing.balanced import BalancedKFAC, balanced
from fisherviz.papers.benzing.panels import Comparison
from fisherviz.papers.benzing.setting import (
    ADAM,
    FOOF,
    FOOF_RARELY,
    FOOF_TUNED,
    KFAC,
    LAYERWISE,
    NATURAL,
    ONE_BATCH,
    RARELY,
    SAME,
    SCALES,
    SGD,
    departures,
    full_batches,
    larger,
    mini_batches,
)
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained

PLAIN = Method("any", "sgd")
EFFORT = Effort(steps=10, look=10, seeds=2, trials=0, trial_steps=0)


@functools.cache
def papers(name):
    """The paper's problem on a data set, of which nothing is read: an effort in epochs would count its examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "examples", 60_000)
        return mini_batches(name, SCALES["paper"])[0]


def ended(*losses):
    runs = tuple({"curve": [{"step": 10, "train_loss": loss}], "stopped": None} for loss in losses)
    return Trained(PLAIN, EFFORT, {}, (), runs)


def diverged():
    return Trained(PLAIN, EFFORT, {}, (), ({"curve": [], "stopped": "the loss is nan"},) * 2)


def on(dataset="mnist", **losses):
    """Final losses by method; a number stands for two seeds that end alike."""
    found = {name: ended(*((loss, loss) if isinstance(loss, float) else loss)) for name, loss in losses.items()}
    return Comparison(papers(dataset), found)


@pytest.fixture
def without_files(monkeypatch):
    """Problems know how many images there are without their files, which are not at hand everywhere."""
    monkeypatch.setattr(Problem, "examples", 60_000)


# Rules


@pytest.mark.usefixtures("without_files")
def test_ten_times_is_judged_on_each_data_set():
    far, near = {NATURAL: 0.1, KFAC: 0.01}, {NATURAL: 0.02, KFAC: 0.01}
    assert training.ten_times([on("fashion-mnist", **far), on(**far)]).verdict == "reproduced"
    assert training.ten_times([on("fashion-mnist", **near), on(**far)]).verdict == "not reproduced"
    smaller = Comparison(mini_batches("mnist", SCALES["desk"])[0], on(**far).found)
    assert training.ten_times([smaller]).verdict == "different setting"


def test_other_versions_of_the_natural_gradient_give_another_reading_of_the_same_claim():
    one = on(**{NATURAL: 0.02, SAME: 0.1, KFAC: 0.01})
    found = training.ten_times([one], SAME, "its own batch")
    assert (found.holds, found.repeats, found.values) == (True, True, {"mnist": pytest.approx(10)})
    assert not training.ten_times([one]).repeats


def test_what_diverged_is_infinitely_far_behind():
    one = Comparison(papers("mnist"), {NATURAL: diverged(), SAME: diverged(), KFAC: ended(0.1, 0.1)})
    assert training.ten_times([one]).holds
    assert one.ratio(KFAC, NATURAL) == 0
    assert one.ratio(SAME, NATURAL) == 1
    assert one.below(KFAC, (NATURAL,))
    assert not one.below(NATURAL, (KFAC,))


@pytest.mark.parametrize(("loss", "holds"), [(0.1, True), (0.124, True), (0.126, False), (0.079, False)])
def test_the_amortised_version_has_to_end_where_the_other_does(loss, holds):
    assert training._amortised([on(**{NATURAL: 0.1, RARELY: loss})]).holds is holds


def test_natural_gradients_have_to_be_behind_both_first_order_methods():
    assert training._first_order([on(**{NATURAL: 0.3, SGD: 0.2, ADAM: 0.1})]).holds
    assert not training._first_order([on(**{NATURAL: 0.15, SGD: 0.2, ADAM: 0.1})]).holds


def test_similar_is_a_median_and_outperforms_is_every_seed():
    one = on(**{FOOF: (0.1, 0.3), KFAC: (0.2, 0.25)})
    assert training.similar([one]).holds
    assert not training.outperforms([one]).holds
    assert training.outperforms([on(**{FOOF: (0.1, 0.15), KFAC: (0.2, 0.25)})]).holds
    assert not training.similar([on(**{FOOF: 0.23, KFAC: 0.2})]).holds
    assert training.outperforms([one]).repeats


def test_being_more_efficient_is_judged_against_the_better_first_order_method():
    one = on(**{KFAC: 0.06, SGD: 0.1, ADAM: 1.0})
    assert training.efficient([one], KFAC, "", "", 1.0).holds
    assert not training.efficient([one], KFAC, "", "", 2.0).holds
    assert not training.efficient([on(**{KFAC: 0.1, SGD: 0.1, ADAM: 1.0})], KFAC, "", "", 1.0).holds


@pytest.mark.parametrize(("loss", "holds"), [(0.12, True), (0.13, False)])
def test_rare_inversions_may_not_hurt(loss, holds):
    assert training.stale([on(**{FOOF: 0.1, FOOF_RARELY: loss, FOOF_TUNED: 0.5})], 100).holds is holds


def test_an_advantage_persists_if_every_seed_is_ahead_of_every_seed():
    def verdict(*losses):
        one = on(**{KFAC: losses, NATURAL: (0.2, 0.3), SGD: (0.25, 0.4)})
        return ablations.still_ahead(one, KFAC, (NATURAL, SGD), "figure 2A", "").holds

    assert verdict(0.1, 0.19)
    assert not verdict(0.1, 0.21)


def test_methods_that_were_not_tuned_are_told_beside_and_judged_by_nothing():
    losses = {KFAC: 0.1, NATURAL: 0.2, f"{KFAC}, not tuned": 9.0, f"{NATURAL}, not tuned": 0.3}
    found = ablations.still_ahead(on(**losses), KFAC, (NATURAL,), "figure 2C", "")
    assert found.holds
    assert found.sensitivity.endswith("K-FAC, not tuned 9 (9 to 9), natural gradient, not tuned 0.3 (0.3 to 0.3)")
    assert not ablations.still_ahead(on(**{KFAC: 0.1, NATURAL: 0.2}), KFAC, (NATURAL,), "", "").sensitivity


@pytest.mark.parametrize(("loss", "holds"), [(0.3, True), (0.081, True), (0.079, False)])
def test_more_data_does_not_improve_if_no_sample_ends_much_lower(loss, holds):
    one = on(**{NATURAL: 0.1, larger(300): 0.1, larger(1000): loss})
    assert ablations.no_better(one, (larger(300), larger(1000)), "figure 2B").holds is holds


# Settings


@pytest.mark.parametrize("name", SCALES)
def test_searches_begin_on_their_grids_and_the_papers_take_all_of_them(name, monkeypatch):
    monkeypatch.setattr(Problem, "examples", 60_000)
    scale = SCALES[name]
    for setting in (mini_batches("mnist", scale), full_batches("mnist", scale), full_batches("mnist", scale, False)):
        for method in setting[1].values():
            assert method.grid.keys() == method.start.keys()
            sizes = 1
            for key, values in method.grid.items():
                assert method.start[key] in values
                sizes *= len(values)
            if name == "paper":
                assert setting[2].trials >= sizes


def test_the_papers_scale_departs_from_the_paper_in_nothing(monkeypatch):
    monkeypatch.setattr(Problem, "examples", 60_000)
    scale = SCALES["paper"]
    problems = [mini_batches("mnist", scale)[0], *(full_batches("mnist", scale, hidden)[0] for hidden in (True, False))]
    assert [departures(problem) for problem in problems] == [(), (), ()]
    assert [problem.batch for problem in problems] == [100, 0, 0]
    assert problems[0].model_options == (("hidden", (1000, 1000, 1000)),)


def test_departures_name_data_widths_and_images():
    assert departures(Problem("digits", "foof-mlp", (("hidden", (8, 8, 8)),), batch=0, limit=50)) == (
        "digits instead of Fashion-MNIST and MNIST",
        "hidden layers of 8 instead of 1000",
        "50 training images instead of 1,000",
    )


@pytest.mark.usefixtures("without_files")
def test_methods_differ_in_what_they_are_named_for():
    methods = mini_batches("mnist", SCALES["paper"])[1]
    fixed = {name: dict(method.fixed) for name, method in methods.items()}
    assert fixed == {
        SGD: {}, ADAM: {}, NATURAL: {}, KFAC: {}, FOOF: {}, FOOF_TUNED: {"T": 100}, RARELY: {"T": 100},
        SAME: {"fisher_data": "same"}, LAYERWISE: {"structure": "layer"}, ONE_BATCH: {"decay": 0.0},
        larger(300): {"fisher_data": 300}, larger(1000): {"fisher_data": 1000},
    }  # fmt: skip


# K-FAC with equation 3's damping


def test_the_dampings_of_the_factors_multiply_to_lambda_in_the_ratio_of_the_traces():
    A, G = torch.diag(torch.tensor([3.0, 1.0, 2.0])).double(), torch.diag(torch.tensor([0.5, 0.25])).double()
    damped_a, damped_g = balanced(0.04).factors(A, G)
    of_a, of_g = float((damped_a - A)[0, 0]), float((damped_g - G)[0, 0])
    assert of_a * of_g == pytest.approx(0.04, rel=1e-12)
    assert of_a / of_g == pytest.approx(6 / 0.75, rel=1e-12)
    assert balanced(0.0) is None


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_steps_are_those_of_equation_3(decay):
    """From zero weights both labels are as likely, and either gives the same second moment of the errors."""
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Linear(4, 2, bias=False).double()
    optimizer = BalancedKFAC(model, "categorical", lr=0.7, damping=0.09, decay=decay)
    G, A = torch.tensor([[0.25, -0.25], [-0.25, 0.25]]).double(), torch.zeros(4, 4).double()
    for k in (1, 2):
        x = torch.randn(6, 4, generator=generator).double()
        y = torch.randint(2, (6,), generator=generator)
        with torch.no_grad():
            model.weight.zero_()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        gradient = model.weight.grad.clone()
        optimizer.step()
        keep = min(1 - 1 / k, decay)
        A = keep * A + (1 - keep) * x.T @ x / 6
        ratio = A.trace() / G.trace()
        of_a, of_g = (0.09 * ratio).sqrt(), (0.09 / ratio).sqrt()
        inverse_a = torch.linalg.inv(A + of_a * torch.eye(4).double())
        inverse_g = torch.linalg.inv(G + of_g * torch.eye(2).double())
        torch.testing.assert_close(model.weight.detach(), -0.7 * inverse_g @ gradient @ inverse_a)
