"""NaturalGradient: any approximation, any damping, any step rule, in a plain training loop.

θ ← θ − lr · (F̂ + damping)⁻¹ ∇h with momentum after preconditioning, or as the quadratic model scales it. Statistics
come from the user's own forwards and backwards (`watcher`); `directions` and `rules` take the step from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood, resolve
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Damping
from fisherviz.optim import settings
from fisherviz.optim.averages import Moments
from fisherviz.optim.directions import Directions, Preconditioned, Step
from fisherviz.optim.exact import ExactFisher
from fisherviz.optim.options import (
    DIRECTION,
    GIVEN,
    MODEL,
    NaturalGradientOptions,
    check_ownership,
    filled,
    split_options,
)
from fisherviz.optim.passes import Wanted
from fisherviz.optim.rescaled import QuadraticModel
from fisherviz.optim.rules import ModelRule, Momentum, StepRule, TrustRegion, descend
from fisherviz.optim.selection import precision_of, unwrap
from fisherviz.optim.watching import Watching
from fisherviz.support import choices
from fisherviz.support.tables import counted, html_table


class NaturalGradient(Watching):
    """Preconditions the gradient with a damped approximation of the Fisher.

    Outputs that the loss leaves out, told by its gradient, are in no statistic: padding under `ignore_index`, say. The
    Fisher is the mean over examples of sums over their positions, whatever the loss is a mean over; the quadratic model
    of `rescale` takes the loss's own scale.

    Args:
        model: the model that is trained; its forwards in training mode are watched.
        likelihood: as for `fv.Probe`; the criterion is its mean nll over the batch unless `loss_scale` says otherwise.
        method: "exact" (dense, small networks), any name in `fv.approximations`, or an `Approximation`.
        params: torch parameter groups, None for all; a group with approximation="none" is left to plain SGD.
        lr: learning rate; None: 0.1, with damping 1, momentum 0.9 and kl_clip 1e-3 where they are not given; with
            `rescale` 1, and 1, 1, 0.1 and min_damping 1.
        damping: λ, added to the matrix, or a `Tikhonov` or `FactoredTikhonov`; a group may have its own.
        momentum: of the preconditioned gradient; None: 0 where lr is given.
        weight_decay: ℓ₂ coefficient, added to the gradient before it is preconditioned.
        T: steps between factorisations.
        decay: weight of the past in the moving averages; 0 for the statistics of the step's own passes.
        kind: "exact", "mc" or "empirical"; None: "exact" for method "exact", otherwise "mc".
        output: picks the output tensor from what the model returns.
        ramp: whether the decay starts as min(1 − 1/k, decay), as in the K-FAC paper.
        samples: sampled labels per example for kind "mc".
        reduction: whether the Fisher is the "mean" or the "sum" over the step's examples.
        rescale: whether the preconditioned gradients are re-scaled by the exact F on the mini-batch, as algorithm 2 of
            the K-FAC paper does, for any method: lr is then 1, damping is λ₀, weight_decay is η, and with a momentum
            above 0 the last step takes part. Factors, where there are two, are damped with γ, other matrices with γ².
        adapt: whether λ and γ are adapted; needs `rescale`, and `step(closure)`.
        kl_clip: κ; a step δ is shortened to δᵀFδ ≤ κ, about twice the KL divergence between the predictions before and
            after, before momentum adds it up (Ba et al. 2017, section 5). With F as it is damped, so that FOOF's is
            that of the layers' outputs. None: no bound where lr is given, like math.inf.
        min_damping: what λ never falls below where it is adapted; None: 0 where lr is given.
        T1: as for `KFAC`, like T2, tau1, tau2, omega1, omega2 and gamma_by.
        loss_scale: c where the loss that is backpropagated is c times the sum of the examples' nll, for kind
            "empirical", whose scores are read from that backward; None: 1 for an nn loss with reduction="sum",
            otherwise 1/N, but for a categorical likelihood whose outputs have positions, or some of them left out, what
            the loss's own gradient tells. A loss multiplied by s by hand, its gradients divided again before the step,
            has c = s/N; a GradScaler, whose s changes, is refused.
        ownership: of layers' inverses among the processes that train together: "all" factorise every layer and send
            nothing for it, or each layer is "one"'s, who alone inverts it and sends the others its direction: a share
            of the memory and the work for P numbers per step (KAISA's COMM-OPT and MEM-OPT, Pauloski et al. 2021,
            section 3.2; there the inverses are sent in the first). Steps are equal up to rounding.
        **options: of the approximation, such as setting="reduce".

    Raises:
        ValueError: an option is out of range or unknown.
        TypeError: the model is no module, the likelihood cannot be told, or damping or loss_scale is no number.
        RuntimeError: the model is compiled already.

    Example:
        >>> import torch, fisherviz as fv
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = fv.optim.NaturalGradient(model, "categorical", "kfac", lr=0.1, damping=1e-2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.step(); opt.zero_grad()
    """

    Options: ClassVar[type] = NaturalGradientOptions
    """The rare ones."""
    PAPER: ClassVar[Mapping[str, Any]] = {}
    """Options that a preset's paper has other values of."""
    grad_scale: Tensor | None
    found_inf: Tensor
    """Both there only while a GradScaler calls `step`."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        method: str | type[Approximation] | Approximation = "exact",
        *,
        params: Iterable[Any] | None = None,
        lr: float | None = None,
        damping: float | Damping | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        T: int = 1,
        decay: float = 0.95,
        kind: str | None = None,
        output: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        model = unwrap(model)
        self.likelihood = resolve(likelihood)
        rare, self.approximation = split_options(type(self), method, options)
        if rare.ownership != "all":
            check_ownership(self.approximation)
        if kind is None:
            kind = "exact" if isinstance(self.approximation, ExactFisher) else "mc"
        self.kind = choices.one_of("kind", kind, KINDS)
        choices.count("T", T)
        choices.number("decay", decay, 0.0, 1.0)
        settings.check_output(output)
        self.T, self.decay, self.ramp = T, decay, rare.ramp
        self.reduction, self.samples = rare.reduction, rare.samples
        self.k = 0
        """Steps taken."""
        own = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "kl_clip": rare.kl_clip,
            "min_damping": rare.min_damping,
        }
        defaults = filled(own, GIVEN if lr is not None else MODEL if rare.rescale else DIRECTION)
        region = TrustRegion(defaults.pop("kl_clip"), defaults.pop("min_damping"))
        defaults |= {"weight_decay": weight_decay, "approximation": None}
        settings.check_group(defaults)
        self.directions, self.rule = self._compose(rare, defaults)
        self.rule.region = region
        if region.min_damping and not self.rescale:
            raise ValueError("min_damping bounds a λ that is adapted (rescale=True); here λ is damping.")
        super().__init__(list(model.parameters()) if params is None else settings.as_groups(params), defaults)
        for group in self.param_groups:
            settings.check_group(group)
        self.rule.begin(self.param_groups, self.defaults, T)
        self._needs_inputs = self.directions.inputs or self.rule.inputs
        self._needs_closure = self.directions.needs_closure or self.rule.needs_closure
        self._watch(model, output)
        if self.layers:
            summed_loss = isinstance(likelihood, nn.Module) and getattr(likelihood, "reduction", "") == "sum"
            loss_scale = 1.0 if summed_loss and rare.loss_scale is None else rare.loss_scale
            self._listen(self._wanted(loss_scale))

    @classmethod
    def paper(cls, model: nn.Module, likelihood: str | Likelihood | nn.Module, **options: Any) -> Self:
        """The optimizer with its paper's values wherever no other is given.

        Args:
            model: as for the class.
            likelihood: as for the class.
            **options: of the class.

        Returns:
            The optimizer.
        """
        return cls(model, likelihood, **{**cls.PAPER, **options})

    def _compose(self, options: NaturalGradientOptions, defaults: dict[str, Any]) -> tuple[Directions, StepRule[Any]]:
        """What turns gradients into directions, and what gives these their length."""
        if not options.rescale:
            return Preconditioned(owned=options.ownership == "one"), Momentum()
        for name, value, needed in (("kind", self.kind, KINDS[:2]), ("reduction", self.reduction, ("mean",))):
            if value not in needed:
                raise ValueError(
                    f"with rescale=True {name} must be {' or '.join(map(repr, needed))}, got {value!r}: steps are "
                    "scaled by the mean F, and the statistics come from a forward of their own, without labels."
                )
        rule = QuadraticModel(options, momentum=defaults["momentum"] > 0)
        defaults["momentum"] = 0.0  # it is part of the rule; a plain group may have its own
        return Preconditioned(owned=options.ownership == "one"), rule

    @property
    def rescale(self) -> bool:
        """Whether steps minimise the quadratic model."""
        return isinstance(self.rule, ModelRule)

    @property
    def lam(self) -> float:
        """λ of the quadratic model; 0 without one."""
        return self.rule.lam

    @lam.setter
    def lam(self, value: float) -> None:
        if not self.rescale:
            raise AttributeError("λ is the damping of the groups here; there is no quadratic model (rescale=False).")
        self.rule.lam = value

    @property
    def gamma(self) -> float:
        """γ of the factored damping that the quadratic model searches; 0 without one."""
        return self.rule.gamma if self.rescale else 0.0  # type: ignore[attr-defined]

    @property
    def last(self) -> dict[str, float]:
        """What the last step did: alpha, mu, decrease (M(0) − M(δ)), and rho where λ was adjusted."""
        return self.rule.last if isinstance(self.rule, ModelRule) else {}

    def _wanted(self, loss_scale: float | None) -> Wanted:
        labels = self._reads_labels()
        return Wanted(
            source=self._source() if self.kind != "empirical" else None,
            scores=self.kind == "empirical",
            structured=labels,
            loss_scale=loss_scale,
            curvature=isinstance(self.rule, ModelRule),
            local=self._hears(),
            inputs=self._needs_inputs,
            captures=self.directions.captures and self.rule.captures,
        )

    def _hears(self) -> bool:
        """Whether the rows behind gradients can be of use."""
        return self.directions.reads_rows and not all(group["weight_decay"] for group in self.param_groups)

    # ---- the step ------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: zeroes the gradients, evaluates the loss, backpropagates and returns it; its forward counts.
                Needed, and evaluated again at other weights, with adapt=True and by KBFGS, HessianFree and KSD.

        Returns:
            What the closure returned at the old weights.

        Raises:
            RuntimeError: a closure is needed and missing, a preconditioned layer has a gradient but no statistics since
                the last step, or a GradScaler scaled the scores that kind "empirical" reads.
            TypeError: a closure returns no number where its losses are compared.
        """
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """The step itself: torch puts step hooks around each class's `step`, so that none may call another's."""
        self._refuse_scaler()
        if self._needs_closure and closure is None:
            raise RuntimeError(self._needs_closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._needs_closure and self.rescale:  # before anything of the step is kept
            settings.value_of(loss)
        with torch.autocast(self.generator.device.type, enabled=False):
            self._check_type(kept=bool(self.decay or self.T > 1 or self._needs_closure))
            self._check_passes()
            if any(p.grad is not None for group in self.param_groups for p in group["params"]):
                self.k += 1
                self._advance(loss, closure)
        self._precision = precision_of(self.layers)
        self._forget(stepped=True)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Torch's protocol: a GradScaler announces itself before `step` to optimizers that say True here."""
        told = self._reads_scores or any(not made.guessed for made in self._passes)
        return bool(self._needs_closure) or told

    @property
    def _reads_scores(self) -> bool:
        return self._watcher is not None and self._watcher.wanted.scores

    def _refuse_scaler(self) -> None:
        if not hasattr(self, "found_inf"):
            return
        del self.found_inf, self.grad_scale  # torch leaves them there when `step` raises
        self._forget()
        if self._needs_closure:
            raise RuntimeError(settings.SCALED_CLOSURE)
        raise RuntimeError(settings.SCALED if self._reads_scores else settings.SCALED_POSITIONS)

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        if self._watcher is None or self.moments is None:
            descend(self.param_groups, self.state, {})
            return
        step = Step(
            k=self.k, T=self.T, due=self.rule.due(self.k, self.T), reduction=self.reduction,
            decay=min(1 - 1 / self.k, self.decay) if self.ramp else self.decay,
            groups=self.param_groups, state=self.state, active=self._active(), passes=self._passes,
            moments=self.moments, watcher=self._watcher, source=self._source(), generator=self.generator,
            loss=loss, closure=closure,
        )  # fmt: skip
        self.rule.take(step, self.directions)
        if self._watcher.wanted.local != self._hears():
            self._watcher.wanted = replace(self._watcher.wanted, local=self._hears())

    def _seen(self, layer: Layer) -> bool:
        if not self._captures:
            return bool(self._passes) and self.rule.knows(layer, self.moments)
        return super()._seen(layer)

    # ---- what it says of itself ----------------------------------------------------------------------------

    def __repr__(self) -> str:
        own = f"method {self.approximation.name}, kind {self.kind}, decay {self.decay:g}, T {self.T}"
        shown = ("damping", "lr", "momentum")
        groups = settings.group_rows(self.param_groups)
        said = "; ".join(", ".join(f"{name} {row[name]}" for name in shown).replace("damping λ", "λ") for row in groups)
        steps = f"{counted(len(self.layers), 'layer')}, {counted(self.k, 'step')} taken"
        adapted = f"; {self.rule.words}".format(self.lam) if self.rule.words else ""
        return f"{type(self).__name__}({own}; {said}{adapted}; {steps})"

    def _repr_html_(self) -> str:
        groups = settings.group_rows(self.param_groups)
        rows = [[str(k), *row.values()] for k, row in enumerate(groups)]
        return html_table(["group", *groups[0]], rows, caption=repr(self))

    # ---- saving --------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Refused: hooks and averages belong to one model, and a copy would have neither."""
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled; use state_dict() and load_state_dict().")

    def state_dict(self) -> dict[str, Any]:
        """Torch's state and "fisherviz": generator, averages and what the cached factorisations are made from.

        Nothing of it changes with later steps: all tensors are copies.
        """
        made = super().state_dict()
        kept = {
            key: {name: each.clone() if isinstance(each, Tensor) else each for name, each in of_one.items()}
            for key, of_one in made["state"].items()
        }
        groups = settings.plain_groups(made["param_groups"])
        return made | {"state": kept, "param_groups": groups, "fisherviz": self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`; training goes on bit for bit.

        Raises:
            ValueError: the state is another optimizer's, network's or method's.
        """
        settings.check_state(state_dict, self._own_state())
        try:
            self.directions.check_state(state_dict["fisherviz"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(settings.DAMAGED.format(error)) from error
        groups = settings.whole_groups(state_dict["param_groups"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "fisherviz"} | {"param_groups": groups})
        try:
            self._load_own_state(state_dict["fisherviz"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(settings.DAMAGED.format(error)) from error

    def _own_state(self) -> dict[str, Any]:
        names = {p: name for layer in self.layers for name, p in layer.parameters.items()}
        return {
            "method": self.approximation.name,
            "precision": precision_of(self.layers),
            "groups": settings.group_names(self.model, self.param_groups),
            "shapes": {name: list(p.shape) for p, name in names.items()},
            "k": self.k,
            "generator": self.generator.get_state(),
            "moments": None if self.moments is None else self.moments.state_dict(),
            **self.directions.state_dict(names),
            **self.rule.state_dict(names),
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.k, self._precision = state["k"], ""
        self.generator.set_state(state["generator"].cpu())
        self._passes, self.moments = [], None
        if state["moments"] is not None:
            self.moments = Moments.from_state(self.approximation, self.network, state["moments"], self._defers)
            if self._watcher is not None:
                self._watcher.generic_diagonal = any(not layer.structured for layer in self.moments.space.layers)
        parameters = {name: p for layer in self.layers for name, p in layer.parameters.items()}
        self.directions.load_state_dict(state, parameters)
        self.rule.load_state_dict(state, parameters)
