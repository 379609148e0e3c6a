"""The example network of the K-FAC paper's figures 2, 3, 5 and 6, trained by K-FAC in batch mode as theirs was.

F is over the training examples, of the middle four layers jointly, in vec(W̄) order, in float64; γ is the one that K-FAC
had when it came to the weights. What is measured of the matrices is kept, one measurement for each network and γ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation, approximate
from fisherviz.exact.fisher import Fisher
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.operators.factorise import cholesky, symmetric
from fisherviz.papers.kfac.descent import (
    LAMBDAS,
    OMEGA2,
    SMOKE_LAMBDAS,
    Recipe,
    arrive,
    descend,
    recipe,
    taken_words,
    tried,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.trials.problems import TITLES
from fisherviz.papers.trials.work import Run, kept
from fisherviz.probe import Probe

SEEDS, SMOKE_SEEDS = 3, 2
MIDDLE = ("layer2", "layer3", "layer4", "layer5")
BATCH = 5000
NEAR = (OMEGA2, 1.0, 1 / OMEGA2)
"""Multiples of K-FAC's own γ between which its next search would choose (section 6.6)."""
FAR = (0.1, 10.0)
"""Multiples that are shown beside, outside the rules."""


@dataclass(frozen=True, eq=False)
class KFACNetwork:
    """The trained network with its exact Fisher over the middle four layers, all in float64.

    Args:
        recipe: how it was trained.
        run: where.
        errors: share of wrong training examples after each iteration of K-FAC.
        gamma: γ of the last iteration.
    """

    recipe: Recipe
    run: Run
    errors: tuple[float, ...]
    gamma: float

    @cached_property
    def model(self) -> nn.Sequential:
        """The network."""
        return arrive(self.recipe, self.run).double().eval()

    @property
    def data(self) -> str:
        """What the data set is called in sentences."""
        return TITLES[self.recipe.data]

    @cached_property
    def batches(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The training examples, in batches."""
        inputs, targets = self.recipe.load(self.run).train
        return tuple(zip(inputs.double().split(BATCH), targets.split(BATCH), strict=True))

    @cached_property
    def fisher(self) -> Fisher:
        """F of the middle four layers."""
        return Probe(self.model, "categorical", layers=MIDDLE).fisher(list(self.batches))

    @cached_property
    def exact(self) -> Tensor:
        """F dense, (P, P), in input order."""
        return self.fisher.to_dense("input")

    @cached_property
    def approximations(self) -> Mapping[str, Approximation]:
        """F̃ ("kfac-full"), F̌ ("kfac") and F̂ ("kfac-tridiagonal")."""
        return {name: approximate(self.fisher, name) for name in ("kfac-full", "kfac", "kfac-tridiagonal")}

    def dense(self, name: str) -> Tensor:
        """An approximation undamped, (P, P), in input order."""
        return self.approximations[name].to_dense("input")

    def inverse(self, name: str, gamma: float) -> Tensor:
        """An approximation's inverse under factored Tikhonov damping, (P, P), in input order."""
        return self.approximations[name].inverse(FactoredTikhonov(gamma)).to_dense("input")

    def damped(self, name: str, gamma: float) -> Tensor:
        """An approximation under factored Tikhonov damping, (P, P), in input order."""
        return self.approximations[name].damped(FactoredTikhonov(gamma)).to_dense("input")

    def exact_inverse(self, gamma: float) -> Tensor:
        """(F + D)⁻¹ with the D that factored damping adds to F̃; F itself has no factors to damp."""
        added = self.damped("kfac-full", gamma) - self.dense("kfac-full")
        return torch.cholesky_inverse(cholesky(symmetric(self.exact + added), "the damped Fisher"))

    @property
    def edges(self) -> list[int]:
        """Boundaries of the layers, from 0 to P."""
        return list(self.fisher.space.offsets)


Measured = dict[str, float]


@dataclass(frozen=True, eq=False)
class Networks:
    """The network from several initial weights; pictures are of the first, rules are for all.

    Args:
        nets: the networks.
        tried: the trials of λ₀ with the first one's weights.
        run: the exhibit's.
    """

    nets: tuple[KFACNetwork, ...]
    tried: Mapping[Recipe, float]
    run: Run

    @property
    def first(self) -> KFACNetwork:
        """The one that is drawn."""
        return self.nets[0]

    def measured(self, measure: Callable[[KFACNetwork], Measured]) -> dict[str, list[float]]:
        """What a function finds of each network, by name, or what is kept of it."""
        return _listed([self._kept(measure, net, {}, partial(measure, net)) for net in self.nets])

    def damped(self, measure: Callable[[KFACNetwork, float], Measured], factor: float = 1.0) -> dict[str, list[float]]:
        """The same of a function of the damping too, at a multiple of each network's own γ."""
        found = []
        for net in self.nets:
            gamma = factor * net.gamma
            found.append(self._kept(measure, net, {"gamma": gamma}, partial(measure, net, gamma)))
        return _listed(found)

    def _kept(self, measure: Any, net: KFACNetwork, more: Measured, call: Callable[[], Measured]) -> dict[str, Any]:
        what = {"kfac matrices": measure.__name__, **net.recipe.what(self.run), **more}
        return kept(what, lambda: {"values": call()}, self.run)["values"]

    def outcome(self, claims: tuple[Claim, ...], caption: str, picture: bytes | None = None) -> Outcome:
        """An exhibit on the networks, with their setting in words."""
        net = self.first
        data = net.recipe.load(self.run)
        sizes = "-".join(map(str, [data.inputs, *(net.recipe.width,) * 5, data.outputs]))
        runs = "; ".join(
            f"seed {n.recipe.seed}: {len(n.errors)} iterations to {n.errors[-1]:.2%} error, γ = {n.gamma:.2g}"
            for n in self.nets
        )
        details = (
            f"{net.data} scaled to 16 × 16, all {len(data.train.inputs):,} training examples; tanh network {sizes} "
            f"with Glorot's initialisation (the paper does not say which), trained by the complete K-FAC in batch mode "
            f"(block-tridiagonal, η = 1e-05, τ₁ = τ₂ = 1) from λ₀ = {net.recipe.start:g}, with which seed "
            f"{net.recipe.seed} takes the fewest iterations ({taken_words(self.tried)}; the paper: 7, λ₀ not given); "
            f"{runs}; pictures and first numbers are of seed {net.recipe.seed}"
        )
        return Outcome(claims, f"{net.data} 16 × 16, {sizes}, K-FAC, {len(self.nets)} seeds", details, caption, picture)


def _listed(found: list[Measured]) -> dict[str, list[float]]:
    return {name: [each[name] for each in found] for name in found[0]}


@lru_cache(maxsize=SEEDS)
def _network(one: Recipe, run: Run) -> KFACNetwork:
    """A network, which the exhibits of one command share: its matrices are made once."""
    found = descend(one, run)
    return KFACNetwork(one, run, tuple(found["errors"]), found["gamma"])


def kfac_networks(run: Run) -> Networks:
    """Train the networks, or take those that are kept.

    Args:
        run: scale, first seed and device.

    Returns:
        The networks.

    Raises:
        RuntimeError: the error is not reached, or MNIST is nowhere at scale "paper".
    """
    setting, smoke = recipe(run), run.scale == "smoke"
    trials = tried(setting, SMOKE_LAMBDAS if smoke else LAMBDAS, run)
    best = min(trials, key=trials.__getitem__)
    seeds = range(run.seed + 1, run.seed + (SMOKE_SEEDS if smoke else SEEDS))
    recipes = [best, *(replace(setting, start=best.start, seed=seed) for seed in seeds)]
    for one in recipes:
        errors = descend(one, run)["errors"]  # which notes that this exhibit used it
        if errors[-1] > one.error:
            raise RuntimeError(
                f"K-FAC does not reach {one.error:.0%} error in {one.most} iterations from λ₀ = {one.start:g}."
            )
    return Networks(tuple(_network(one, run) for one in recipes), trials, run)
