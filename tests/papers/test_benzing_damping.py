"""Benzing 2021, dampings, mini-batches, step costs and posteriors: rules and measures."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from fisherviz import datasets
from fisherviz.papers.benzing import costs as step_costs
from fisherviz.papers.benzing import damping, minibatches, posterior, similarity
from fisherviz.papers.benzing.balanced import BalancedKFAC
from fisherviz.papers.benzing.sweeps import FOOF, INDEPENDENT, KFAC, PRODUCT, SAME, Sweep
from fisherviz.papers.ledger.claims import REPRODUCED
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained
from fisherviz.papers.trials.running import trained
from fisherviz.papers.trials.work import Run

RUN = Run("smoke", progress=False)
DAMPINGS = (1e-4, 1e-2, 1.0)


def sweep(name, *losses):
    """A method whose seeds all ended with a damping's loss."""
    effort = Effort(steps=1, look=1, seeds=1, trials=0, trial_steps=0)
    found = []
    for loss in losses:
        stopped = None if math.isfinite(loss) else "the loss is inf"
        run = {"curve": [{"step": 0, "train_loss": loss}], "stopped": stopped}
        found.append(Trained(Method(name, "sgd"), effort, {}, (), (run,)))
    return Sweep(name, DAMPINGS[: len(losses)], tuple(found))


def reproduced(*claims):
    return [claim.verdict == REPRODUCED for claim in claims]


def test_performance_increases_up_to_the_best_damping():
    assert reproduced(*damping._increases(sweep(KFAC, math.inf, 1.0, 0.1), "4B", ())) == [True, True]
    assert reproduced(*damping._increases(sweep(KFAC, 1.0, 0.1, 0.5), "4B", ())) == [True, False]
    assert reproduced(*damping._increases(sweep(KFAC, 1.0, 1.2, 0.1), "4B", ())) == [False, False]
    assert reproduced(*damping._increases(sweep(KFAC, 0.1, 0.2, 0.3), "4B", ())) == [False, False]


def test_damped_factors_are_compared_at_the_best_damping_of_each():
    better = {KFAC: sweep(KFAC, 1.0, 0.1), PRODUCT: sweep(PRODUCT, 0.2, 0.9)}
    worse = {KFAC: better[PRODUCT], PRODUCT: better[KFAC]}
    assert reproduced(damping._factored(better, ()), damping._factored(worse, ())) == [True, False]


def test_performance_is_more_similar_where_the_ratio_is_nearer_to_one():
    foof = sweep(FOOF, 0.1, 0.1, 0.1)
    for losses, holds in (((math.inf, 0.3, 0.1), True), ((0.1, 0.1, 0.09), False), ((0.4, 0.3, 0.21), False)):
        assert reproduced(damping._similar({FOOF: foof, KFAC: sweep(KFAC, *losses)}, "4C", ())) == [holds]
    assert reproduced(damping._ahead({FOOF: foof, KFAC: sweep(KFAC, 1.0, 0.1)}, "4C", ())) == [True]
    assert reproduced(damping._ahead({FOOF: foof, KFAC: sweep(KFAC, 1.0, 0.08)}, "4C", ())) == [False]


def test_independent_mini_batches_have_to_end_lower():
    ahead = {INDEPENDENT: sweep(INDEPENDENT, 0.1, 0.5), SAME: sweep(SAME, 0.4, 0.2)}
    level = {INDEPENDENT: sweep(INDEPENDENT, 0.2, 0.5), SAME: sweep(SAME, 0.4, 0.2)}
    assert reproduced(minibatches._better(ahead, 9, ()), minibatches._better(level, 9, ())) == [True, False]


def bias(independent, same, added=0.5):
    squared = {str(d): {INDEPENDENT: independent, SAME: same} for d in minibatches.BIAS_DAMPINGS}
    return {"squared": squared, "added": dict.fromkeys(squared, added)}


def test_bias_has_to_be_larger_at_every_seed():
    assert reproduced(*minibatches._biased([bias(0.1, 0.2), bias(0.1, 0.3)], ())) == [True, True]
    assert reproduced(*minibatches._biased([bias(0.1, 0.2), bias(0.3, 0.1)], ())) == [False, True]
    assert reproduced(*minibatches._biased([bias(0.1, 0.2), bias(0.1, 0.3, 0.001)], ())) == [True, False]


def test_the_squared_bias_has_no_noise_in_it():
    generator = torch.Generator().manual_seed(0)
    goal, offset = torch.ones(50, dtype=torch.float64), 0.3
    found = []
    for _ in range(400):
        noise = torch.randn(2, 2, 50, generator=generator, dtype=torch.float64)
        halves = goal + torch.tensor([0.0, offset], dtype=torch.float64)[:, None] + noise
        found.append(minibatches.squared_bias(halves, goal))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 20
    assert ((mean - torch.tensor([0.0, offset**2])).abs() <= 4 * error).all()
    assert mean[1] > 0.05  # one set of draws alone would give 0.09 + 1 to either


def cosines(factored, product):
    """Both metrics' cosines, the same for every seed."""
    values = dict(zip(similarity.WORDS, (factored, product), strict=True))
    curves = {metric: torch.tensor([row, row]).numpy() for metric, row in values.items()}
    found = {(by, balance): curves for by in similarity.TRAINERS for balance in similarity.BALANCES}
    return similarity.Looks("mnist", 1000, 100, 500, found, {"K-FAC": [0.1, 0.1], "SGD": [0.1]}, None)


def test_similarity_has_to_rise_with_both_kinds_of_damping():
    rows = [[0.1, 0.5, 0.9], [0.1, 0.3, 0.9]]
    assert reproduced(*similarity.similarity_claims(cosines(*rows), "4A", ())) == [True, True]
    assert reproduced(*similarity.similarity_claims(cosines([0.1, 0.5, 0.4], rows[1]), "4A", ())) == [False, False]
    assert reproduced(*similarity.similarity_claims(cosines(rows[1], rows[0]), "4A", ())) == [True, False]
    assert cosines(*rows).departures("mnist") == ()
    assert cosines(*rows).departures("fashion-mnist") == ("MNIST instead of Fashion-MNIST",)


def test_k_fac_is_damped_by_equation_3():
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    model = nn.Linear(4, 3, bias=False).double()
    before, p = model.weight.detach().clone(), model(x).detach().softmax(1)
    optimizer = BalancedKFAC(model, "categorical", lr=0.5, damping=0.09)
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model.weight.grad.clone()
    optimizer.step()
    A = x.T @ x / 2
    possible = []
    for labels in product(range(3), repeat=2):  # which of them were drawn nobody tells
        errors = p - torch.eye(3, dtype=torch.float64)[list(labels)]
        G = errors.T @ errors / 2
        share = (A.trace() / G.trace()).sqrt()  # λ_A / λ_E = tr A / tr G and λ_A λ_E = λ
        damped_A, damped_G = A.clone(), G.clone()
        damped_A.diagonal().add_(0.3 * share)
        damped_G.diagonal().add_(0.3 / share)
        possible.append(before - 0.5 * torch.linalg.inv(damped_G) @ gradient @ torch.linalg.inv(damped_A))
    assert sum(torch.allclose(model.weight, one, rtol=1e-9, atol=1e-12) for one in possible) == 1


def costs(**changed):
    seconds = {"SGD": {"1": 1.0}, "natural gradient": {"100": 1.5}, "FOOF": {"100": 2.0}, "K-FAC": {"100": 3.0}}
    return step_costs.Costs(seconds | changed, seconds, {"FOOF": 1.9, "K-FAC": 2.9}, "cpu", {})


def test_costs_are_in_steps_of_sgd():
    assert costs().ratio("K-FAC", 100) == 3.0
    assert costs(SGD={"1": 2.0}).times("K-FAC", 100) == "1.50"
    assert costs(SGD={"1": 2.0}).ratio("K-FAC", 100, "operations") == 3.0


def test_a_cycle_holds_one_step_that_renews():
    scale = step_costs.SCALES["smoke"]
    stepper = step_costs._Stepper("FOOF", 3, 2, scale, RUN)
    stepper.taken = [7.0, 1.0, 1.0, 9.0, 1.0, 100.0]
    assert stepper.usual == 1.0
    assert stepper.mean == pytest.approx((2 * 1.0 + 8.0) / 3)


def test_operations_of_sgd_are_three_products_a_layer():
    scale = step_costs.SCALES["smoke"]
    sizes = (784, *[scale.width] * 3, 10)
    products = sum(2 * 100 * a * b for a, b in pairwise(sizes))
    first = 2 * 100 * sizes[0] * sizes[1]  # inputs need no gradient
    assert step_costs._operations(step_costs._Stepper("SGD", 1, 1, scale, RUN)) == 3 * products - first


def test_whitened_samples_are_judged_by_their_own_noise():
    samples = torch.randn(4000, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(abs(value) < 4 for value in posterior._white(samples).values())
    assert posterior._white(1.1 * samples)["covariance_z"] > 4
    assert posterior._white(samples + 0.2)["mean_z"] > 4


def test_samples_of_a_network_map_noise_to_the_explicit_posterior():
    found = posterior.sampling((posterior.SCALES["smoke"], 0), RUN)
    assert max(found["map"].values()) < 1e-10
    assert reproduced(posterior._identity([found]), posterior._inverse([found])) == [True, True]
    found["map"]["diagonal"] = 1e-3
    assert reproduced(posterior._identity([found])) == [False]


def test_the_one_layer_network_is_at_its_optimum():
    data = datasets.load("digits", limit=60).to(dtype=torch.float64)
    model = nn.Linear(64, 10, bias=False).double()
    posterior._to_optimum(model, *data.train)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(data.train.inputs), data.train.targets, reduction="sum")
    (loss + posterior.PRIOR / 2 * model.weight.square().sum()).backward()
    assert float(model.weight.grad.norm()) < 1e-4


def laid(kronecker, inputs, rank=0.95):
    nll = {posterior.EXACT: 1.0, posterior.KRONECKER: kronecker, posterior.INPUTS: inputs, "weights": 1.0}
    return {"nll": nll, "off": {posterior.KRONECKER: 0.1, posterior.INPUTS: 0.2}, "rank": rank, "row_error": 0.0}


def test_the_first_factor_alone_has_to_perform_as_well():
    assert reproduced(posterior._performs([laid(0.5, 0.5), laid(0.6, 0.5)], ())) == [True]
    assert reproduced(posterior._performs([laid(0.5, 0.6), laid(0.5, 0.61)], ())) == [False]
    assert reproduced(posterior._small_is_likely([laid(1, 1), laid(1, 1, 0.8)], ())) == [False]


def test_a_run_breaks_off_when_its_loss_explodes():
    problem = Problem("digits", "foof-mlp", (("hidden", (5,)),), batch=20, limit=60)
    found = trained(problem, Method("SGD", "sgd"), {"lr": 1e4}, 6, 3, 0, RUN)
    assert found["stopped"].startswith("the loss has risen to ")
    assert all(math.isfinite(line["train_loss"]) for line in found["curve"])
