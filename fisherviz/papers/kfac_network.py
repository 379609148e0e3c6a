"""The example network of the K-FAC paper's figures 2, 3, 5 and 6, and the damping that K-FAC would use on it.

Martens & Grosse 2015, caption of figure 2: 256-20-20-20-20-20-10, tanh, 16 × 16 digits, trained to 5 % error;
F over the training examples, its middle four layers jointly, in vec(W̄) order. Damping: sections 6.3 to 6.6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisherviz import datasets, models
from fisherviz.approximations import Approximation, approximate
from fisherviz.exact.fisher import Fisher
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.operators.factorise import cholesky, symmetric
from fisherviz.papers.claims import Claim, Outcome
from fisherviz.papers.registry import Run
from fisherviz.papers.training import TITLES
from fisherviz.probe import Probe

ERROR = 0.05  # share of wrong training examples in figure 2
LAMBDA_0 = 150.0  # section 6.5
OMEGA_1 = (19 / 20) ** 5  # section 6.5, T₁ = 5
OMEGA_2 = math.sqrt(19 / 20) ** 20  # section 6.6, T₂ = 20
ETA = 1e-5  # section 13, weight of the ℓ₂ regularisation
MIDDLE = ("layer2", "layer3", "layer4", "layer5")
BATCH = 5000
SMOKE_EXAMPLES, SMOKE_WIDTH, SMOKE_ERROR = 300, 6, 0.5


@dataclass(frozen=True, eq=False)
class KFACNetwork:
    """The trained network with its exact Fisher over the middle four layers, all in float64.

    Args:
        model: the network.
        data: name of the data set.
        batches: the training examples, in batches.
        width: units in each hidden layer.
        steps: optimizer steps that the training took.
        error: share of wrong training examples afterwards.
    """

    model: nn.Sequential
    data: str
    batches: tuple[tuple[Tensor, Tensor], ...]
    width: int
    steps: int
    error: float
    progress: bool = False

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return sum(len(inputs) for inputs, _ in self.batches)

    def outcome(self, claims: tuple[Claim, ...], caption: str, picture: bytes | None = None) -> Outcome:
        """An exhibit on this network, with its setting in words."""
        widths = [layer.in_features for layer in self.model if isinstance(layer, nn.Linear)]
        sizes = "-".join(str(width) for width in [*widths, 10])
        setting = f"{self.data} 16 × 16, {sizes}, Adam"
        details = (
            f"{self.data} scaled to 16 × 16, all {self.examples:,} training examples; tanh network {sizes} "
            f"with Glorot's initialisation (the paper does not say which), trained by full-batch Adam in "
            f"{self.steps} steps to {self.error:.2%} error (the paper: 7 iterations of batch K-FAC, 5 %)"
        )
        return Outcome(claims, setting, details, caption, picture)

    @property
    def other_data(self) -> tuple[str, ...]:
        """The departure from the paper's data and sizes, if there is one; it matters to every claim."""
        found = [] if self.data == "MNIST" else [f"{self.data} instead of MNIST"]
        return tuple([*found, "a smaller network"] if self.width != 20 else found)

    @property
    def other_training(self) -> tuple[str, ...]:
        """The departures that matter to absolute numbers besides: they depend on where training stood."""
        return (*self.other_data, "Adam instead of K-FAC, initial weights unknown")

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

    @cached_property
    def damping(self) -> KFACDamping:
        """λ and γ that K-FAC's own rules settle at on these weights."""
        return settled_damping(self)


@lru_cache(maxsize=1)
def kfac_network(run: Run) -> KFACNetwork:
    """Train the network; several figures of one run share it.

    MNIST where its files are at hand ("paper" insists on it), the embedded digits otherwise; "smoke" is a
    network with six units per layer on 300 digits, trained until half of them are right.

    Args:
        run: scale, seed and device.

    Returns:
        The network.

    Raises:
        RuntimeError: the error is not reached, or MNIST is nowhere at scale "paper".
    """
    smoke = run.scale == "smoke"
    at_hand = run.scale == "paper" or datasets.where("mnist") is not None
    name = "mnist" if at_hand and not smoke else "digits"
    limit, width, error = (SMOKE_EXAMPLES, SMOKE_WIDTH, SMOKE_ERROR) if smoke else (None, 20, ERROR)
    data = datasets.load(name, size=16, limit=limit, progress=run.progress).to(run.device)
    model = models.build("kfac-mlp", seed=run.seed, dataset=data, hidden=(width,) * 5).to(run.device)
    history = models.train_to_error(model, *data.train, error=error, seed=run.seed, progress=run.progress)
    inputs, targets = data.train.inputs.double(), data.train.targets
    batches = tuple(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    steps, reached = history["steps"], history["error"][-1]
    return KFACNetwork(model.double().eval(), TITLES[name], batches, width, steps, reached, run.progress)


@dataclass(frozen=True)
class KFACDamping:
    """Where K-FAC's rules for λ (section 6.5) and γ (section 6.6) come to rest on fixed weights.

    Args:
        lam: λ.
        gamma: γ.
        ratio: the reduction ratio ρ there.
    """

    lam: float
    gamma: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"γ = {self.gamma:.2g}, where K-FAC's rules rest on these weights (λ from {LAMBDA_0:g} to "
            f"{self.lam:.2g}, ρ = {self.ratio:.2f})"
        )

    def others(self) -> tuple[float, ...]:
        """Ten and a hundred times γ, and where K-FAC starts (√λ₀): for sensitivity."""
        return (10 * self.gamma, 100 * self.gamma, math.sqrt(LAMBDA_0))


def settled_damping(network: KFACNetwork) -> KFACDamping:
    """Apply K-FAC's rules for γ and λ in turn, on the whole network with its weights held, until they rest.

    From λ = 150 and γ = √(λ + η): γ becomes the best of γ, ω₂γ and γ/ω₂ by M(αΔ) at the optimal α; λ becomes
    ω₁λ while ρ > 3/4 and λ > η, below which it no longer matters (sections 6.4 to 6.6, without momentum, Δ by
    the block-tridiagonal inverse, F exact). The paper does not print the γ of its figures; this rule finds
    one without a choice of ours.

    Args:
        network: the trained network.

    Returns:
        The damping.
    """
    fisher = network.over(None)
    approximation = approximate(fisher, "kfac-tridiagonal")
    parameters = dict(network.model.named_parameters())
    theta = fisher.space.flatten({name: p.detach() for name, p in parameters.items()})
    gradient = fisher.gradient() + ETA * theta
    here = _objective(network, fisher, theta)

    @cache
    def proposal(power: int) -> tuple[Tensor, float, float, float]:
        """Δ for γ = √(λ₀ + η) ω₂^power with ∇hᵀΔ, ΔᵀFΔ and ‖Δ‖²."""
        gamma = math.sqrt(LAMBDA_0 + ETA) * OMEGA_2**power
        step = -approximation.solve(gradient, FactoredTikhonov(gamma))
        return step, float(gradient @ step), fisher.quadratic(step), float(step @ step)

    def model_value(power: int, lam: float) -> float:
        """M(αΔ) - M(0) at the optimal α: -(∇hᵀΔ)² / 2(ΔᵀFΔ + (λ+η)‖Δ‖²)."""
        _, slope, curved, square = proposal(power)
        return -(slope**2) / (2 * (curved + (lam + ETA) * square))

    lam, power = LAMBDA_0, 0
    while True:  # λ only falls, and for one λ each change of γ lowers M: this ends
        best = min((power, power - 1, power + 1), key=lambda candidate: model_value(candidate, lam))
        step, slope, curved, square = proposal(best)
        alpha = -slope / (curved + (lam + ETA) * square)
        ratio = (_objective(network, fisher, theta + alpha * step) - here) / model_value(best, lam)
        trusted = ratio > 0.75 and lam > ETA
        if best == power and not trusted:
            return KFACDamping(lam, math.sqrt(LAMBDA_0 + ETA) * OMEGA_2**power, ratio)
        power = best
        if trusted:
            lam *= OMEGA_1


@torch.no_grad()
def _objective(network: KFACNetwork, fisher: Fisher, theta: Tensor) -> float:
    """h(θ): mean negative log-likelihood of the training examples plus η/2 ‖θ‖²."""
    parameters = fisher.space.unflatten(theta)
    total = 0.0
    for inputs, targets in network.batches:
        logits = functional_call(network.model, parameters, (inputs,))
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / network.examples + ETA / 2 * float(theta @ theta)
