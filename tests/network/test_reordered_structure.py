"""Parameters in an unusual order cost a layer nothing: evidence would hide a wrong order, taking away its structure."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fisherviz as fv
from tests.oracles import nets


def bias_first(module):
    weight = module.weight
    del module.weight
    module.register_parameter("weight", weight)


def pruned(module):
    prune.l1_unstructured(module, "weight", amount=0.3)
    prune.remove(module, "weight")


@pytest.mark.parametrize("change", [lambda module: None, bias_first, pruned], ids=["as built", "bias first", "pruned"])
@pytest.mark.parametrize("convolution", [False, True])
def test_layers_stay_structured_whatever_stands_first(change, convolution):
    first = nn.Conv2d(2, 3, 2) if convolution else nn.Linear(3, 4)
    change(first)
    net = nets.conv_net(first, nn.Conv2d(3, 2, 1)) if convolution else nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 2, 3, 2) if convolution else torch.randn(5, 3)
    fisher = fv.Probe(nets.randomised(net), "gaussian").fisher(x.double())
    fisher.diagonal()
    assert [info.path for info in fisher.layers] == ["structured", "structured"]
