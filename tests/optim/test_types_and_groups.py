"""Parameters of several types, models and states of another type, states of groups in another order."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import nets

PRESETS = {
    "KFAC": lambda net, **o: fv.optim.KFAC(net, "categorical", **o),
    "plain KFAC": lambda net, **o: fv.optim.KFAC(
        net, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1, momentum=0.9, **o
    ),
    "FOOF": lambda net, **o: fv.optim.FOOF(net, "categorical", **o),
    "EKFAC": lambda net, **o: fv.optim.EKFAC(net, "categorical", **o),
    "CWNGD": lambda net, **o: fv.optim.CWNGD(net, "categorical", **o),
    "TENGraD": lambda net, **o: fv.optim.TENGraD(net, "categorical", **o),
    "exact": lambda net, **o: fv.optim.NaturalGradient(net, "categorical", "exact", lr=0.1, damping=0.3, **o),
    "sub-sampled": lambda net, **o: fv.optim.SubsampledNaturalGradient(net, "categorical", **o),
    "KBFGS": lambda net, **o: fv.optim.KBFGS(net, "categorical", lr=0.1, damping=1.0, **o),
    "HessianFree": lambda net, **o: fv.optim.HessianFree(net, "categorical", **o),
    "KSD": lambda net, **o: fv.optim.KSD(net, "categorical", **o),
}
every_preset = pytest.mark.parametrize("name", PRESETS)


def square():
    """Layers of equal shapes: nothing but names tells their parameters apart."""
    return nets.randomised(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))).train()


def steps(net, optimizer, count):
    dtype = next(net.parameters()).dtype
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.randn(6, 3, generator=generator).to(dtype), torch.randint(3, (6,), generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


class TwoTypes(nn.Module):
    """Two layers of different types.

    Args:
        second: that of the second.
    """

    def __init__(self, second):
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 3).to(second)

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)).to(self.other.weight.dtype)).float()


@every_preset
def test_double_beside_smaller_types_is_refused_at_once(name):
    with pytest.raises(ValueError, match="several types"):
        PRESETS[name](TwoTypes(torch.float64))


@every_preset
def test_half_beside_single_precision_trains(name):
    net = TwoTypes(torch.bfloat16)
    before = deepcopy(net.state_dict())
    steps(net, PRESETS[name](net), 2)
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items())


@every_preset
def test_a_model_that_is_converted_between_steps_trains_on_or_is_refused_in_a_sentence(name):
    net = square().float()
    optimizer = PRESETS[name](net)
    steps(net, optimizer, 2)
    net.double()
    try:
        steps(net, optimizer, 2)
    except (RuntimeError, ValueError) as error:
        said = str(error)
    else:
        said = "the model's parameters are float64."
    assert said.startswith("the model's parameters are float64")
    assert said.endswith(".")


@every_preset
def test_a_state_of_another_type_is_refused(name):
    one, other = square().float(), square()
    trained = PRESETS[name](one)
    steps(one, trained, 2)
    with pytest.raises(ValueError, match="one of float32 parameters, and here they are float64"):
        PRESETS[name](other).load_state_dict(trained.state_dict())


ORDERS = {
    "groups": lambda net: [{"params": list(net[2].parameters())}, {"params": list(net[0].parameters())}],
    "parameters": lambda net: [{"params": list(net[i].parameters())[::-1]} for i in (0, 2)],
    "fewer groups": lambda net: [{"params": list(net.parameters())}],
    "a group more": lambda net: [*as_then(net), {"params": [nn.Parameter(torch.ones(1))], "approximation": "none"}],
}


def as_then(net):
    return [{"params": list(net[i].parameters())} for i in (0, 2)]


@pytest.mark.covering
@pytest.mark.parametrize("order", ORDERS)
@every_preset
def test_a_state_of_groups_in_another_order_is_refused(name, order):
    """torch takes them by position: momentum went to other parameters, silently where their shapes are equal."""
    one, other = square(), square()
    trained = PRESETS[name](one, params=as_then(one))
    steps(one, trained, 2)
    with pytest.raises(ValueError, match="give params= "):
        PRESETS[name](other, params=ORDERS[order](other)).load_state_dict(trained.state_dict())


def test_a_state_that_was_saved_without_types_and_order_is_taken():
    one, other = square(), square()
    other.load_state_dict(one.state_dict())
    trained, fresh = PRESETS["plain KFAC"](one), PRESETS["plain KFAC"](other)
    steps(one, trained, 2)
    other.load_state_dict(one.state_dict())
    state = deepcopy(trained.state_dict())
    del state["fisherviz"]["precision"], state["fisherviz"]["groups"]
    fresh.load_state_dict(state)
    steps(one, trained, 1), steps(other, fresh, 1)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
