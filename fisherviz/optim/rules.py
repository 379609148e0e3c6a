"""Step rules: what length a direction gets.

`Momentum` goes along the directions with each group's lr and momentum. `ModelRule` is what the rules share that
minimise the quadratic model with λ and η over all preconditioned groups together. Plain SGD is here and nowhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fisherviz.network.layers import Layer
from fisherviz.operators.damping import FactoredTikhonov, as_damping
from fisherviz.operators.finite import first_not_finite
from fisherviz.optim.averages import Moments
from fisherviz.optim.directions import Directions, Group, Part, Step
from fisherviz.optim.gradients import Direction, Moves, add_direction, dense, inner, parts_of
from fisherviz.optim.quadratic import dot
from fisherviz.optim.settings import NOT_FINITE_DIRECTION, value_of
from fisherviz.optim.watcher import at_least_float32
from fisherviz.support.processes import summed
from fisherviz.support.warning import warn

JOINT = ("lr", "damping", "momentum", "weight_decay")
"""What the quadratic model takes from the optimizer and not from its groups."""
IDLE = 100
"""Steps that λ may take to come down to F before it is said."""
D = TypeVar("D", bound=Directions)


@dataclass(frozen=True)
class TrustRegion:
    """How far a step may go.

    Attributes:
        kl_clip: κ, the bound on δᵀFδ; inf: none.
        min_damping: what λ never falls below where it is adapted.
    """

    kl_clip: float = math.inf
    min_damping: float = 0.0

    def within(self, square: float) -> float:
        """The factor that brings a step into the region: min(1, √(κ/δᵀFδ)) (Ba et al. 2017, section 5)."""
        return 1.0 if square <= self.kl_clip else math.sqrt(self.kl_clip / square)


class StepRule(Part, ABC, Generic[D]):
    """Takes a step along directions."""

    lam = 0.0
    """λ of the quadratic model, 0 without one."""
    region = TrustRegion()
    """Given by the optimizer."""
    words = ""
    """What an optimizer says of its λ, where it is more than the damping."""

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

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """The trust region."""
        return {"region": vars(self.region).copy()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave."""
        self.region = TrustRegion(**state.get("region", {}))  # states saved before have none


class Momentum(StepRule[Directions]):
    """θ ← θ − lr · (momentum buffer of the direction), each direction brought into the trust region first."""

    def take(self, step: Step, directions: Directions) -> None:
        """Change the weights."""
        moves = directions.of(step)
        require_finite(step, moves)
        scale = 1.0 if self.region.kl_clip == math.inf else self.region.within(self._square(step, moves))
        descend(step.groups, step.state, moves, scale=scale)

    def _square(self, step: Step, moves: Moves) -> float:
        """δᵀFδ of δ = lr · d, F as it is damped: lr² dᵀ∇h."""
        own = {p: decayed(p, step.decays[p]) for p in moves if p.grad is not None}
        square = sum(float(step.group_of[p]["lr"]) ** 2 * inner(moves[p], g) for p, g in own.items())
        return square / step.moments.snapshot_examples if step.reduction == "sum" else square


def require_finite(step: Step, moves: Mapping[nn.Parameter, Direction]) -> None:
    """Refuse directions that are no numbers before any weight has moved.

    Args:
        step: the step.
        moves: directions by parameter.

    Raises:
        RuntimeError: one is NaN or infinite.
    """
    found = [(p, part) for p, d in moves.items() for part in parts_of(d)]
    broken = first_not_finite([part for _, part in found])
    if broken is not None:
        p = found[broken][0]
        named = {id(own): name for layer in step.watcher.layers for name, own in layer.parameters.items()}
        kind = str(at_least_float32(p).dtype).removeprefix("torch.")
        raise RuntimeError(NOT_FINITE_DIRECTION.format(named[id(p)], step.k, kind))


def decayed(p: nn.Parameter, weight_decay: float) -> Tensor:
    """The gradient plus weight decay."""
    assert p.grad is not None
    return p.grad.add(p, alpha=weight_decay) if weight_decay else p.grad


def descend(
    groups: Sequence[Group],
    state: MutableMapping[Any, Any],
    moves: Moves,
    done: Collection[nn.Parameter] = (),
    scale: float = 1.0,
) -> None:
    """One step along directions with each group's lr and momentum; plain SGD for parameters without a direction.

    Args:
        groups: the parameter groups.
        state: per parameter, where momentum buffers are kept.
        moves: directions by parameter.
        done: parameters that have been stepped already.
        scale: factor on the directions.
    """
    for group in groups:
        for p in group["params"]:
            if p.grad is None or p in done:
                continue
            d = moves.get(p)
            c = scale
            if d is None:
                d, c = decayed(p, group["weight_decay"]), 1.0
            if group["momentum"]:
                own = state[p]
                if "momentum_buffer" not in own:
                    own["momentum_buffer"] = c * dense(d)
                else:
                    add_direction(own["momentum_buffer"], d, c, group["momentum"])
                d, c = own["momentum_buffer"], 1.0
            add_direction(p, d, -float(group["lr"]) * c)


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
        self._given: list[tuple[Any, Any, Any]] | None = None

    def begin(self, groups: Sequence[Group], defaults: Mapping[str, Any], T: int) -> None:
        """Take λ₀ and η from the optimizer's own damping and weight_decay, which all preconditioned groups share.

        Raises:
            ValueError: a preconditioned group has another lr, damping, momentum or weight_decay.
        """
        damping = as_damping(defaults["damping"])
        assert damping is not None
        self.lam = damping.strength
        self.pi = damping.pi if isinstance(damping, FactoredTikhonov) else FactoredTikhonov.pi
        self.eta = defaults["weight_decay"]
        for group in joined(groups):
            if other := [key for key in JOINT if group[key] != defaults[key]]:
                raise ValueError(
                    f"a group has {other[0]}={group[other[0]]!r}, and the quadratic model joins the preconditioned "
                    f"groups with one lr, damping, momentum and weight_decay (here {other[0]}={defaults[other[0]]!r}); "
                    "only a group with approximation='none' may have its own."
                )
        self._given = self._read(groups)

    def _read(self, groups: Sequence[Group]) -> list[tuple[Any, Any, Any]]:
        return [(group["damping"], group["weight_decay"], group["momentum"]) for group in joined(groups)]

    def say_ignored(self, groups: Sequence[Group]) -> None:
        """Warn once where a group's damping, momentum or weight_decay is no longer what the quadratic model uses.

        Raises:
            ValueError: the groups have different learning rates by now, of which a step takes one.
        """
        given = self._read(groups)
        if self._given is not None and given != self._given:
            warn(
                "a group's damping, momentum or weight_decay has changed (schedulers that cycle momentum do so), which "
                "the optimizer with its quadratic model reads only when it is created; "
                f"λ = {self.lam:g} and η = {self.eta:g} stay: assign opt.lam, or create a new optimizer for another "
                "momentum or weight_decay."
            )
        self._given = given
        rates = [float(group["lr"]) for group in joined(groups)]
        if other := [rate for rate in rates if rate != rates[0]]:
            raise ValueError(
                f"groups have lr={rates[0]:g} and lr={other[0]:g}, and the quadratic model joins the preconditioned "
                "groups with one; give a scheduler one rate for them, or a group approximation='none'."
            )

    def objective(self, loss: Any, parameters: Iterable[nn.Parameter]) -> float:
        """H = loss + η/2 ‖θ‖²; the loss is the mean of the processes', as DistributedDataParallel's gradient is."""
        own, known = value_of(loss), list(parameters)
        total, processes = summed([own, 1.0], known[0].device if known else torch.device("cpu"))
        weights = {p: p.detach() for p in known} if self.eta else {}
        return total / processes + self.eta / 2 * dot(weights, weights)

    def reached(self, step: Step, delta: Mapping[nn.Parameter, Tensor], length: float) -> float:
        """The objective at θ + length · δ; the weights come back bit for bit."""
        saved = {p: p.clone() for p in delta}
        for p, d in delta.items():
            p.add_(d, alpha=length)
        try:
            return self.objective(step.evaluate(), delta)
        finally:
            for p, old in saved.items():
                p.copy_(old)

    def adjust(self, rho: float, lower: float, higher: float) -> None:
        """λ after a step with reduction ratio ρ: lower where the model foresaw it well, higher where badly."""
        self.lam = max({1: lower, 0: self.lam, -1: higher}[trust(rho)], self.region.min_damping)

    def say_idle(self, delta: Mapping[nn.Parameter, Tensor], form: float, fall: float) -> None:
        """Warn where it takes λ a hundred steps or more to come down to F along the first step, or F is lost beside it.

        Args:
            delta: the step.
            form: δᵀ(F + λ + η)δ.
            fall: the smallest factor of λ per step.
        """
        length = dot(delta, delta)
        if not length:
            return
        # beside a λ that is larger than F by all digits, what is left of F is rounding: F is at most that
        rounding = 4 * max(torch.finfo(d.dtype).eps for d in delta.values()) * (self.lam + self.eta)
        seen = form / length - self.lam - self.eta
        least = max(seen, rounding, self.region.min_damping)
        times = max(self.lam / least, 1.0) if least > 0 else 1.0
        if fall < 1 and (least == rounding > 0 or math.log(times) > IDLE * -math.log(fall)):
            warn(
                f"λ = {self.lam:g} is {times:,.0f} times F along the first step and takes at least "
                f"{math.log(times) / -math.log(fall):.0f} steps to come down to it, until when steps are short ones "
                "along the gradient: pass a smaller damping."
            )

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
        super().load_state_dict(state, parameters)
        self._given = None
