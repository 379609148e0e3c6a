"""KFAC, complete (Martens & Grosse 2015, sections 5 to 9) or plain, with fixed damping.

Complete (algorithm 2): proposals of the factored approximation are re-scaled by the exact F on the mini-batch, with
momentum from a 2 × 2 system, λ by Levenberg-Marquardt and γ by greedy search. Plain: what Benzing (2021) compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.optim.low_rank import Tensors, dense
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.preconditioner import INVERT_FROM, Preconditioner
from fisherviz.optim.processes import mean
from fisherviz.optim.quadratic import FisherForms, choose, combine, dot, minimise
from fisherviz.optim.revisit import capture_forward
from fisherviz.optim.selection import joint_lr, say_once
from fisherviz.optim.settings import check_choice, check_count, check_flag, check_number, check_share
from fisherviz.optim.watcher import Inputs
from fisherviz.support import timing

METHODS = {"block-diagonal": "kfac", "block-tridiagonal": "kfac-tridiagonal"}

NO_CLOSURE = (
    "adaptive KFAC evaluates the loss again to adjust λ: call step(closure) with a closure that zeroes the gradients, "
    "computes the loss, calls backward and returns it; or pass adapt=False."
)


class KFAC(NaturalGradient):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015).

    The complete optimizer assumes that the criterion is the likelihood's mean nll, and takes `step(closure)`.
    Under DistributedDataParallel every process steps with its own part of the batch, and all take the same step: the
    exact F and the factors are means over all examples, the loss is the mean of the processes'.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        inverse: "block-diagonal" (Ǧ) or "block-tridiagonal" (F̂).
        params: parameter groups, None for all.
        lr: learning rate; 1 where steps are re-scaled.
        damping: λ₀ where λ is adapted, λ otherwise; with `rescale` read once, like weight_decay: later change
            `lam`.
        momentum: with `rescale`, 0 turns the 2 × 2 system off and anything else leaves it on; without, of
            the direction.
        weight_decay: η, part of the quadratic model with `rescale`; None: 1e-5 with `rescale`, 0 without.
        T: the paper's T₃, steps between inverses; None: 20 with `rescale` (and the first 3 steps), 1 without.
        decay: largest decay; the decay of step k is min(1 − 1/k, decay).
        kind: "mc", "exact" or "empirical".
        samples: labels per example for kind "mc".
        rescale: whether proposals are re-scaled by the exact F (section 6.4).
        adapt: whether λ and γ are adapted (sections 6.5 and 6.6); needs `rescale`.
        T1: steps between adjustments of λ.
        T2: steps between searches for γ; a multiple of T.
        tau1: share of the mini-batch that the factors are estimated on.
        tau2: share that the exact F is estimated on.
        omega1: factor of λ; None: (19/20)^T1.
        omega2: factor of γ; None: (19/20)^(T2/2).
        heuristic_damping: True: factored Tikhonov, γ = √λ (section 6.3); False, plain only: λ added to the
            eigenvalues.
        setting: "expand" or "reduce", of the factors under weight sharing.
        output: picks the output tensor from what the model returns.

    Raises:
        ValueError: options contradict each other.
        RuntimeError: `step()` without a closure where one is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        inverse: str = "block-diagonal",
        params: Iterable[Any] | None = None,
        lr: float = 1.0,
        damping: float | Damping = 150.0,
        momentum: float | None = None,
        weight_decay: float | None = None,
        T: int | None = None,
        decay: float = 0.95,
        kind: str = "mc",
        samples: int = 1,
        rescale: bool = True,
        adapt: bool = True,
        T1: int = 5,
        T2: int = 20,
        tau1: float = 1 / 8,
        tau2: float = 1 / 4,
        omega1: float | None = None,
        omega2: float | None = None,
        heuristic_damping: bool = True,
        setting: str | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_choice("inverse", inverse, METHODS)
        check_choice("kind", kind, KINDS)
        for name, flag in (("rescale", rescale), ("adapt", adapt), ("heuristic_damping", heuristic_damping)):
            check_flag(name, flag)
        T = (20 if rescale else 1) if T is None else T
        for name, steps in (("T", T), ("T1", T1), ("T2", T2)):
            check_count(name, steps)
        for name, value, high in (("momentum", momentum, 1.0), ("weight_decay", weight_decay, math.inf)):
            if value is not None:
                check_number(name, value, 0.0, high)
        if adapt and not rescale:
            raise ValueError("λ and γ are adapted by the re-scaled quadratic model; pass rescale=True or adapt=False.")
        if not heuristic_damping and (rescale or inverse == "block-tridiagonal"):
            raise ValueError(
                "damping of the eigenvalues is there for the plain block-diagonal KFAC only (rescale=False); "
                "leave heuristic_damping=True."
            )
        if adapt and T2 % T:
            raise ValueError(f"T2 must be a multiple of T (the paper's T₃), got T2={T2} and T={T}.")
        for name, value in (("tau1", tau1), ("tau2", tau2), ("omega1", omega1), ("omega2", omega2)):
            if value is not None or name.startswith("tau"):
                check_share(name, value)
        if rescale and kind == "empirical":
            raise ValueError("the factors come from a forward of their own, without labels; use kind='mc' or 'exact'.")
        self.rescale, self.adapt, self.heuristic_damping = rescale, adapt, heuristic_damping
        self.T1, self.T2, self.tau1, self.tau2 = T1, T2, tau1, tau2
        self.omega1 = (19 / 20) ** T1 if omega1 is None else omega1
        self.omega2 = (19 / 20) ** (T2 / 2) if omega2 is None else omega2
        self._needs_closure = NO_CLOSURE if adapt else ""
        self.use_momentum = momentum is None or momentum > 0
        if rescale:
            weight_decay = 1e-5 if weight_decay is None else weight_decay
            momentum = 0.0
            self._needs_inputs, self._captures = True, False
        own: dict[str, Any] = {} if setting is None else {"setting": setting}
        super().__init__(
            model, likelihood, METHODS[inverse], params=params, lr=lr, damping=damping, momentum=momentum or 0.0,
            weight_decay=weight_decay or 0.0, T=T, decay=decay, ramp=True, kind=kind, samples=samples, output=output,
            **own,
        )  # fmt: skip
        self.eta = weight_decay or 0.0
        self.lam = 0.0
        """λ of the quadratic model."""
        self.gamma = 0.0
        """γ of the factored damping."""
        self.last: dict[str, float] = {}
        """What the last step did: alpha, mu, decrease (M(0) − M(δ)), and rho where λ was adjusted."""
        self._update: Tensors = {}
        self._given: list[tuple[Any, Any]] | None = None
        if rescale:
            rule = as_damping(damping)
            self.lam = rule.tikhonov.value if isinstance(rule, FactoredTikhonov) else rule.value if rule else 0.0
            self.gamma = math.sqrt(self.lam + self.eta)
            joined = [group for group in self.param_groups if group["approximation"] != "none"]
            if any(g["lr"] != lr or g["weight_decay"] != self.eta or g["damping"] != damping for g in joined):
                raise ValueError(
                    "with rescale=True the preconditioned groups share one lr, damping and weight_decay, which the "
                    "quadratic model joins; only a group with approximation='none' may have its own."
                )
            self._given = [(group["damping"], group["weight_decay"]) for group in joined]

    # ---- plain
    # -----------------------------------------------------------------------------------------------------

    def _rule(self, damping: float | Damping) -> Tikhonov | FactoredTikhonov | None:
        rule = as_damping(damping)
        if self.heuristic_damping and isinstance(rule, Tikhonov):
            return FactoredTikhonov(math.sqrt(rule.value)) if rule.value else None
        return rule

    # ---- complete: algorithm 2
    # -------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: zeroes the gradients, evaluates the loss on the mini-batch, backpropagates and returns it.
                Needed where λ is adapted; it is evaluated a second time, at the new weights, every T1 steps.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: no closure where λ is adapted, or no statistics since the last step.
        """
        return self._step(closure)

    def _seen(self, layer: Layer) -> bool:
        if not self.rescale:
            return super()._seen(layer)
        known = self.moments is not None and (not layer.structured or layer.name in self.moments.positions)
        return known and bool(self._passes)

    def _due(self) -> bool:
        return (self.k % self.T == 0 or self.k <= 3) if self.rescale else super()._due()

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        if not self.rescale:
            super()._advance(loss, closure)
            return
        self._say_ignored()
        batches = [made.inputs for made in self._passes if made.inputs is not None]
        if not batches or self.moments is None:
            self._apply({})
            return
        for batch in batches:
            subset = choose(batch, self.tau1, self.generator)
            assert self._watcher is not None
            with _enough("tau1", self.tau1):
                self.moments.collect(*capture_forward(self._watcher, subset, self._source()))
        self._update_moments(self._due())
        active = self._active()
        if self.moments.lacks(active):
            self._update_moments(True, blend=False)  # a layer ran for the first time
        gradient = self._gradients(active)
        with _enough("tau2", self.tau2):
            delta = self._best(active, gradient, [choose(b, self.tau2, self.generator) for b in batches])
        lr = joint_lr(self.param_groups)
        before = self._objective(loss) if loss is not None else 0.0
        self._update = {p: lr * d for p, d in delta.items()}
        plain = {p for g in self.param_groups for p in g["params"] if p.grad is not None} - set(delta)
        for p, d in self._update.items():
            p.add_(d)
        if self.adapt and self.k % self.T1 == 0:
            assert closure is not None
            self._adjust(closure, before, lr)
        if plain:  # after λ, whose ratio is that of the quadratic model's own step
            self._apply_plain(plain)

    def _say_ignored(self) -> None:
        """Warn once where a group's damping or weight_decay is no longer what the quadratic model uses."""
        groups = [group for group in self.param_groups if group["approximation"] != "none"]
        given = [(group["damping"], group["weight_decay"]) for group in groups]
        if self._given is None:
            self._given = given
        elif given != self._given:
            self._given = given
            say_once(
                "a group's damping or weight_decay has changed, which KFAC with rescale=True reads only when it is "
                f"created; λ = {self.lam:g} and η = {self.eta:g} stay: assign opt.lam, or create a new optimizer for "
                "another weight_decay."
            )

    def _gradients(self, active: list[Layer]) -> Tensors:
        """∇h with the ℓ₂ term."""
        return {
            p: p.grad.add(p, alpha=self.eta)
            for layer in active
            for p in layer.parameters.values()
            if p.grad is not None
        }

    def _best(self, active: list[Layer], gradient: Tensors, batches: list[Inputs]) -> Tensors:
        """The update δ = αΔ + μδ₀ for the best γ, by the value of the quadratic model."""
        assert self._watcher is not None
        assert self.moments is not None
        forms = FisherForms(self._watcher, self.likelihood, batches)
        previous = {p: d for p, d in self._update.items() if p in gradient} if self.use_momentum else {}
        before = forms.tangents(previous) if previous else None
        candidates = [self.gamma]
        if self.adapt and self.k % self.T2 == 0:
            candidates += [self.omega2 * self.gamma, self.gamma / self.omega2]
        best: tuple[float, float, dict[str, float], Tensors] | None = None
        cache = dict.fromkeys(candidates)
        for gamma in candidates:
            cache[gamma] = made = self._for_gamma(gamma)
            proposal = {p: -dense(d) for p, d in self._solve(made, active).items() if p in gradient}
            directions = [proposal, previous] if previous else [proposal]
            tangents = [forms.tangents(proposal), before] if before is not None else [forms.tangents(proposal)]
            n, shift = len(directions), self.lam + self.eta
            quadratic, linear = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
            for i in range(n):
                linear[i] = dot(gradient, directions[i])
                for j in range(i, n):
                    form = forms.form(tangents[i], tangents[j]) + shift * dot(directions[i], directions[j])
                    quadratic[i, j] = quadratic[j, i] = form
            c = minimise(quadratic, linear)
            value = float(0.5 * c @ quadratic @ c + linear @ c)
            if best is None or value < best[0]:
                found = {"alpha": float(c[0]), "mu": float(c[1]) if n == 2 else 0.0, "decrease": -value,
                         "linear": float(linear @ c), "quadratic": float(c @ quadratic @ c)}  # fmt: skip
                best = (value, gamma, found, combine(list(zip(c.tolist(), directions, strict=True))))
        assert best is not None
        self.gamma, self.last = best[1], best[2]
        self._preconditioner = ((self.gamma,), cache[self.gamma])  # type: ignore[assignment]
        return best[3]

    @timing.part("inversion")
    def _for_gamma(self, gamma: float) -> Preconditioner:
        """The damped inverse of the last snapshot for one γ."""
        assert self.moments is not None
        if self._preconditioner is not None and self._preconditioner[0] == (gamma,):
            return self._preconditioner[1]
        rules = {layer.name: FactoredTikhonov(gamma) if gamma else None for layer in self.moments.space.layers}
        return Preconditioner(self.moments.build(), rules, invert=self.T >= INVERT_FROM)

    def _apply_plain(self, parameters: set[nn.Parameter]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p in parameters and p.grad is not None:
                    p.add_(p.grad.add(p, alpha=group["weight_decay"]), alpha=-float(group["lr"]))

    def _objective(self, loss: Any) -> float:
        """H = loss + η/2 ‖θ‖²; the loss is the mean of the processes', as DistributedDataParallel's gradient is."""
        weights = {p: p.detach() for layer in self._active() for p in layer.parameters.values()}
        squares = dot(weights, weights) if self.eta else 0.0
        own = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return mean(own, self.generator.device) + self.eta / 2 * squares

    def _adjust(self, closure: Callable[[], Any], before: float, lr: float) -> None:
        """λ by the reduction ratio ρ (section 6.5); the closure's gradients and side effects are undone."""
        after = self._objective(self._evaluate(closure))
        change = lr * self.last["linear"] + 0.5 * lr**2 * self.last["quadratic"]
        rho = (after - before) / change if change < 0 else 0.0
        self.last["rho"] = rho
        if rho > 0.75:
            self.lam *= self.omega1
        elif not rho >= 0.25:  # NaN included
            self.lam /= self.omega1

    # ---- saving
    # ----------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        state = super()._own_state()
        if self.rescale:
            names = {p: name for layer in self.layers for name, p in layer.parameters.items()}
            state["adaptive"] = {
                "lam": self.lam, "gamma": self.gamma, "last": dict(self.last),
                "update": {names[p]: d.clone() for p, d in self._update.items()},
            }  # fmt: skip
        return state

    def _load_own_state(self, state: dict[str, Any]) -> None:
        if self.rescale != ("adaptive" in state):
            raise ValueError("the state is that of a KFAC with another rescale=; create the optimizer as it was then.")
        super()._load_own_state(state)
        if self.rescale:
            own = state["adaptive"]
            self.lam, self.gamma, self.last = own["lam"], own["gamma"], dict(own["last"])
            self._given = None  # the groups are those of the saved run
            parameters = {name: p for layer in self.layers for name, p in layer.parameters.items()}
            self._update = {parameters[name]: d.to(parameters[name].device) for name, d in own["update"].items()}


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
