"""Algorithm 2 of the K-FAC paper as a step rule, for whatever approximation proposes (Martens & Grosse 2015).

Proposals are re-scaled by the exact F on the mini-batch, with momentum from a 2 × 2 system (sections 6.4 and 7), λ by
Levenberg-Marquardt (6.5) and γ by greedy search (6.6). Operators without factors take λ + η = γ² as plain damping, and
those with factors do too where the proposals are damped as in equation 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.network.layers import Layer
from fisherviz.operators import SingularMatrixError
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov
from fisherviz.optim.averages import Moments
from fisherviz.optim.directions import Group, Preconditioned, Step
from fisherviz.optim.gradients import Tensors, dense
from fisherviz.optim.options import NaturalGradientOptions
from fisherviz.optim.quadratic import FisherForms, choose, combine, dot, minimise
from fisherviz.optim.rules import ModelRule, descend, require_finite

NO_CLOSURE = (
    "the loss is evaluated again to adjust λ: call step(closure) with a closure that zeroes the gradients, "
    "computes the loss, calls backward and returns it; or pass adapt=False."
)


class QuadraticModel(ModelRule[Preconditioned]):
    """δ = αΔ + μδ₀ with the α and μ that minimise the quadratic model; Δ is the approximation's proposal.

    Args:
        options: T1, T2, tau1, tau2, omega1, omega2, whether λ and γ are adapted, and what γ is chosen by.
        momentum: whether the last step δ₀ takes part.
    """

    captures = False
    words = "rescaled, λ now {:.3g}"

    def __init__(self, options: NaturalGradientOptions, momentum: bool) -> None:
        super().__init__()
        self.options, self.momentum = options, momentum
        self.factored = True
        """Whether γ damps the factors (equation 7), or γ² is added to their product (equation 6)."""
        self.omega1 = (19 / 20) ** options.T1 if options.omega1 is None else options.omega1
        self.omega2 = (19 / 20) ** (options.T2 / 2) if options.omega2 is None else options.omega2
        self.needs_closure = NO_CLOSURE if options.adapt else ""
        self.gamma = 0.0
        """γ of the proposals' damping."""
        self.update: Tensors = {}
        """δ₀."""

    def begin(self, groups: Sequence[Group], defaults: Mapping[str, Any], T: int) -> None:
        """Take λ₀ and η, and γ = √(λ₀ + η) from them."""
        if self.options.adapt and self.options.T2 % T:
            raise ValueError(f"T2 must be a multiple of T (the paper's T₃), got T2={self.options.T2} and T={T}.")
        super().begin(groups, defaults, T)
        self.gamma = math.sqrt(self.lam + self.eta)

    def due(self, k: int, T: int) -> bool:
        """Every T steps, and at the first three."""
        return k % T == 0 or k <= 3

    def knows(self, layer: Layer, moments: Moments | None) -> bool:
        """Whether the layer has run."""
        return moments is not None and (not layer.structured or layer.name in moments.positions)

    def take(self, step: Step, directions: Preconditioned) -> None:
        """Change the weights, then λ."""
        self.say_ignored(step.groups)
        batches = step.inputs
        if not step.any_inputs:
            descend(step.groups, step.state, {})
            return
        options = self.options
        for batch in batches:
            subset = choose(batch, options.tau1, step.generator)
            with _enough("tau1", options.tau1):
                step.moments.collect(*step.watcher.captures_of(subset, step.source))
        directions.update_moments(step)
        gradient = self.gradient(step, [p for layer in step.active for p in layer.parameters.values()])
        with _enough("tau2", options.tau2):
            delta = self._best(
                step, directions, gradient, [choose(batch, options.tau2, step.generator) for batch in batches]
            )
        if options.adapt and step.k == 1:
            self.say_idle(delta, self.last["quadratic"], self.omega1 ** (1 / options.T1))
        lr = self._length(step, self.last)
        before = self._objective(step.loss, step) if step.loss is not None else 0.0
        require_finite(step, delta)
        self.update = {p: lr * d for p, d in delta.items()}
        for p, d in self.update.items():
            p.add_(d)
        if options.adapt and step.k % options.T1 == 0:
            self._adjust(step, before, lr)
        descend(
            step.groups, step.state, {}, done=delta
        )  # after λ, whose ratio is that of the quadratic model's own step

    def _best(self, step: Step, directions: Preconditioned, gradient: Tensors, batches: list[Any]) -> Tensors:
        """The update δ = αΔ + μδ₀ for the best γ, by the value of the quadratic model or by h(θ + δ)."""
        forms = FisherForms(step.watcher, step.watcher.network.likelihood, batches)
        previous = {p: d for p, d in self.update.items() if p in gradient} if self.momentum else {}
        before = forms.tangents(previous) if previous else None
        candidates = [self.gamma]
        if self.options.adapt and step.k % self.options.T2 == 0:
            candidates += [self.omega2 * self.gamma, self.gamma / self.omega2]
        best: tuple[Any, ...] | None = None
        for gamma in candidates:
            rules = dict.fromkeys((layer.name for layer in step.moments.space.layers), self._rule(gamma))
            with self._floor_told():
                made = directions.damped(step, rules)
                proposal = {p: -dense(d) for p, d in directions.solve(step, made).items() if p in gradient}
            tried = [proposal, previous] if previous else [proposal]
            tangents = [forms.tangents(proposal), before] if before is not None else [forms.tangents(proposal)]
            quadratic, linear = self._model(forms, gradient, tried, tangents)
            c = minimise(quadratic, linear)
            model = float(0.5 * c @ quadratic @ c + linear @ c)
            last = {"alpha": float(c[0]), "mu": float(c[1]) if previous else 0.0, "decrease": -model,
                    "linear": float(linear @ c), "quadratic": float(c @ quadratic @ c)}  # fmt: skip
            delta = combine(list(zip(c.tolist(), tried, strict=True)))
            value = model
            if len(candidates) > 1 and self.options.gamma_by == "objective":
                value = self.reached(step, delta, self._length(step, last))
                value = math.inf if math.isnan(value) else value
            if best is None or value < best[0]:
                best = value, gamma, last, delta, rules, made
        assert best is not None
        _, self.gamma, self.last, delta, rules, made = best
        directions.keep(rules, made)
        return delta

    def _rule(self, gamma: float) -> Damping | None:
        """What γ damps the proposals' matrix by."""
        if not gamma:
            return None
        return FactoredTikhonov(gamma, self.pi) if self.factored else Tikhonov(gamma**2)

    def _length(self, step: Step, last: Mapping[str, float]) -> float:
        """What an update is multiplied by: lr, in the trust region."""
        lr = self.lr(step)
        return lr * self.region.within(lr**2 * last["quadratic"])

    @contextmanager
    def _floor_told(self) -> Iterator[None]:
        """Say how a damping that a factorisation asks for is had where λ is adapted."""
        try:
            yield
        except SingularMatrixError as error:
            if not self.options.adapt:
                raise
            raise RuntimeError(
                f"{error} Here λ = {self.lam:g} and γ = {self.gamma:g} are adapted: pass a larger min_damping, below "
                f"which λ never falls (now {self.region.min_damping:g})."
            ) from error

    def _model(
        self, forms: FisherForms, gradient: Tensors, directions: Sequence[Tensors], tangents: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """The model's Q and b over the coefficients of one or two directions."""
        n, shift = len(directions), self.lam + self.eta
        quadratic, linear = (torch.zeros(*shape, dtype=torch.float64, device="cpu") for shape in ((n, n), (n,)))
        for i in range(n):
            linear[i] = dot(gradient, directions[i])
            for j in range(i, n):
                form = forms.form(tangents[i], tangents[j]) + shift * dot(directions[i], directions[j])
                quadratic[i, j] = quadratic[j, i] = form
        return quadratic, linear

    def _objective(self, loss: Any, step: Step) -> float:
        return self.objective(loss, [p for layer in step.active for p in layer.parameters.values()])

    def _adjust(self, step: Step, before: float, lr: float) -> None:
        """λ by the reduction ratio ρ (section 6.5); the closure's gradients and side effects are undone."""
        after = self._objective(step.evaluate(), step)
        change = lr * self.last["linear"] + 0.5 * lr**2 * self.last["quadratic"]
        self.last["rho"] = rho = (after - before) / change if change < 0 else 0.0
        self.adjust(rho, self.lam * self.omega1, self.lam / self.omega1)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """λ, γ, δ₀."""
        update = {names[p]: d.clone() for p, d in self.update.items()}
        own = {"lam": self.lam, "gamma": self.gamma, "last": dict(self.last), "update": update}
        return super().state_dict(names) | {"adaptive": own}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state, parameters)
        own = state["adaptive"]
        self.lam, self.gamma, self.last = own["lam"], own["gamma"], dict(own["last"])
        self.update = {parameters[name]: d.to(parameters[name].device) for name, d in own["update"].items()}


@contextmanager
def _enough(name: str, share: float) -> Iterator[None]:
    """Tell which share of the batch was too small for BatchNorm."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"{name}={share:g} of the mini-batch is a single example, which BatchNorm in training mode cannot "
            f"normalise; raise {name} or the batch size."
        ) from error
