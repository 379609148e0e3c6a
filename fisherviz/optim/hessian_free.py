"""Hessian-free optimization: conjugate gradients on the mini-batch's exact F + (λ + η)I, by products alone.

Martens 2010: truncation by relative progress, start from the decayed last solution, backtracking over the
iterates, λ by
Levenberg-Marquardt. Any approximation preconditions (K-FAC paper, section 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Tikhonov, as_damping
from fisherviz.optim.averages import distributed
from fisherviz.optim.low_rank import Tensors
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.preconditioner import Preconditioner
from fisherviz.optim.quadratic import FisherForms, combine, dot
from fisherviz.optim.selection import joint_lr, matrix_of, split_matrix
from fisherviz.optim.settings import check_choice, check_count, check_number
from fisherviz.support import timing

SPACING = 1.3
"""Ratio of the iterations at which conjugate gradients leave an iterate for the backtracking."""


_SEARCH = 30
"""Shortenings of a step before it is given up."""
Iterate = tuple[int, Tensors, float]
"""Iteration, solution, and M there less M(0)."""


class HessianFree(NaturalGradient):
    """Hessian-free optimization with the Fisher (Martens 2010; K-FAC paper, section 6.4).

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
        output: picks the output tensor from what the model returns.
    """

    _needs_inputs = True
    _needs_closure = "Hessian-free optimization evaluates the loss along its path: call step(closure)."

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
        tolerance: float = 5e-4,
        kind: str = "mc",
        decay: float = 0.95,
        carry: float = 0.95,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        rule = as_damping(damping)
        if not isinstance(rule, Tikhonov) or rule.value <= 0:
            raise ValueError(f"damping must be a positive number, got {damping!r}.")
        check_count("iterations", iterations)
        check_number("tolerance", tolerance, 0.0)
        check_number("carry", carry, 0.0, 1.0)
        check_choice("kind", kind, KINDS)
        self.iterations, self.tolerance, self.carry = iterations, tolerance, carry
        self._captures = preconditioner is not None
        super().__init__(
            model, likelihood, "identity" if preconditioner is None else preconditioner, params=params, lr=lr,
            damping=damping, weight_decay=weight_decay, decay=decay, kind=kind, output=output,
        )  # fmt: skip
        self.lam, self.eta = rule.value, weight_decay
        self.last: dict[str, float] = {}
        """What the last step did: iterations, decrease, rho, step."""
        self._start: Tensors = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: zeroes the gradients, evaluates the loss, backpropagates and returns it; evaluated
            several times.

        Returns:
            What the closure returned at the old weights.

        Raises:
            RuntimeError: no closure, or no statistics since the last step.
        """
        return self._step(closure)

    def _seen(self, layer: Layer) -> bool:
        return bool(self._passes) if not self._captures else super()._seen(layer)

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        if distributed():
            raise NotImplementedError("HessianFree runs in one process; under torch.distributed use foof or kfac.")
        batches = [made.inputs for made in self._passes if made.inputs is not None]
        if not batches or self._watcher is None or closure is None:
            self._apply({})
            return
        layers = self._active()
        parameters = [p for layer in layers for p in layer.parameters.values() if p.grad is not None]
        gradient = {p: p.grad.add(p, alpha=self.eta) for p in parameters if p.grad is not None}
        forms = FisherForms(self._watcher, self.likelihood, batches)
        shift = self.lam + self.eta

        def product(d: Tensors) -> Tensors:
            return combine([(1.0, forms.product(d)), (shift, d)])

        iterates = self._conjugate_gradients(product, gradient, self._preconditioning(layers))
        self._start = iterates[-1][1]
        h = self._objective(loss, parameters)
        (k, delta, model_change), value = self._backtrack(iterates, closure, parameters)
        rho = (value - h) / model_change if model_change < 0 else 0.0
        step, slope = joint_lr(self.param_groups), dot(gradient, delta)
        after = value if step == 1 else self._at(delta, step, closure, parameters)
        for _ in range(_SEARCH):  # Armijo along the chosen iterate
            if after <= h + 1e-2 * step * slope:
                break
            step *= 0.8
            after = self._at(delta, step, closure, parameters)
        else:
            step, after = 0.0, h
        self._move(delta, step)
        if rho > 0.75:
            self.lam *= 2 / 3
        elif not rho >= 0.25:  # NaN included
            self.lam *= 3 / 2
        self.last = {
            "iterations": float(iterates[-1][0]),
            "chosen": float(k),
            "decrease": h - after,
            "rho": rho,
            "step": step,
        }
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in gradient:
                    p.add_(p.grad.add(p, alpha=group["weight_decay"]), alpha=-float(group["lr"]))

    @timing.part("inversion")
    def _preconditioning(self, layers: list[Layer]) -> Callable[[Tensors], Tensors]:
        if not self._captures or self.moments is None:
            return lambda d: d
        self._update_moments(True)
        names = [layer.name for layer in self.moments.space.layers]
        made = Preconditioner(self.moments.build(), dict.fromkeys(names, Tikhonov(self.lam + self.eta)), False)

        def solve(d: Tensors) -> Tensors:
            solved = made.solve({layer.name: matrix_of(layer, d).reshape(-1) for layer in layers if made.has(layer)})
            out = dict(d)
            for layer in layers:
                if layer.name in solved:
                    out |= {p: x for p, x in split_matrix(layer, solved[layer.name]).items() if p in d}
            return out

        return solve

    @timing.part("inversion")
    def _conjugate_gradients(
        self,
        product: Callable[[Tensors], Tensors],
        gradient: Tensors,
        precondition: Callable[[Tensors], Tensors],
    ) -> list[Iterate]:
        """Iterates of the minimisation of M, at geometrically spaced iterations; the last one last."""
        zero = {p: torch.zeros_like(g) for p, g in gradient.items()}
        x = {p: self.carry * self._start[p] if p in self._start else z for p, z in zero.items()}
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

    def _backtrack(
        self, iterates: list[Iterate], closure: Callable[[], Any], parameters: list[nn.Parameter]
    ) -> tuple[Iterate, float]:
        """The latest iterate before which the objective no longer falls, and the objective there."""
        best, value = iterates[-1], self._at(iterates[-1][1], 1.0, closure, parameters)
        for candidate in reversed(iterates[:-1]):
            earlier = self._at(candidate[1], 1.0, closure, parameters)
            if math.isfinite(value) and not earlier < value:
                break
            best, value = candidate, earlier
        return best, value

    def _at(self, delta: Tensors, step: float, closure: Callable[[], Any], parameters: list[nn.Parameter]) -> float:
        """The objective at θ + step · δ; the weights come back bit for bit."""
        saved = [p.clone() for p in parameters]
        self._move(delta, step)
        value = self._objective(self._evaluate(closure), parameters)
        for p, old in zip(parameters, saved, strict=True):
            p.copy_(old)
        return value

    def _move(self, delta: Tensors, step: float) -> None:
        for p, d in delta.items():
            p.add_(d, alpha=step)

    def _objective(self, loss: Any, parameters: list[nn.Parameter]) -> float:
        weights = {p: p.detach() for p in parameters}
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return value + (self.eta / 2 * dot(weights, weights) if self.eta else 0.0)

    def _own_state(self) -> dict[str, Any]:
        names = {p: name for layer in self.layers for name, p in layer.parameters.items()}
        start = {names[p]: d.clone() for p, d in self._start.items()}
        return super()._own_state() | {"lam": self.lam, "start": start, "last": dict(self.last)}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        self.lam, self.last = state["lam"], dict(state["last"])
        parameters = {name: p for layer in self.layers for name, p in layer.parameters.items()}
        self._start = {parameters[name]: d.to(parameters[name].device) for name, d in state["start"].items()}
