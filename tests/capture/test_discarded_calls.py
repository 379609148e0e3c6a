"""A call whose output is not used shows nothing of a weight that acts beside it, in whatever batch that is."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisherviz as fv

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


def by_hand(net: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """The mean over examples of Jᵀ (diag p - p pᵀ) J, from one example after the other."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        for n in range(len(batch["x"])):
            z = net(**{name: x[n : n + 1] for name, x in batch.items()})[0]
            p = z.softmax(0).detach()
            own = list(net.parameters())
            rows = [torch.autograd.grad(v, own, retain_graph=True, materialize_grads=True) for v in z]
            J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            total, count = total + J.T @ (p.diag() - torch.outer(p, p)) @ J, count + 1
    return total / count


@pytest.mark.parametrize("way", WAYS)
def test_weight_that_acts_beside_a_discarded_call_of_a_later_batch(way: str) -> None:
    torch.manual_seed(0)
    net = Later(way)
    batches = [{"x": torch.randn(3, 4, dtype=torch.float64)} for _ in range(5)]
    batches.append({"x": torch.randn(3, 4, dtype=torch.float64), "later": torch.ones(3)})
    expected = by_hand(net, batches)
    for order in (batches, batches[::-1]):
        fisher = fv.Probe(net, "categorical").fisher(order)
        torch.testing.assert_close(fisher.to_dense(), expected, rtol=1e-9, atol=1e-12)
        assert [layer.path for layer in fisher.layers] == ["generic", "structured"]
