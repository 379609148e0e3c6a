"""The example network of the K-FAC paper's figures 2, 3, 5 and 6, trained by K-FAC in batch mode as theirs was.

Martens & Grosse 2015, caption of figure 2: 256-20-20-20-20-20-10, tanh, 16 × 16 digits, trained to 5 % error;
F over the training examples, its middle four layers jointly, in vec(W̄) order; γ as K-FAC had it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz import datasets, models
from fisherviz.approximations import Approximation, approximate
from fisherviz.exact.fisher import Fisher
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.operators.factorise import cholesky, symmetric
from fisherviz.optim import KFAC
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.trials.problems import TITLES
from fisherviz.papers.trials.work import Run, kept
from fisherviz.probe import Probe

ERROR = 0.05  # share of wrong training examples in figure 2
LAMBDAS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""λ₀ that are tried: the paper's 150 is its autoencoders'."""
MOST = 60  # iterations of a trial; the paper took 7
SEEDS = 3
MIDDLE = ("layer2", "layer3", "layer4", "layer5")
BATCH = 5000
SMOKE_EXAMPLES, SMOKE_WIDTH, SMOKE_ERROR, SMOKE_LAMBDAS, SMOKE_SEEDS = 300, 6, 0.5, (0.1,), 2


@dataclass(frozen=True, eq=False)
class KFACNetwork:
    """The trained network with its exact Fisher over the middle four layers, all in float64.

    Args:
        model: the network.
        data: name of the data set.
        batches: the training examples, in batches.
        width: units in each hidden layer.
        seed: of its initial weights.
        start: λ₀.
        iterations: of K-FAC, that the training took.
        error: share of wrong training examples afterwards.
        gamma: γ of the last iteration.
        progress: whether long work shows bars.
    """

    model: nn.Sequential
    data: str
    batches: tuple[tuple[Tensor, Tensor], ...]
    width: int
    seed: int
    start: float
    iterations: int
    error: float
    gamma: float
    progress: bool = False

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return sum(len(inputs) for inputs, _ in self.batches)

    @property
    def other_data(self) -> tuple[str, ...]:
        """The departure from the paper's data and sizes, if there is one; it matters to every claim."""
        found = [] if self.data == "MNIST" else [f"{self.data} instead of MNIST"]
        return tuple([*found, "a smaller network"] if self.width != 20 else found)

    def over(self, layers: tuple[str, ...] | None) -> Fisher:
        """The exact Fisher of some layers over the training examples, or of all."""
        return Probe(self.model, "categorical", layers=layers).fisher(list(self.batches))

    @cached_property
    def fisher(self) -> Fisher:
        """F of the middle four layers."""
        return self.over(MIDDLE)

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

    def gammas(self) -> tuple[float, ...]:
        """A tenth of γ and ten times it: for sensitivity."""
        return (self.gamma / 10, self.gamma * 10)


@dataclass(frozen=True, eq=False)
class Networks:
    """The network from several initial weights; pictures are of the first, rules are for all.

    Args:
        nets: the networks.
        tried: λ₀ that the first was trained from.
    """

    nets: tuple[KFACNetwork, ...]
    tried: tuple[float, ...]

    @property
    def first(self) -> KFACNetwork:
        """The one that is drawn."""
        return self.nets[0]

    def outcome(self, claims: tuple[Claim, ...], caption: str, picture: bytes | None = None) -> Outcome:
        """An exhibit on the networks, with their setting in words."""
        net = self.first
        widths = [layer.in_features for layer in net.model if isinstance(layer, nn.Linear)]
        sizes = "-".join(str(width) for width in [*widths, 10])
        runs = "; ".join(
            f"seed {n.seed}: {n.iterations} iterations to {n.error:.2%} error, γ = {n.gamma:.2g}" for n in self.nets
        )
        details = (
            f"{net.data} scaled to 16 × 16, all {net.examples:,} training examples; tanh network {sizes} with Glorot's "
            f"initialisation (the paper does not say which), trained by the complete K-FAC in batch mode (block-"
            f"tridiagonal, η = 1e-05, τ₁ = τ₂ = 1) from λ₀ = {net.start:g}, with which seed {net.seed} takes the "
            f"fewest iterations of {', '.join(f'{lam:g}' for lam in self.tried)} (the paper: 7 iterations to 5 %, "
            f"λ₀ not given); {runs}; pictures and first numbers are of seed {net.seed}"
        )
        return Outcome(claims, f"{net.data} 16 × 16, {sizes}, K-FAC, {len(self.nets)} seeds", details, caption, picture)


@lru_cache(maxsize=1)
def kfac_networks(run: Run) -> Networks:
    """Train the networks; several figures of one run share them.

    MNIST where its files are at hand ("paper" insists on it), the embedded digits otherwise; "smoke" is a
    network with six units per layer on 300 digits, trained until half of them are right.

    Args:
        run: scale, first seed and device.

    Returns:
        The networks.

    Raises:
        RuntimeError: the error is not reached, or MNIST is nowhere at scale "paper".
    """
    smoke = run.scale == "smoke"
    at_hand = run.scale == "paper" or datasets.where("mnist") is not None
    name = "mnist" if at_hand and not smoke else "digits"
    limit, width = (SMOKE_EXAMPLES, SMOKE_WIDTH) if smoke else (None, 20)
    data = datasets.load(name, size=16, limit=limit, progress=run.progress).to(run.device)
    error, seeds = (SMOKE_ERROR, SMOKE_SEEDS) if smoke else (ERROR, SEEDS)
    lambdas = SMOKE_LAMBDAS if smoke else LAMBDAS

    def trained(seed: int, start: float) -> tuple[nn.Sequential, dict[str, Any]]:
        model = models.build("kfac-mlp", seed=seed, dataset=data, hidden=(width,) * 5).to(run.device)
        return model, train_by_kfac(model, *data.train, error, start, seed)

    def takes(start: float) -> float:
        what = {"kfac network": name, "limit": limit, "width": width, "error": error, "seed": run.seed, "start": start}
        found = kept({**what, "device": run.device}, lambda: trained(run.seed, start)[1], run)
        return found["iterations"] if found["error"] <= error else math.inf

    start = min(lambdas, key=takes)
    inputs, targets = data.train.inputs.double(), data.train.targets
    batches = tuple(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    nets = []
    for seed in range(run.seed, run.seed + seeds):
        model, found = trained(seed, start)
        if found["error"] > error:
            raise RuntimeError(f"K-FAC does not reach {error:.0%} error in {MOST} iterations from λ₀ = {start:g}.")
        model = model.double().eval()
        nets.append(KFACNetwork(model, TITLES[name], batches, width, seed, start, **found, progress=run.progress))
    return Networks(tuple(nets), lambdas)


def train_by_kfac(
    model: nn.Sequential, inputs: Tensor, targets: Tensor, error: float, start: float, seed: int
) -> dict[str, Any]:
    """Train by the complete K-FAC on all examples at once, until few enough are wrong or `MOST` iterations are made.

    Args:
        model: the network, trained in place.
        inputs: (N, ...).
        targets: (N,) labels.
        error: share of wrong examples to reach.
        start: λ₀.
        seed: of the labels that K-FAC samples.

    Returns:
        "iterations", "error" that was reached, and "gamma" of the last iteration.
    """
    model.train()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        optimizer = KFAC.paper(
            model, "categorical", inverse="block-tridiagonal", damping=start, weight_decay=1e-5, tau1=1.0, tau2=1.0
        )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    wrong, iterations = 1.0, 0
    while wrong > error and iterations < MOST:
        optimizer.step(closure)
        iterations += 1
        with torch.no_grad():
            wrong = float((model(inputs).argmax(1) != targets).double().mean())
    return {"iterations": iterations, "error": wrong, "gamma": optimizer.gamma}
