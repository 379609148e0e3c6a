"""Every optimizer with its defaults against Adam's and SGD's: `python -m benchmarks.defaults [NAME ...]`.

Five problems, three epochs each, seeds 0, 1, 2 of weights and batches; mean and worst training loss after the same
steps. Writes benchmarks/defaults.json and the third part of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import table
from benchmarks.running import HERE, machine
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
    for a, b in itertools.pairwise(widths):
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


def natural(method: str) -> Make:
    """NaturalGradient with a method."""
    return lambda model, likelihood: optim.NaturalGradient(model, likelihood, method)


def preset(cls: type[optim.NaturalGradient], **options: Any) -> tuple[Make, Make]:
    """A preset with its defaults, and with its paper's values."""
    return (
        lambda model, likelihood: cls(model, likelihood, **options),
        lambda model, likelihood: cls.paper(model, likelihood, **options),
    )


OPTIMIZERS: dict[str, tuple[Make, Make | None]] = {
    "Adam": (lambda model, _: torch.optim.Adam(model.parameters()), None),
    "SGD": (lambda model, _: torch.optim.SGD(model.parameters()), None),
    "KFAC": preset(optim.KFAC),
    "KFAC, tridiagonal": preset(optim.KFAC, inverse="block-tridiagonal"),
    "KFAC, plain": preset(optim.KFAC, rescale=False, adapt=False),
    "EKFAC": preset(optim.EKFAC),
    "FOOF": preset(optim.FOOF),
    "CWNGD": preset(optim.CWNGD),
    "TENGraD": preset(optim.TENGraD),
    "Subsampled": preset(optim.SubsampledNaturalGradient),
    "Subsampled, layers": preset(optim.SubsampledNaturalGradient, structure="layer"),
    "KBFGS": preset(optim.KBFGS),
    "HessianFree": preset(optim.HessianFree),
    "KSD": preset(optim.KSD),
    "NaturalGradient, diagonal": (natural("diagonal"), None),
    "NaturalGradient, foof": (natural("foof"), None),
}
"""Name to what makes it with its defaults, and with its paper's values where it has such."""


def train(problem: Problem, make: Make, seed: int) -> dict[str, Any]:
    """One run.

    Args:
        problem: what is trained.
        make: makes the optimizer.
        seed: of weights and batches.

    Returns:
        "loss" and "accuracy" or "squared_error" over the training examples after the last step, None and "why" where it
        broke off.
    """
    torch.manual_seed(seed)
    model, likelihood = problem.build(), resolve(problem.likelihood)
    batches, position = Batches(*problem.data, problem.batch, seed=seed), Position()
    opt = make(model, problem.likelihood)
    k = 0
    try:
        while position.epoch < EPOCHS:
            k += 1
            x, y, position = batches.take(position, k)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = likelihood.nll(model(x), y).mean()
                loss.backward()
                return loss

            opt.step(closure)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        return {"loss": None, "why": f"step {k}: {error}"}
    found = evaluate(model, likelihood, problem.data)
    return found if math.isfinite(found["loss"]) else {"loss": None, "why": f"the loss is {found['loss']}"}


def measure(problem: Problem, make: Make) -> dict[str, Any]:
    """All seeds' runs: "losses", the mean "score", and "why" the first broke off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [train(problem, make, seed) for seed in SEEDS]
    found: dict[str, Any] = {"losses": [run["loss"] for run in runs]}
    if why := [run["why"] for run in runs if "why" in run]:
        return found | {"why": why[0]}
    score = next(key for key in runs[0] if key != "loss")
    return found | {score: sum(run[score] for run in runs) / len(runs)}


def main() -> None:
    """Train, print each row, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PROBLEM", help=", ".join(PROBLEMS))
    parser.add_argument("--no-paper", action="store_true", help="leave the papers' values out: half the time")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(PROBLEMS)):
        parser.error(f"no problem is called {', '.join(unknown)}; they are {', '.join(PROBLEMS)}")
    torch.set_num_threads(1)
    path = HERE / "defaults.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    for name in arguments.names or PROBLEMS:
        problem = PROBLEMS[name]
        if problem.files is not None and datasets.where(problem.files) is None:
            print(f"{name}: {problem.files} is not at hand; set FISHERVIZ_DATA")
            continue
        row: dict[str, Any] = {"title": problem.title, "optimizers": {}}
        for optimizer, makes in OPTIMIZERS.items():
            made = {
                which: measure(problem, make)
                for which, make in zip(("defaults", "paper"), makes, strict=True)
                if make is not None and not (which == "paper" and arguments.no_paper)
            }
            row["optimizers"][optimizer] = made
            print(f"{name:14} {optimizer:26} {made}", flush=True)
        results["rows"][name] = row
        results["rows"] = {known: results["rows"][known] for known in PROBLEMS if known in results["rows"]}
        results["machine"] = machine()
        table.write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        table.write_readme(HERE)


if __name__ == "__main__":
    main()
