"""Plain steps of training, for exhibits that look at a network on its way."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.training.data import Batches, Position


def advance(
    model: nn.Module,
    likelihood: Likelihood,
    optimizer: Any,
    batches: Batches,
    steps: int,
    position: Position | None = None,
    done: int = 0,
) -> Position:
    """Take steps on the mean loss of one mini-batch after the other.

    Args:
        model: trained in place.
        likelihood: of its outputs.
        optimizer: of its parameters, or of the model.
        batches: the mini-batches.
        steps: how many steps.
        position: of the first example; None: the first of all.
        done: steps that were taken before, which growing batches go by.

    Returns:
        The position of the next example.
    """
    position = position or Position()
    for step in range(done + 1, done + steps + 1):
        x, y, position = batches.take(position, step)
        optimizer.zero_grad()
        likelihood.nll(model(x), y).mean().backward()
        optimizer.step()
    return position
