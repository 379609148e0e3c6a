"""Small networks that rows are made of."""

from collections.abc import Callable

import torch
from torch import nn


class Formula(nn.Module):
    """A forward written as a function of the module and its input; parts are `self.parts`."""

    def __init__(self, forward: Callable, *parts: nn.Module):
        super().__init__()
        self.formula, self.parts = forward, nn.ModuleList(parts)

    def forward(self, *args, **kwargs):
        return self.formula(self.parts, *args, **kwargs)


def formula(forward: Callable, *parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder of such a network."""
    return lambda: Formula(forward, *[part() for part in parts])


def linear(*sizes: int, **options) -> Callable[[], nn.Module]:
    """A builder of a linear layer."""
    return lambda: nn.Linear(*sizes, **options)


def network() -> nn.Module:
    """A layer of each path: structured, scaling, and the head."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


class Bare(nn.Module):
    """Parameters of its own, which go the generic way."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, size))
        self.b = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return torch.tanh(x @ self.w * self.b)


class TwoInputs(nn.Module):
    """A second input and a scale that may be left out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x, w=None, scale=1.0):
        return self.head(torch.tanh(self.a(x) + (0 if w is None else self.b(w))) * scale)


class Recipe(nn.Module):
    """A network whose output is what a function makes of the logits."""

    def __init__(self, change: Callable):
        super().__init__()
        self.a, self.head, self.change = nn.Linear(3, 4), nn.Linear(4, 2), change

    def forward(self, x):
        return self.change(self.head(torch.tanh(self.a(x))))
