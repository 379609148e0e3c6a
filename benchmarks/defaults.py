"""Every optimizer with its defaults against Adam's and SGD's: `python -m benchmarks.defaults [NAME ...]`.

Five problems, three epochs each, seeds 0, 1, 2 of weights and batches; mean and worst training loss after the same
steps. Writes benchmarks/defaults.json and the third part of benchmarks/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherviz import datasets, optim
from fisherviz.network.likelihoods import resolve
from fisherviz.training.data import Batches, Pair, Position
from fisherviz.training.evaluation import evaluate

SEEDS = (0, 1, 2)
EPOCHS = 3
Make = Callable[[nn.Module, str], Optimizer]


@dataclass(eq=False)
class Problem:
    """What is trained.

    Attributes:
        title: in the table.
        load: makes the training examples.
        build: makes the network.
        likelihood: name of the output's distribution.
        batch: examples per step.
        files: the data set that has to be at hand; None: it is embedded.
    """

    title: str
    load: Callable[[], Pair]
    build: Callable[[], nn.Module]
    likelihood: str = "categorical"
    batch: int = 100
    files: str | None = None

    @cached_property
    def data(self) -> Pair:
        """The training examples."""
        return self.load()


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    """Two convolutions with BatchNorm, for images of 8 x 8."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        q, k, v = self.qkv(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class Transformer(nn.Module):
    """Predicts each token from those before it."""

    def __init__(self, tokens: int, length: int, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) to (N, T, tokens)."""
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)
        return self.head(self.norm(self.blocks(self.embed(x) + self.place(places))))


def examples(name: str, **options: Any) -> Pair:
    """Training examples of a data set."""
    return datasets.load(name, progress=False, **options).train


def tokens() -> Pair:
    """The digits' upper halves as sequences of 32 grey levels out of 17, each predicted from those before it."""
    levels = (examples("digits", standardise=False)[0][:, :32] * 16).round().long()
    return levels[:, :-1], levels[:, 1:]


PROBLEMS = {
    "digits": Problem("digits, 64-64-10", lambda: examples("digits"), lambda: mlp(64, 64, 10)),
    "mnist": Problem(
        "MNIST, first 3,000, 784-100-10", lambda: examples("mnist", limit=3000), lambda: mlp(784, 100, 10),
        files="mnist",
    ),
    "house": Problem(
        "house prices, first 3,000, 17-32-32-1", lambda: examples("house", limit=3000), lambda: mlp(17, 32, 32, 1),
        likelihood="gaussian", files="house",
    ),
    "convolutional": Problem("digits, two convolutions with BatchNorm", lambda: examples("digits"), convolutional),
    "transformer": Problem("digits as tokens, two blocks of width 32", tokens, lambda: Transformer(17, 31)),
}  # fmt: skip
"""Name to problem."""


def natural(method: str, **options: Any) -> Make:
    """NaturalGradient with a method."""
    return lambda model, likelihood: optim.NaturalGradient(model, likelihood, method, **options)


OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda model, _: torch.optim.Adam(model.parameters()),
    "SGD": lambda model, _: torch.optim.SGD(model.parameters()),
    "KFAC": optim.KFAC,
    "KFAC tridiagonal": lambda m, l: optim.KFAC(m, l, inverse="block-tridiagonal"),
    "KFAC plain": lambda m, l: optim.KFAC(m, l, rescale=False, adapt=False),
    "EKFAC": optim.EKFAC,
    "FOOF": optim.FOOF,
    "CWNGD": optim.CWNGD,
    "TENGraD": optim.TENGraD,
    "Subsampled": optim.SubsampledNaturalGradient,
    "Subsampled layers": lambda m, l: optim.SubsampledNaturalGradient(m, l, structure="layer"),
    "KBFGS": optim.KBFGS,
    "HessianFree": optim.HessianFree,
}
"""Name to what makes it."""


def train(problem: Problem, make: Make, seed: int) -> dict[str, Any]:
    """One run.

    Args:
        problem: what is trained.
        make: makes the optimizer.
        seed: of weights and batches.

    Returns:
        "loss" and "accuracy" or "squared_error" over the training examples after the last step, "first" (the loss
        before the first), "most" (the largest mini-batch loss on the way) and "why", where it broke off.
    """
    torch.manual_seed(seed)
    model, likelihood = problem.build(), resolve(problem.likelihood)
    batches, position = Batches(*problem.data, problem.batch, seed=seed), Position()
    found: dict[str, Any] = {"first": evaluate(model, likelihood, problem.data)["loss"], "most": 0.0}
    opt = make(model, problem.likelihood)
    k = 0
    try:
        while position.epoch < EPOCHS:
            k += 1
            x, y, position = batches.take(position, k)
            losses: list[float] = []

            def closure(x: Tensor = x, y: Tensor = y, losses: list[float] = losses) -> Tensor:
                opt.zero_grad()
                loss = likelihood.nll(model(x), y).mean()
                losses.append(float(loss))
                loss.backward()
                return loss

            opt.step(closure)
            found["most"] = max(found["most"], losses[0])
    except (RuntimeError, ValueError) as error:
        return found | {"loss": math.inf, "why": f"step {k}: {error}"}
    found |= evaluate(model, likelihood, problem.data)
    if not math.isfinite(found["loss"]):
        found |= {"loss": math.inf, "why": "the loss is not finite"}
    return found
