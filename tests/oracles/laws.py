"""Predictive distributions r(y|z) of one example, by definition.

`labels(z)` gives weighted labels whose first and second score moments are exactly those of r(y|z): all labels
for the discrete laws, one point per output and sign for the Gaussian. `output_fisher(z)` is the closed form.
"""

from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True)
class Categorical:
    """One label out of the D classes of the logits z (D,)."""

    def log_density(self, z, y):
        # log p_y = -log(1 + sum of the others' odds): no cancellation however sure the law is
        others = torch.cat([z[: int(y)], z[int(y) + 1 :]]) - z[int(y)]
        return -torch.logaddexp(torch.logsumexp(others, dim=0), torch.zeros_like(z[0]))

    def labels(self, z):
        p = torch.exp(z - torch.logsumexp(z, dim=0)).detach()
        return [(float(p[c]), torch.tensor(c)) for c in range(len(z))]

    def output_fisher(self, z):
        p = torch.exp(z - torch.logsumexp(z, dim=0))
        between = -torch.outer(p, p).fill_diagonal_(0.0)
        return between - torch.diag(between.sum(1))

    def draw(self, N, D):
        return torch.randint(D, (N,))


@dataclass(frozen=True)
class Bernoulli:
    """D independent labels of 0 or 1 with the logits z (D,)."""

    def log_density(self, z, y):
        return -(y * torch.log1p(torch.exp(-z)) + (1 - y) * torch.log1p(torch.exp(z))).sum()

    def labels(self, z):
        p, q = (1 / (1 + torch.exp(-z))).detach(), (1 / (1 + torch.exp(z))).detach()  # not 1 - p, which cancels
        pairs = []
        for bits in product([0.0, 1.0], repeat=len(z)):
            y = torch.tensor(bits, dtype=z.dtype)
            pairs.append((float(torch.prod(y * p + (1 - y) * q)), y))
        return pairs

    def output_fisher(self, z):
        return torch.diag(1 / (1 + torch.exp(-z)) / (1 + torch.exp(z)))

    def draw(self, N, D):
        return torch.randint(2, (N, D)).double()


@dataclass(frozen=True)
class Gaussian:
    """D independent normals with means z (D,) and one variance."""

    variance: float = 1.0

    def log_density(self, z, y):
        return -((y - z) ** 2).sum() / (2 * self.variance)

    def labels(self, z):
        D, z = len(z), z.detach()
        reach = (D * self.variance) ** 0.5
        points = []
        for d in range(D):
            for sign in (-1.0, 1.0):
                y = z.clone()
                y[d] += sign * reach
                points.append((1 / (2 * D), y))
        return points

    def output_fisher(self, z):
        return torch.eye(len(z), dtype=z.dtype) / self.variance

    def draw(self, N, D):
        return torch.randn(N, D, dtype=torch.float64)


ALL = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian(1.0)}
