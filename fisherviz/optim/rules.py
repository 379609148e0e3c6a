"""Step rules: what length a direction gets.

`Momentum` goes along the directions with each group's lr and momentum. `ModelRule` is what the rules share that
minimise the quadratic model with λ and η over all preconditioned groups together. Plain SGD is here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fisherviz.network.layers import Layer
from fisherviz.operators.damping import FactoredTikhonov, as_damping
from fisherviz.optim.averages import Moments
from fisherviz.optim.directions import Directions, Group, Part, Step
from fisherviz.optim.gradients import Moves, add_direction, dense
from fisherviz.optim.quadratic import dot
from fisherviz.optim.selection import say_once

JOINT = ("lr", "damping", "momentum", "weight_decay")
"""What the quadratic model takes from the optimizer and not from its groups."""
D = TypeVar("D", bound=Directions)


class StepRule(Part, ABC, Generic[D]):
    """Takes a step along directions."""

    lam = 0.0
    """λ of the quadratic model, 0 without one."""

    def begin(self, groups: Sequence[Group], defaults: Mapping[str, Any], T: int) -> None:
        """Look at the groups when the optimizer is made. Nothing by default."""

    def due(self, k: int, T: int) -> bool:
        """Whether step k factorises anew."""
        return (k - 1) % T == 0

    def knows(self, layer: Layer, moments: Moments | None) -> bool:
        """Whether the rule can step a layer whose statistics do not come from the user's own passes."""
        return True

    @abstractmethod
    def take(self, step: Step, directions: D) -> None:
        """Change the weights."""


class Momentum(StepRule[Directions]):
    """θ ← θ − lr · (momentum buffer of the direction)."""

    def take(self, step: Step, directions: Directions) -> None:
        """Change the weights."""
        descend(step.groups, step.state, directions.of(step))


def descend(
    groups: Sequence[Group], state: MutableMapping[Any, Any], moves: Moves, done: Collection[nn.Parameter] = ()
) -> None:
    """One step along directions with each group's lr and momentum; plain SGD for parameters without a direction.

    Args:
        groups: the parameter groups.
        state: per parameter, where momentum buffers are kept.
        moves: directions by parameter.
        done: parameters that have been stepped already.
    """
    for group in groups:
        for p in group["params"]:
            if p.grad is None or p in done:
                continue
            d = moves.get(p)
            if d is None:
                d = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
            if group["momentum"]:
                own = state[p]
                if "momentum_buffer" not in own:
                    own["momentum_buffer"] = dense(d).clone()
                else:
                    add_direction(own["momentum_buffer"], d, 1.0, group["momentum"])
                d = own["momentum_buffer"]
            add_direction(p, d, -float(group["lr"]))


def trust(rho: float) -> int:
    """Whether the quadratic model foresaw a step well (1, ρ > 3/4), badly (−1, ρ < 1/4 or NaN), or neither (0)."""
    return 1 if rho > 0.75 else 0 if rho >= 0.25 else -1


def joined(groups: Iterable[Group]) -> list[Group]:
    """The groups that are preconditioned."""
    return [group for group in groups if group["approximation"] != "none"]


class ModelRule(StepRule[D]):
    """Steps by the quadratic model, λ by Levenberg-Marquardt."""

    inputs = True

    def __init__(self) -> None:
        self.eta = 0.0
        """η of the quadratic model, the weight decay."""
        self.last: dict[str, float] = {}
        """What the last step did."""
        self._given: list[tuple[Any, Any]] | None = None

    def begin(self, groups: Sequence[Group], defaults: Mapping[str, Any], T: int) -> None:
        """Take λ₀ and η from the optimizer's own damping and weight_decay, which all preconditioned groups share.

        Raises:
            ValueError: a preconditioned group has another lr, damping, momentum or weight_decay.
        """
        damping = as_damping(defaults["damping"])
        assert damping is not None
        self.lam = damping.tikhonov.value if isinstance(damping, FactoredTikhonov) else damping.value
        self.eta = defaults["weight_decay"]
        for group in joined(groups):
            if other := [key for key in JOINT if group[key] != defaults[key]]:
                raise ValueError(
                    f"a group has {other[0]}={group[other[0]]!r}, and the quadratic model joins the preconditioned "
                    f"groups with one lr, damping, momentum and weight_decay (here {other[0]}={defaults[other[0]]!r}); "
                    "only a group with approximation='none' may have its own."
                )
        self._given = self._read(groups)

    def _read(self, groups: Sequence[Group]) -> list[tuple[Any, Any]]:
        return [(group["damping"], group["weight_decay"]) for group in joined(groups)]

    def say_ignored(self, groups: Sequence[Group]) -> None:
        """Warn once where a group's damping or weight_decay is no longer what the quadratic model uses."""
        given = self._read(groups)
        if self._given is not None and given != self._given:
            say_once(
                "a group's damping or weight_decay has changed, which the optimizer with its quadratic model "
                f"reads only when it is created; λ = {self.lam:g} and η = {self.eta:g} stay: assign opt.lam, or create "
                "a new optimizer for another weight_decay."
            )
        self._given = given

    def objective(self, loss: Any, parameters: Iterable[nn.Parameter]) -> float:
        """H = loss + η/2 ‖θ‖²."""
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        weights = {p: p.detach() for p in parameters} if self.eta else {}
        return value + self.eta / 2 * dot(weights, weights)

    def lr(self, step: Step) -> float:
        """The one lr of the preconditioned groups; plain groups keep theirs to themselves."""
        return float(joined(step.groups)[0]["lr"])

    def gradient(self, step: Step, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """∇h with the ℓ₂ term."""
        given = {p: p.grad for p in parameters if p.grad is not None}
        if any(gradient.is_sparse for gradient in given.values()):
            raise RuntimeError(
                "an embedding has a sparse gradient, which no step of the quadratic model takes; put it in a group "
                "with approximation='none'."
            )
        return {p: gradient.add(p, alpha=self.eta) for p, gradient in given.items()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """The groups are those of the saved run."""
        self._given = None
