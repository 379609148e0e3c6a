"""Samples of the Laplace posterior in example space, where each parameter has a prior precision of its own."""

import pytest
import torch

import fisherviz as fv
from fisherviz.exact.posterior import Posterior
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


@pytest.mark.parametrize("several", [False, True], ids=["one number", "one for each parameter"])
def test_deviations_are_a_root_of_the_posterior_covariance(several):
    """They are linear in white noise, so that the map's columns give the covariance of the samples exactly."""
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    F = torch.as_tensor(exact.fisher(net, x, laws.Gaussian(), reduction="sum"))
    prior = torch.rand(len(F), generator=torch.Generator().manual_seed(0)).double() + 0.2 if several else 0.7
    posterior = Posterior(fv.Probe(net, "gaussian").fisher(x), prior)
    own, columns = torch.eye(len(F)).double(), torch.eye(8).double()
    by_prior = posterior.in_example_space(own, torch.zeros(8, len(F)).double())
    by_data = posterior.in_example_space(torch.zeros(len(F), 8).double(), columns)
    expected = torch.linalg.inv(torch.diag(torch.as_tensor(prior, dtype=torch.float64).expand(len(F))) + F)
    assert_matches(by_prior @ by_prior.T + by_data @ by_data.T, expected, 1e-9)
