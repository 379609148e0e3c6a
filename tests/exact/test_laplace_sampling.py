"""Posterior samples against the covariance (prior + summed Fisher)^-1 (Benzing 2021, appendix A.1)."""

import numpy as np
import pytest
import torch

import fisherviz as fv
from tests.oracles import exact, laws, nets

DRAWS = 5000


def centre(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).numpy()


def standardised_errors(samples, mean, covariance):
    """Distances of sample mean and covariance from the truth in standard errors (normal theory)."""
    samples = samples.double().numpy()
    spread = np.sqrt(np.diag(covariance) / len(samples))
    mean_error = (samples.mean(0) - mean) / spread
    deviations = samples - mean
    estimate = deviations.T @ deviations / len(samples)
    variance = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    return np.abs(mean_error).max(), np.abs((estimate - covariance) / np.sqrt(variance / len(samples))).max()


CASES = {
    "more parameters than vectors": ("gaussian", (2, 2, 1), 3),
    "more vectors than parameters": ("gaussian", (1, 2), 30),
    "categorical": ("categorical", (1, 2, 3), 4),
    "bernoulli": ("bernoulli", (2, 3), 5),
}
every_case = pytest.mark.parametrize(("likelihood", "widths", "N"), CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_have_the_explicit_posterior_covariance(likelihood, widths, N, reduction):
    net, x = nets.mlp(*widths), nets.vectors(N, widths[0])
    F = exact.fisher(net, x, laws.ALL[likelihood], reduction="sum")
    covariance = np.linalg.inv(0.5 * np.eye(len(F)) + F)
    fisher = fv.Probe(net, likelihood).fisher(x, reduction=reduction)
    samples = fisher.sample(0.5, DRAWS, generator=torch.Generator().manual_seed(1))
    assert samples.shape == (DRAWS, len(F))
    mean_error, covariance_error = standardised_errors(samples, centre(net), covariance)
    assert mean_error < 4.5
    assert covariance_error < 5


def test_whitened_samples_are_standard_normal():
    net, x = nets.mlp(2, 2), nets.vectors(4, 2)
    precision = 2.0 * np.eye(6) + exact.fisher(net, x, laws.Gaussian(), reduction="sum")
    samples = fv.Probe(net, "gaussian").fisher(x).sample(2.0, DRAWS, generator=torch.Generator().manual_seed(1))
    white = (samples.numpy() - centre(net)) @ np.linalg.cholesky(precision)
    covariance = white.T @ white / DRAWS
    assert np.linalg.norm(covariance - np.eye(6), 2) < 5 * np.sqrt(6 / DRAWS)
    fourth = (white**4).mean(0)
    assert np.abs(fourth - 3).max() < 5 * np.sqrt(96 / DRAWS)


def test_without_data_weight_the_prior_is_left():
    net, x = nets.mlp(2, 2), nets.vectors(4, 2)
    samples = fv.Probe(net, "gaussian").fisher(x).sample(1e8, DRAWS, generator=torch.Generator().manual_seed(1))
    spread = (samples - torch.from_numpy(centre(net))).std(0) * 1e4
    assert (spread - 1).abs().max() < 5 / np.sqrt(2 * DRAWS)


def test_samples_follow_their_generator():
    net, x = nets.mlp(2, 2), nets.vectors(4, 2)
    fisher = fv.Probe(net, "gaussian").fisher(x)

    def draw(seed):
        return fisher.sample(1.0, 3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    first = draw(1)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("precision", [0.0, -1.0, float("nan"), float("inf")])
def test_a_prior_precision_that_is_not_positive_is_refused(precision):
    fisher = fv.Probe(nets.mlp(2, 2), "gaussian").fisher(nets.vectors(4, 2))
    with pytest.raises((ValueError, TypeError), match="prior"):
        fisher.sample(precision, 2)


@pytest.mark.parametrize("n", [-1, 1.5])
def test_a_number_of_samples_that_is_none_is_refused(n):
    fisher = fv.Probe(nets.mlp(2, 2), "gaussian").fisher(nets.vectors(4, 2))
    with pytest.raises((ValueError, TypeError), match="n"):
        fisher.sample(1.0, n)
