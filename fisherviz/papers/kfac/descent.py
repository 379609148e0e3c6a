"""K-FAC in batch mode on the example network of figures 2, 3, 5 and 6: what decides a run, and the run.

Martens & Grosse 2015, caption of figure 2: 256-20-20-20-20-20-10, tanh, 16 × 16 digits, 7 iterations to 5 % error and
22 to 0 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz import datasets, models
from fisherviz.optim import KFAC
from fisherviz.papers.trials.problems import TITLES, at_hand
from fisherviz.papers.trials.states import State, kept_state
from fisherviz.papers.trials.work import Run

LAMBDAS = (1e-3, 1e-2, 1e-4, 0.1, 1.0)
"""λ₀ in the order that they are tried; the paper's 150 is its autoencoders'."""
SMOKE_LAMBDAS = (1e-3, 0.1)
ETA = 1e-5
T2 = 20  # the paper's iterations between two searches for γ
OMEGA2 = (19 / 20) ** (T2 / 2)
_load = lru_cache(maxsize=1)(datasets.load)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides one run.

    Args:
        data: name of the data set.
        limit: training examples; None: all.
        width: units of each of the five hidden layers.
        init: "xavier" or "sparse".
        seed: of the weights and of the labels that K-FAC samples.
        start: λ₀.
        error: share of wrong training examples at which the run stops.
        most: iterations at which it stops in any case.
    """

    data: str
    limit: int | None
    width: int
    init: str
    seed: int
    start: float
    error: float
    most: int

    def load(self, run: Run) -> datasets.Dataset:
        """The data set, of 16 × 16 images."""
        return _load(self.data, size=16, limit=self.limit, progress=run.progress).to(run.device)

    def build(self, run: Run) -> nn.Sequential:
        """The network with the seed's weights."""
        data = self.load(run)
        model = models.build("kfac-mlp", seed=self.seed, dataset=data, hidden=(self.width,) * 5, init=self.init)
        return model.to(run.device)

    @property
    def departures(self) -> tuple[str, ...]:
        """Where its data and sizes are not the paper's, which matters to every claim."""
        found = [] if self.data == "mnist" else [f"{TITLES[self.data]} instead of MNIST"]
        return tuple([*found, "a smaller network"] if self.width != 20 else found)

    def what(self, run: Run) -> dict[str, Any]:
        """Its name among the measurements."""
        return {"kfac in batch mode": asdict(self), "device": run.device}


def recipe(run: Run, init: str = "xavier") -> Recipe:
    """The paper's setting as a scale has it, to 5 % error: "smoke" is a small network on 300 digits, to 50 %.

    Args:
        run: scale and first seed.
        init: how the weights begin.
    """
    if run.scale == "smoke":
        return Recipe("digits", 300, 6, init, run.seed, LAMBDAS[0], 0.5, 60)
    name = "mnist" if at_hand("mnist", run) else "digits"
    return Recipe(name, None, 20, init, run.seed, LAMBDAS[0], 0.05, 60)


def descend(one: Recipe, run: Run) -> dict[str, Any]:
    """A run, or what is kept of it.

    Args:
        one: which.
        run: device, and where it is kept.

    Returns:
        "errors" (share of wrong training examples after each iteration), and "gamma" of the last iteration.
    """
    return kept_state(one.what(run), lambda: _descent(one, run), run)[0]


def arrive(one: Recipe, run: Run) -> nn.Sequential:
    """The network at the end of a run."""
    _, state = kept_state(one.what(run), lambda: _descent(one, run), run)
    model = one.build(run)
    model.load_state_dict(state["model"])
    return model


def iterations(found: dict[str, Any], error: float) -> float:
    """Iterations of a run until few enough examples were wrong; infinite if it stopped before."""
    return next((k for k, wrong in enumerate(found["errors"], 1) if wrong <= error), math.inf)


def tried(one: Recipe, lambdas: Sequence[float], run: Run) -> dict[Recipe, float]:
    """Iterations from each λ₀ to the recipe's error; a trial stops where the best before it arrived.

    Args:
        one: the setting.
        lambdas: λ₀, in the order of trial.
        run: how.

    Returns:
        The trials' recipes and their iterations, infinite where a trial was stopped before.

    Raises:
        RuntimeError: no λ₀ leads there.
    """
    found: dict[Recipe, float] = {}
    for start in lambdas:
        trial = replace(one, start=start, most=int(min([one.most, *found.values()])))
        found[trial] = iterations(descend(trial, run), one.error)
    if all(math.isinf(taken) for taken in found.values()):
        raise RuntimeError(f"K-FAC does not reach {one.error:.0%} error in {one.most} iterations from any λ₀ tried.")
    return found


def taken_words(found: Mapping[Recipe, float]) -> str:
    """How many iterations the trials took, in words."""
    return ", ".join(
        f"{taken:.0f} from λ₀ = {one.start:g}" if taken < math.inf else f"more than {one.most} from λ₀ = {one.start:g}"
        for one, taken in found.items()
    )


def _descent(one: Recipe, run: Run) -> tuple[dict[str, Any], State]:
    model = one.build(run)
    found = train_by_kfac(model, *one.load(run).train, one.error, one.start, one.seed, one.most)
    return found, {"model": {name: value.cpu() for name, value in model.state_dict().items()}}


def train_by_kfac(
    model: nn.Sequential, inputs: Tensor, targets: Tensor, error: float, start: float, seed: int, most: int
) -> dict[str, Any]:
    """Train by the complete K-FAC on all examples at once, until few enough are wrong.

    Args:
        model: the network, trained in place.
        inputs: (N, ...).
        targets: (N,) labels.
        error: share of wrong examples to reach.
        start: λ₀.
        seed: of the labels that K-FAC samples.
        most: iterations at most.

    Returns:
        "errors" after each iteration, and "gamma" of the last.
    """
    model.train()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        optimizer = KFAC.paper(
            model, "categorical", inverse="block-tridiagonal", damping=start, weight_decay=ETA, tau1=1.0, tau2=1.0,
            T2=T2,
        )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    errors: list[float] = []
    while len(errors) < most and min(errors, default=1.0) > error:
        optimizer.step(closure)
        with torch.no_grad():
            errors.append(float((model(inputs).argmax(1) != targets).double().mean()))
    return {"errors": errors, "gamma": optimizer.gamma}
