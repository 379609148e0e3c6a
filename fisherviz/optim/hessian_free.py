"""Hessian-free optimization: conjugate gradients on the mini-batch's exact F + (λ + η)I, by products alone.

Martens 2010: truncation by relative progress, start from the decayed last solution, backtracking over the
iterates, λ by Levenberg-Marquardt. Any approximation preconditions (K-FAC paper, section 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim.by_products import ByProducts, Products, ProductsRule, shifted
from fisherviz.optim.directions import Step
from fisherviz.optim.gradients import Tensors
from fisherviz.optim.options import MODEL, require_known
from fisherviz.optim.quadratic import FisherForms, combine, dot
from fisherviz.optim.rules import descend, require_finite
from fisherviz.support import choices, timing

SPACING = 1.3
"""Ratio of the iterations at which conjugate gradients leave an iterate for the backtracking."""


LOWER = 2 / 3
"""Factor of λ after a step that the model foresaw well."""
_TIE = 16.0
"""Units of rounding within which two objectives are equal."""
_SEARCH = 30
"""Shortenings of a step before it is given up."""
Iterate = tuple[int, Tensors, float]
"""Iteration, solution, and M there less M(0)."""


class ConjugateGradients(Products):
    """Solutions of (F + shift I) x = −∇h by products with the exact F, from the decayed last solution.

    Args:
        iterations: at most.
        preconditioned: whether the approximation preconditions.
        tolerance: ε of the truncation.
        carry: factor on the last solution.
    """

    def __init__(self, iterations: int, preconditioned: bool, tolerance: float = 5e-4, carry: float = 0.95) -> None:
        super().__init__(preconditioned)
        choices.count("iterations", iterations)
        choices.number("tolerance", tolerance, 0.0)
        choices.number("carry", carry, 0.0, 1.0)
        self.iterations, self.tolerance, self.carry = iterations, tolerance, carry

    def iterates(self, step: Step, gradient: Tensors, shift: float) -> list[Iterate]:
        """Iterates towards the minimum of the quadratic model, the last one last."""
        forms = FisherForms(step.watcher, step.watcher.network.likelihood, step.inputs)
        product = shifted(forms.product, shift)
        found = self.conjugate_gradients(product, gradient, self.preconditioning(step, shift))
        self.start = found[-1][1]
        return found

    @timing.part("inversion")
    def conjugate_gradients(
        self,
        product: Callable[[Tensors], Tensors],
        gradient: Tensors,
        precondition: Callable[[Tensors], Tensors],
    ) -> list[Iterate]:
        """Iterates of the minimisation of M, at geometrically spaced iterations; the last one last."""
        zero = {p: torch.zeros_like(g) for p, g in gradient.items()}
        x = {p: self.carry * self.start[p] if p in self.start else z for p, z in zero.items()}
        r = combine([(-1.0, gradient), (-1.0, product(x))])
        z = precondition(r)
        d, rz = dict(z), dot(r, z)
        phi = [0.5 * (dot(x, gradient) - dot(x, r))]
        kept: list[Iterate] = []
        mark = 1.0
        for k in range(1, self.iterations + 1):
            Bd = product(d)
            curvature = dot(d, Bd)
            if not curvature > 0 or not rz > 0:
                break
            x = combine([(1.0, x), (rz / curvature, d)])
            r = combine([(1.0, r), (-rz / curvature, Bd)])
            phi.append(0.5 * (dot(x, gradient) - dot(x, r)))
            window = max(10, k // 10)
            stop = k > window and phi[-1] < 0 and (phi[-1] - phi[-1 - window]) / phi[-1] < window * self.tolerance
            if k >= mark or stop or k == self.iterations:
                kept.append((k, x, phi[-1]))
                mark = max(k + 1.0, mark * SPACING)
            if stop:
                break
            z = precondition(r)
            rz, old = dot(r, z), rz
            d = combine([(1.0, z), (rz / old, d)])
        if not kept:
            kept.append((0, x, phi[-1]))
        return kept


class LineSearch(ProductsRule[ConjugateGradients]):
    """Backtracking over the iterates, then Armijo along the chosen one; λ by Levenberg-Marquardt."""

    needs_closure = "Hessian-free optimization evaluates the loss along its path: call step(closure)."
    words = "λ now {:.3g}"

    def take(self, step: Step, directions: ConjugateGradients) -> None:
        """Change the weights, then λ."""
        self.say_ignored(step.groups)
        if not step.any_inputs:
            descend(step.groups, step.state, {})
            return
        # F has no need of structure: layers that an approximation would leave out are solved for as well
        parameters = [p for layer in step.watcher.layers for p in layer.parameters.values() if p.grad is not None]
        gradient = self.gradient(step, parameters)
        iterates = directions.iterates(step, gradient, self.lam + self.eta)
        h = self.objective(step.loss, parameters)
        (k, delta, model_change), value = self._backtrack(step, iterates)
        require_finite(step, delta)
        rho = (value - h) / model_change if model_change < 0 else 0.0
        length, slope = self.lr(step), dot(gradient, delta)
        form = 2 * (model_change - slope)  # M = ½ δᵀ(F + λ + η)δ + ∇hᵀδ
        if step.k == 1:
            self.say_idle(delta, form, LOWER)
        length *= self.region.within(length**2 * form)
        after = value if length == 1 else self.reached(step, delta, length)
        for _ in range(_SEARCH):  # Armijo along the chosen iterate
            if after <= h + 1e-2 * length * slope:
                break
            length *= 0.8
            after = self.reached(step, delta, length)
        else:
            length, after = 0.0, h
        for p, d in delta.items():
            p.add_(d, alpha=length)
        self.adjust(rho, self.lam * LOWER, self.lam * (3 / 2))
        self.last = {
            "iterations": float(iterates[-1][0]), "chosen": float(k), "decrease": h - after, "rho": rho, "step": length,
        }  # fmt: skip
        descend(step.groups, step.state, {}, done=gradient)

    def _backtrack(self, step: Step, iterates: list[Iterate]) -> tuple[Iterate, float]:
        """The latest iterate before which the objective no longer falls, and the objective there.

        Iterates of a solve that has converged are equal up to rounding, which must not decide whether it goes on.
        """
        best, value = iterates[-1], self.reached(step, iterates[-1][1], 1.0)
        tie = _TIE * max(torch.finfo(d.dtype).eps for d in best[1].values())
        for candidate in reversed(iterates[:-1]):
            earlier = self.reached(step, candidate[1], 1.0)
            if math.isfinite(value) and not earlier < value - tie * abs(value):
                break
            best, value = candidate, earlier
        return best, value


class HessianFreeKeywords(TypedDict, total=False):
    """Rare options of `HessianFree`."""

    tolerance: float
    carry: float
    kl_clip: float
    min_damping: float


class HessianFree(ByProducts):
    """Hessian-free optimization with the Fisher (Martens 2010; K-FAC paper, section 6.4).

    The bounds of κ and λ are for mini-batches, whose model a solve fits too well; `HessianFree.paper` has none.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`; the criterion is its mean nll.
        params: parameter groups, None for all.
        lr: longest step along the chosen iterate.
        damping: λ₀.
        weight_decay: η, part of the quadratic model.
        preconditioner: name or class of an approximation whose damped inverse preconditions; None: none.
        iterations: most conjugate-gradient iterations.
        tolerance: ε of the truncation: progress over max(10, k/10) iterations below kε of the decrease so
            far.
        kind: of the preconditioner's statistics; the products are with the exact F.
        decay: of the preconditioner's statistics.
        carry: factor on the last solution where the next iteration starts.
        kl_clip: κ, as for `NaturalGradient`; the step is shortened before Armijo's search.
        min_damping: what λ never falls below.
        output: picks the output tensor from what the model returns.
    """

    Options: ClassVar[type] = HessianFreeKeywords
    PAPER: ClassVar[Mapping[str, Any]] = {"kl_clip": math.inf, "min_damping": 0.0}

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        params: Iterable[Any] | None = None,
        lr: float = 1.0,
        damping: float = 1.0,
        weight_decay: float = 0.0,
        preconditioner: str | type[Approximation] | None = None,
        iterations: int = 50,
        kind: str = "mc",
        decay: float = 0.95,
        output: Callable[[Any], Tensor] | None = None,
        **options: Unpack[HessianFreeKeywords],
    ) -> None:
        require_known(type(self), options)
        own = {key: options[key] for key in ("tolerance", "carry") if key in options}
        solver = ConjugateGradients(iterations, preconditioner is not None, **own)
        super().__init__(
            model, likelihood, solver, LineSearch(), preconditioner=preconditioner, damping=damping, kind=kind,
            params=params, lr=lr, weight_decay=weight_decay, decay=decay, output=output,
            kl_clip=options.get("kl_clip", MODEL["kl_clip"]),
            min_damping=options.get("min_damping", MODEL["min_damping"]),
        )  # fmt: skip
