"""What optimizers share that know the mini-batch's F by its products alone; any approximation preconditions them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fisherviz.approximations import Approximation
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Tikhonov, as_damping
from fisherviz.optim.directions import Directions, Step
from fisherviz.optim.gradients import Moves, Tensors, matrix_of, split_matrix
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.options import NaturalGradientOptions
from fisherviz.optim.preconditioner import Preconditioner
from fisherviz.optim.quadratic import combine
from fisherviz.optim.rules import D, ModelRule, StepRule
from fisherviz.support import choices, timing


class Products(Directions):
    """What is found by products with F, for a step rule of its own.

    Args:
        preconditioned: whether the approximation preconditions.
    """

    inputs = True

    def __init__(self, preconditioned: bool) -> None:
        self.captures = preconditioned
        self.start: Tensors = {}
        """What the last step leaves for the next one."""

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """What the last step has left."""
        return {"start": {names[p]: d.clone() for p, d in self.start.items()}}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave."""
        self.start = {parameters[name]: d.to(parameters[name].device) for name, d in state["start"].items()}

    def of(self, step: Step) -> Moves:
        """Not without more than gradients: the step rule asks for it."""
        raise NotImplementedError(f"{type(self).__name__} goes with the step rule of its own optimizer alone.")

    @timing.part("inversion")
    def preconditioning(self, step: Step, shift: float) -> Callable[[Tensors], Tensors]:
        """What is applied to residuals: the damped inverse of the approximation, where there is one."""
        if not self.captures:
            return lambda d: d
        step.moments.advance(step.decay, True, keep=False)
        layers = step.moments.space.layers
        made = Preconditioner(step.moments.build(), {layer.name: Tikhonov(shift) for layer in layers}, False)

        def solve(d: Tensors) -> Tensors:
            solved = made.solve(
                {layer.name: matrix_of(layer, d).reshape(-1) for layer in step.active if made.has(layer)}
            )
            out = dict(d)
            for layer in step.active:
                if layer.name in solved:
                    out |= {p: x for p, x in split_matrix(layer, solved[layer.name]).items() if p in d}
            return out

        return solve


class ProductsRule(ModelRule[D]):
    """A step rule that asks for what is made by products; λ and what the last step did are its state."""

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """λ and what the last step did."""
        return super().state_dict(names) | {"lam": self.lam, "last": dict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state, parameters)
        self.lam, self.last = state["lam"], dict(state["last"])


def shifted(product: Callable[[Tensors], Tensors], shift: float) -> Callable[[Tensors], Tensors]:
    """Products with F + shift I from products with F."""
    return lambda d: combine([(1.0, product(d)), (shift, d)])


class ByProducts(NaturalGradient):
    """Steps by products with the exact F of the mini-batch.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`; the criterion is its mean nll.
        solver: what is made by products.
        rule: the step rule that asks it.
        preconditioner: name or class of an approximation; None: none.
        damping: λ₀, a positive number.
        kind: of the preconditioner's statistics; the products are with the exact F.
        **options: as for `NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        solver: Products,
        rule: StepRule[Any],
        *,
        preconditioner: str | type[Approximation] | None,
        damping: float,
        kind: str,
        **options: Any,
    ) -> None:
        read = as_damping(damping)
        if not isinstance(read, Tikhonov) or read.value <= 0:
            raise ValueError(f"damping must be a positive number, got {damping!r}.")
        choices.one_of("kind", kind, KINDS)
        self._solver, self._own_rule = solver, rule
        super().__init__(
            model, likelihood, "identity" if preconditioner is None else preconditioner, damping=damping, momentum=0.0,
            kind=kind, **options,
        )  # fmt: skip

    def _compose(self, options: NaturalGradientOptions, defaults: dict[str, Any]) -> tuple[Directions, StepRule[Any]]:
        return self._solver, self._own_rule

    def _settle(self, generic: list[Layer]) -> list[Layer]:
        # the products take every layer; structure is for the preconditioner alone
        return super()._settle(generic) if self._captures else list(self.layers)
