"""A call whose output is not used shows nothing of a weight that acts beside it, in whatever batch that is."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisherviz as fv
from tests.oracles import exact

WAYS = {
    "function": lambda a, x, z: functional.linear(x, 2 * a.weight, a.bias),
    "product": lambda a, x, z: x @ a.weight.T,
    "vmap": lambda a, x, z: torch.vmap(a)(x),
    "jvp": lambda a, x, z: torch.func.jvp(a, (x,), (x,))[1],
    "without gradients": lambda a, x, z: torch.no_grad()(a)(x) + functional.linear(x, a.weight, a.bias),
    "detached": lambda a, x, z: z.detach() + functional.linear(x, a.weight),
}


class Later(nn.Module):
    """Uses its first layer in another way where the batch says so."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.head, self.way = nn.Linear(4, 4), nn.Linear(4, 3), WAYS[way]
        self.double()

    def forward(self, x: Tensor, later: Tensor | None = None) -> Tensor:
        z = self.a(x)
        return self.head((z if later is None else self.way(self.a, x, z)).tanh())


@pytest.mark.parametrize("way", WAYS)
def test_weight_that_acts_beside_a_discarded_call_of_a_later_batch(way: str) -> None:
    torch.manual_seed(0)
    net = Later(way)
    batches = [{"x": torch.randn(3, 4, dtype=torch.float64)} for _ in range(5)]
    batches.append({"x": torch.randn(3, 4, dtype=torch.float64), "later": torch.ones(3)})
    expected = exact.fisher_of_batches(net, batches)
    for order in (batches, batches[::-1]):
        fisher = fv.Probe(net, "categorical").fisher(order)
        torch.testing.assert_close(fisher.to_dense(), expected, rtol=1e-9, atol=1e-12)
        assert [layer.path for layer in fisher.layers] == ["generic", "structured"]
