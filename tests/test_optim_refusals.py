"""What the optimizers refuse with a sentence, or say once, instead of failing bare or stepping wrongly in silence."""

import pytest
import torch
import torch.nn.functional as F

from fisherviz import optim
from tests.optim_oracle import data, net


def closure_of(opt, model, x, y):
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


ALL = {
    "foof": optim.FOOF,
    "cw-ngd": optim.CWNGD,
    "ekfac": optim.EKFAC,
    "tengrad": optim.TENGraD,
    "kfac": optim.KFAC,
    "kbfgs": optim.KBFGS,
    "subsampled": optim.SubsampledNaturalGradient,
    "hessian-free": optim.HessianFree,
}


@pytest.mark.parametrize("name", ALL)
def test_no_damping_at_all_is_not_none(name):
    with pytest.raises((TypeError, ValueError), match=r"damping must be a .*number.*got None"):
        ALL[name](net(), "categorical", damping=None)


def test_a_group_needs_a_damping_too():
    model = net()
    with pytest.raises(TypeError, match="damping must be a number"):
        optim.FOOF(model, "categorical", params=[{"params": model.parameters(), "damping": None}])


@pytest.mark.parametrize(("value", "error"), [("a", TypeError), (True, TypeError), (-1.0, ValueError)])
def test_loss_scale_is_a_positive_number(value, error):
    with pytest.raises(error, match="loss_scale must be"):
        optim.CWNGD(net(), "categorical", loss_scale=value)


def test_kbfgs_without_a_layer_has_no_use_for_data():
    model, (x, y) = net(), data()
    groups = [{"params": list(model.parameters()), "approximation": "none"}]
    with pytest.raises(ValueError, match="leave data out"):
        optim.KBFGS(model, "categorical", data=[x], params=groups)
    opt = optim.KBFGS(model, "categorical", params=groups, lr=0.1)
    before = model[0].weight.detach().clone()
    opt.step(closure_of(opt, model, x, y))
    assert torch.allclose(model[0].weight, before - 0.1 * model[0].weight.grad, atol=1e-15)
