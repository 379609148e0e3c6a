"""Several threads with a probe each on one model: one pass after the other, and right."""

import threading

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


@pytest.mark.parametrize("held", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_probes_of_one_model_in_several_threads(held):
    net = nets.randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)))
    x = nets.vectors(8, 3)
    F = exact.fisher(net, x, laws.Categorical())
    v = torch.ones(len(F), dtype=torch.float64)
    found, failed = [], []

    def work():
        try:
            for _ in range(25):
                probe = fv.Probe(net, "categorical")
                if held:
                    probe.attach()
                fisher = probe.fisher(x)
                found.extend([(fisher @ v, F.sum(1)), (fisher.diagonal(), F.diagonal()), (fisher.to_dense(), F)])
                probe.detach()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for actual, expected in found:
        assert_matches(actual, expected)
    assert not net[0]._forward_hooks
