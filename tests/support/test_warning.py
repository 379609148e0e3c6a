"""Warnings point at the line of whoever called the package, also from inside a backward of torch's."""

import warnings

import pytest
import torch
from torch import nn

import fisherviz as fv


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).train()


def test_a_warning_of_an_optimizer_points_at_the_backward():
    model = net()
    optimizer = fv.optim.NaturalGradient(model, "gaussian", "kfac", lr=0.01, damping=0.1)
    loss = model(torch.randn(6, 4)).square().sum(1).mean()
    with pytest.warns(UserWarning, match="BatchNorm in training mode") as caught:
        loss.backward()
    assert {one.filename for one in caught if "BatchNorm in" in str(one.message)} == {__file__}
    optimizer.step()


def test_a_remark_of_an_approximation_points_at_the_call():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 3))
    fisher = fv.Probe(model, "categorical").fisher(torch.randn(6, 4))
    with pytest.warns(UserWarning, match="kfra") as caught:
        fv.approximate(fisher, "kfra")
    assert {one.filename for one in caught if "kfra" in str(one.message)} == {__file__}


def test_torch_s_anomaly_mode_has_nothing_to_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y, moved = torch.randn(8, 6), torch.arange(8) % 3, []
    for anomaly in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
        optimizer = fv.optim.NaturalGradient(model, "categorical", "kfac", lr=0.1, damping=0.1, kind="exact")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
            with torch.autograd.set_detect_anomaly(anomaly):
                for _ in range(2):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
        assert torch.is_anomaly_enabled() is False
        moved.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(moved[1], moved[0])
