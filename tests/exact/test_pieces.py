"""On a small machine everything is taken in pieces of a few entries: the numbers are those of a large one."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.support import memory


class Tokens(nn.Module):
    """A table that is the head's weight too, a Linear between, at three positions."""

    def __init__(self):
        super().__init__()
        self.table, self.between, self.head = nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.between(self.table(tokens)))).mean(1)


class Reads(nn.Module):
    """A GRU, which has no structure, and a head."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0].sum(1))


NETWORKS = {
    "chain": lambda: (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(9, 4)),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 2, groups=2), nn.Flatten(), nn.Linear(8, 3)
        ),
        torch.randn(5, 2, 4, 4),
    ),
    "tokens": lambda: (Tokens(), torch.randint(0, 7, (6, 3))),
    "recurrent": lambda: (Reads(), torch.randn(4, 3, 3)),
}  # fmt: skip
SLOW = ("chain", "recurrent")
"""By hundreds of pieces."""
REQUESTS = {
    "diagonal": lambda f: f.diagonal(),
    "unit blocks": lambda f: f.units(len(f.space.layers) - 1),
    "block": lambda f: f.block(0, len(f.space.layers) - 1),
    "to_dense": lambda f: f.to_dense(),
    "products": lambda f: f @ torch.linspace(-1, 1, 3 * f.shape[0], dtype=torch.float64).reshape(-1, 3),
    "products from captures": lambda f: [f.example_space(), f @ torch.ones(f.shape[0], 3, dtype=torch.float64)][1],
    "quadratic": lambda f: torch.tensor(f.quadratic(torch.ones(f.shape[0], dtype=torch.float64))),
    "norms": lambda f: torch.tensor([f.norm(), f.norm(block=(0, 0)), f.norm(block=(0, 1)), f.norm("trace")]),
    "example_gram": lambda f: f.example_gram(),
    "inverse": lambda f: f.inverse(0.1).diagonal(),
    "natural_gradient": lambda f: f.natural_gradient(0.1),
    "kfac": lambda f: fv.approximate(f, "kfac").to_dense(),
    "ekfac": lambda f: fv.approximate(f, "ekfac").to_dense(),
    "nearest-kronecker": lambda f: fv.approximate(f, "nearest-kronecker").to_dense(),
}  # fmt: skip


def asked(name, request):
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    y = torch.arange(len(x)) % 3
    x = x.double() if x.is_floating_point() else x
    return REQUESTS[request](fv.Probe(model.double(), "categorical").fisher((x, y)))


@pytest.mark.filterwarnings("ignore:.*no structure|.*share the weight:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in SLOW else []) for name in NETWORKS]
)
def test_results_do_not_depend_on_the_size_of_pieces(name, monkeypatch):
    wanted = {request: asked(name, request) for request in REQUESTS}
    monkeypatch.setattr(memory, "_whole", lambda device: 16 * 8 * 150)  # 150 numbers at once
    for request, found in wanted.items():
        torch.testing.assert_close(
            asked(name, request), found, rtol=1e-8, atol=1e-10, msg=lambda m, r=request: f"{r}: {m}"
        )
