"""How good a network is: mean loss, and accuracy or squared error, in evaluation mode and without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fisherviz.network.likelihoods import Bernoulli, Categorical, Likelihood
from fisherviz.support.modes import keeping_modes
from fisherviz.training.data import Pair

Result = TypeVar("Result")
PIECE = 1024
"""Examples that are evaluated at once."""


@torch.no_grad()
def evaluate(model: nn.Module, likelihood: Likelihood, pair: Pair, limit: int | None = None) -> dict[str, float]:
    """Mean nll of the examples, with the accuracy of a categorical likelihood and the squared error of others.

    Args:
        model: left in the mode that it had.
        likelihood: of the outputs.
        pair: inputs and targets.
        limit: how many of the first examples to take; None: all.

    Returns:
        "loss", and "accuracy" (of the labels that count) or "squared_error" (summed over outputs, mean over examples);
        both NaN where the loss is.
    """
    inputs, targets = pair[0][:limit], pair[1][:limit]
    loss = total = 0.0
    judged, labels = score(likelihood), 0
    with keeping_modes(model):
        model.eval()
        for x, y in zip(inputs.split(PIECE), targets.split(PIECE), strict=True):
            z = model(x)
            loss += float(likelihood.nll(z, y).sum(dtype=torch.float64))
            y = likelihood.check_targets(z, y)  # of the outputs' shape and type, or a label for each position
            if isinstance(likelihood, Categorical):
                total += float((z.argmax(likelihood.class_axis) == y).sum())
                labels += int((y >= 0).sum())
            else:
                predicted = torch.sigmoid(z) if isinstance(likelihood, Bernoulli) else z
                total += float((predicted - y).square().sum(dtype=torch.float64))
    told = total / (max(1, labels) if judged == "accuracy" else len(inputs))
    return {"loss": loss / len(inputs), judged: math.nan if math.isnan(loss) else told}


def score(likelihood: Likelihood) -> str:
    """What examples are judged by, beside their loss."""
    return "accuracy" if isinstance(likelihood, Categorical) else "squared_error"


class Average:
    """The averaged iterate of section 13 of the K-FAC paper: θ̄ ← ξ θ̄ + (1 − ξ) θ.

    Args:
        model: whose parameters are averaged, from its present ones on.
        xi: ξ; 0.99 in the paper, which reports the better of iterate and average.

    Raises:
        ValueError: ξ is not in [0, 1).

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> average, old = Average(net, 0.9), net.weight.item()
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> average.update()  # after each step
        >>> with average.inside():
        ...     round(net.weight.item() - old, 4)
        0.1
    """

    def __init__(self, model: nn.Module, xi: float = 0.99) -> None:
        if not 0 <= xi < 1:
            raise ValueError(f"ξ must be in [0, 1), got {xi}.")
        self.model, self.xi = model, xi
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take a step's parameters in."""
        for name, p in self.model.named_parameters():
            self.values[name].mul_(self.xi).add_(p, alpha=1 - self.xi)

    def measured(self, measure: Callable[[], Result]) -> tuple[Result, Result]:
        """A measurement of the iterate and of the average, of which the paper reports the lower.

        Args:
            measure: evaluates the model as it is.

        Returns:
            Both, the iterate's first.
        """
        with self.inside():
            averaged = measure()
        return measure(), averaged

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The model with the averaged parameters."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self._fill(self.values)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(values[name])
