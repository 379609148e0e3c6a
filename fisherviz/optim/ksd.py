"""Krylov subspace descent: the objective itself, minimised over a few directions by BFGS (Vinyals & Povey 2012).

The directions are P⁻¹g, (P⁻¹B)P⁻¹g, ... and the last step, with B = F + ηI of the mini-batch and P an approximation, or
I. There is no λ: the subspace of B + λI is that of B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.network.likelihoods import Likelihood
from fisherviz.operators.factorise import eigh
from fisherviz.optim.by_products import ByProducts, Products, ProductsRule, shifted
from fisherviz.optim.directions import Step
from fisherviz.optim.gradients import Tensors
from fisherviz.optim.options import MODEL, require_known
from fisherviz.optim.quadratic import FisherForms, choose, combine, dot
from fisherviz.optim.rules import descend, require_finite
from fisherviz.support import choices, timing
from fisherviz.support.memory import require

FLOOR = 1e-4
"""Eigenvalues of B in the subspace are raised to this times the largest, where they scale its coordinates."""
_NEW = 1e-2
"""Part of a vector's length, in roots of its rounding, that must be new for it to join the basis."""
_BOWL = 1e6
"""Curvature that stands for an objective that is no number, in units of F's."""
_SEARCH = 30
"""Shortenings of a step before it is given up."""


class Subspace(NamedTuple):
    """Orthonormal directions v and VᵀBV.

    Attributes:
        basis: r directions.
        B: (r, r), float64.
    """

    basis: Sequence[Tensors]
    B: Tensor

    @property
    def scaled(self) -> Tensor:
        """S (r, r) such that B is the identity in coordinates b of V S b, but for what `FLOOR` raises."""
        values, vectors = eigh(self.B, "F in the Krylov subspace")
        values = values.clamp(min=FLOOR * float(values[-1])) if float(values[-1]) > 0 else torch.ones_like(values)
        return vectors / values.sqrt()

    def at(self, a: Tensor) -> Tensors:
        """V a."""
        return combine([(float(c), v) for c, v in zip(a, self.basis, strict=True)])

    def project(self, d: Tensors) -> Tensor:
        """Vᵀ d, float64."""
        return torch.tensor([dot(v, d) for v in self.basis], dtype=torch.float64, device="cpu")


class Krylov(Products):
    """The subspace of a step.

    Args:
        dimension: K, directions beside the last step.
        preconditioned: whether the approximation preconditions.
        share: of the mini-batch's examples that products are taken over.
    """

    def __init__(self, dimension: int, preconditioned: bool, share: float = 1.0) -> None:
        super().__init__(preconditioned)
        choices.count("dimension", dimension)
        choices.share("share", share)
        self.dimension, self.share = dimension, share

    def subspace(self, step: Step, gradient: Tensors, eta: float, lam: float) -> Subspace:
        """Of the gradient ∇h and the last step, with B = F + ηI and P damped by λ + η."""
        like = next(iter(gradient.values()))
        size = (self.dimension + 3) * sum(g.numel() for g in gradient.values()) * like.element_size()
        require(size, like.device, f"a basis of {self.dimension + 1} directions", "pass a smaller dimension")
        batches = [choose(batch, self.share, step.generator) for batch in step.inputs]
        forms = FisherForms(step.watcher, step.watcher.network.likelihood, batches)
        last = {p: d for p, d in self.start.items() if p in gradient}
        return self.spanned(shifted(forms.product, eta), gradient, self.preconditioning(step, lam + eta), last)

    @timing.part("inversion")
    def spanned(
        self,
        product: Callable[[Tensors], Tensors],
        gradient: Tensors,
        precondition: Callable[[Tensors], Tensors],
        last: Tensors,
    ) -> Subspace:
        """Arnoldi's basis of the Krylov space, and what the last step adds to it."""
        basis: list[Tensors] = []
        columns: list[list[float]] = []

        def join(d: Tensors) -> Tensors | None:
            if (v := _beside(d, basis)) is None:
                return None
            basis.append(v)
            image = product(v)
            columns.append([dot(u, image) for u in basis])
            return image

        image = join(precondition(gradient))
        while image is not None and len(basis) < self.dimension:
            image = join(precondition(image))
        if last:
            join(last)
        B = torch.zeros(len(basis), len(basis), dtype=torch.float64, device="cpu")
        for j, column in enumerate(columns):
            B[: j + 1, j] = B[j, : j + 1] = torch.tensor(column, dtype=torch.float64, device="cpu")
        return Subspace(basis, B)


def _beside(d: Tensors, basis: Sequence[Tensors]) -> Tensors | None:
    """The direction of d orthogonal to a basis, of length 1; None where there is none but rounding."""
    length = math.sqrt(dot(d, d))
    if not 0 < length < math.inf:
        return None
    v = combine([(1 / length, d)])
    for _ in range(2):  # the second time for what rounding has left
        v = combine([(1.0, v), *((-dot(u, v), u) for u in basis)])
    left = math.sqrt(dot(v, v))
    if left <= _NEW * max(torch.finfo(x.dtype).eps for x in v.values()) ** 0.5:
        return None
    return combine([(1 / left, v)])


class Search(ProductsRule[Krylov]):
    """BFGS over the subspace in coordinates in which B is the identity.

    Args:
        iterations: of BFGS at most.
    """

    needs_closure = "Krylov subspace descent minimises the loss over its subspace: call step(closure)."

    def __init__(self, iterations: int) -> None:
        super().__init__()
        choices.count("iterations", iterations)
        self.iterations = iterations

    def take(self, step: Step, directions: Krylov) -> None:
        """Change the weights."""
        self.say_ignored(step.groups)
        if not step.any_inputs:
            descend(step.groups, step.state, {})
            return
        parameters = [p for layer in step.watcher.layers for p in layer.parameters.values() if p.grad is not None]
        gradient = self.gradient(step, parameters)
        space = directions.subspace(step, gradient, self.eta, self.lam)
        h = self.objective(step.loss, parameters)
        a, value, evaluations = self._minimum(step, space, gradient, h)
        delta, length = space.at(a) if len(a) else {}, self.lr(step)
        require_finite(step, delta)
        form = float(a @ space.B @ a) + self.lam * float(a @ a)  # δᵀ(F + λ + η)δ
        length *= self.region.within(length**2 * form)
        after = value if length == 1 or not delta else self.reached(step, delta, length)
        for _ in range(_SEARCH):  # what is shorter than the minimum may be higher than the start
            if after <= h:
                break
            length *= 0.8
            after = self.reached(step, delta, length)
        else:
            length, after = 0.0, h
        for p, d in delta.items():
            p.add_(d, alpha=length)
        directions.start = delta
        self.last = {
            "dimension": float(len(a)), "evaluations": float(evaluations), "decrease": h - after, "step": length,
        }  # fmt: skip
        descend(step.groups, step.state, {}, done=gradient)

    def _minimum(self, step: Step, space: Subspace, gradient: Tensors, h: float) -> tuple[Tensor, float, int]:
        """Coefficients of the lowest point that BFGS has seen, the objective there, and how often it looked.

        In units in which the slope at the start is 1 and the quadratic model's minimum is 1 away.
        """
        S = space.scaled if len(space.basis) else space.B
        slope = S.T @ space.project(gradient)
        unit = float(slope.norm())
        best = torch.zeros(len(slope), dtype=torch.float64, device="cpu"), h, 0
        if not 0 < unit < math.inf:
            return best

        def f(c: Any) -> tuple[float, Any]:
            nonlocal best
            a = S @ (unit * torch.from_numpy(c))
            value, g = self._sloped(step, space.at(a), space)
            best = (a, value, best[2] + 1) if value < best[1] else (best[0], best[1], best[2] + 1)
            found, back = (value - h) / unit / unit, (S.T @ g / unit).numpy()
            if math.isfinite(found) and np.isfinite(back).all():
                return found, back
            return _BOWL * float(c @ c), 2 * _BOWL * c

        minimize(f, np.zeros(len(slope)), jac=True, method="BFGS", options={"maxiter": self.iterations})
        return best

    def _sloped(self, step: Step, delta: Tensors, space: Subspace) -> tuple[float, Tensor]:
        """The objective at θ + δ and its slope Vᵀ∇; the weights come back bit for bit."""
        saved = {p: p.clone() for p in delta}
        for p, d in delta.items():
            p.add_(d)
        try:
            with step.again() as closure:
                loss = closure()
                with torch.no_grad():
                    return self.objective(loss, delta), space.project(self.gradient(step, delta))
        finally:
            for p, old in saved.items():
                p.copy_(old)


class KSDKeywords(TypedDict, total=False):
    """Rare options of `KSD`."""

    share: float
    kl_clip: float


class KSD(ByProducts):
    """Krylov subspace descent: BFGS on the loss over a Krylov subspace (Vinyals & Povey 2012).

    The loss of the closure's examples never increases by a step. κ keeps the step near, since a mini-batch's minimum
    over the subspace is far from that of all data once the mini-batch can be fitted; `KSD.paper` has no such bound and
    is for large batches. A step takes K + 1 products with F and about one evaluation of the closure for each iteration.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`; the criterion is its mean nll.
        params: parameter groups, None for all.
        lr: factor on the step that BFGS finds.
        damping: λ of the preconditioner, and of F where κ bounds the step; it is not adapted.
        weight_decay: η, part of the objective and of B = F + ηI.
        preconditioner: name or class of an approximation whose damped inverse is P⁻¹; None: I.
        dimension: K, directions beside the last step.
        iterations: most iterations of BFGS.
        kind: of the preconditioner's statistics; the products are with the exact F.
        decay: of the preconditioner's statistics.
        share: of the mini-batch's examples that products with F are taken over; the closure has all of them.
        kl_clip: κ; the step δ is shortened to δᵀ(F + (λ + η)I)δ ≤ κ.
        output: picks the output tensor from what the model returns.
    """

    Options: ClassVar[type] = KSDKeywords
    PAPER: ClassVar[Mapping[str, Any]] = {"kl_clip": math.inf}

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
        dimension: int = 20,
        iterations: int = 20,
        kind: str = "mc",
        decay: float = 0.95,
        output: Callable[[Any], Tensor] | None = None,
        **options: Unpack[KSDKeywords],
    ) -> None:
        require_known(type(self), options)
        solver = Krylov(dimension, preconditioner is not None, options.get("share", 1.0))
        super().__init__(
            model, likelihood, solver, Search(iterations), preconditioner=preconditioner, damping=damping, kind=kind,
            params=params, lr=lr, weight_decay=weight_decay, decay=decay, output=output,
            kl_clip=options.get("kl_clip", MODEL["kl_clip"]), min_damping=0.0,
        )  # fmt: skip
