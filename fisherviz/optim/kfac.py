"""KFAC, complete (Martens & Grosse 2015, sections 5 to 9) or plain, with fixed damping.

Complete: algorithm 2, whose step rule is in `rescaled`. Plain: what Benzing (2021) compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, TypedDict, Unpack

from torch import Tensor, nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.optim.directions import Directions, Preconditioned
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.options import DIRECTION, MODEL, NaturalGradientOptions, filled, require_known
from fisherviz.optim.rescaled import QuadraticModel
from fisherviz.optim.rules import StepRule
from fisherviz.support import choices

METHODS = {"block-diagonal": "kfac", "block-tridiagonal": "kfac-tridiagonal"}


class KFACKeywords(TypedDict, total=False):
    """Rare options of `KFAC`."""

    decay: float
    samples: int
    kl_clip: float | None
    min_damping: float | None
    heuristic_damping: bool
    setting: str | None
    T1: int
    T2: int
    tau1: float
    tau2: float
    omega1: float | None
    omega2: float | None
    gamma_by: str
    ownership: str
    output: Callable[[Any], Tensor] | None


class KFAC(NaturalGradient):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015).

    On mini-batches the quadratic model of a few examples is of low rank, and the natural gradient's noise alone has a
    KL divergence of P/(2N): so λ stays at `min_damping` or above, and no step's δᵀFδ exceeds `kl_clip`.
    `KFAC.paper` has neither, and starts at the λ₀ that the paper has for its autoencoders and growing batches.

    The complete optimizer assumes that the criterion is the likelihood's mean nll, and takes `step(closure)`.
    Under DistributedDataParallel every process steps with its own part of the batch, and all take the same step: the
    exact F and the factors are means over all examples, the loss is the mean of the processes'.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        inverse: "block-diagonal" (Ǧ) or "block-tridiagonal" (F̂).
        params: parameter groups, None for all.
        lr: learning rate; None: 1 with `rescale`, 0.1 without.
        damping: λ₀ where λ is adapted, λ otherwise; with `rescale` read once, like weight_decay: later change
            `lam`. None: 1 with `rescale`, 0.1 without; the paper's λ₀ is 150.
        momentum: with `rescale`, 0 turns the 2 × 2 system off and anything else leaves it on; without, of
            the direction; None: on, 0.9 without.
        weight_decay: η, part of the quadratic model with `rescale`; None: 1e-5 with `rescale`, 0 without.
        T: the paper's T₃, steps between inverses; None: 20 with `rescale` (and the first 3 steps), 1 without.
        decay: largest decay; the decay of step k is min(1 − 1/k, decay).
        kind: "mc", "exact" or "empirical".
        samples: labels per example for kind "mc".
        kl_clip: κ, as for `NaturalGradient`.
        min_damping: what λ never falls below where it is adapted; None: 1, the paper's is 0.
        rescale: whether proposals are re-scaled by the exact F (section 6.4).
        adapt: whether λ and γ are adapted (sections 6.5 and 6.6); needs `rescale`.
        T1: steps between adjustments of λ.
        T2: steps between searches for γ; a multiple of T.
        tau1: share of the mini-batch that the factors are estimated on.
        tau2: share that the exact F is estimated on.
        omega1: factor of λ; None: (19/20)^T1.
        omega2: factor of γ; None: (19/20)^(T2/2).
        gamma_by: what the search for γ goes by (section 6.6): "model", the quadratic model's value, which costs nothing
            more, or "objective", h(θ + δ) on the mini-batch: the closure is evaluated for each of the three candidates.
        heuristic_damping: True: factored Tikhonov, γ = √λ (equation 7); False, block-diagonal only: λ added to the
            products' eigenvalues (equation 6), γ² for the complete optimizer's proposals.
        setting: "expand" or "reduce", of the factors under weight sharing.
        ownership: of layers' inverses among several processes, as for `NaturalGradient`; "one" takes the block-diagonal
            inverse.
        output: picks the output tensor from what the model returns.

    Raises:
        ValueError: options contradict each other.
        RuntimeError: `step()` without a closure where one is needed.
    """

    Options: ClassVar[type] = KFACKeywords
    PAPER: ClassVar[Mapping[str, Any]] = {"lr": 1.0, "damping": 150.0, "kl_clip": math.inf}

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        inverse: str = "block-diagonal",
        params: Iterable[Any] | None = None,
        lr: float | None = None,
        damping: float | Damping | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        T: int | None = None,
        kind: str = "mc",
        rescale: bool = True,
        adapt: bool = True,
        **options: Unpack[KFACKeywords],
    ) -> None:
        require_known(type(self), options)
        choices.flag("rescale", rescale)
        choices.one_of("inverse", inverse, METHODS)
        self.adapt, self.heuristic_damping = adapt, options.pop("heuristic_damping", True)
        choices.flag("heuristic_damping", self.heuristic_damping)
        if not self.heuristic_damping and inverse == "block-tridiagonal":
            raise ValueError(
                "the block-tridiagonal inverse plus λI has no closed form (section 6.3); leave heuristic_damping=True, "
                "or take inverse='block-diagonal'."
            )
        if options.get("setting") is None:
            options.pop("setting", None)
        given = {
            "lr": lr, "damping": damping, "momentum": momentum, "kl_clip": options.pop("kl_clip", None),
            "min_damping": options.pop("min_damping", None),
        }  # fmt: skip
        trained: dict[str, Any] = filled(given, MODEL if rescale else DIRECTION | {"damping": 0.1})
        super().__init__(
            model, likelihood, METHODS[inverse], params=params,
            weight_decay=(1e-5 if rescale else 0.0) if weight_decay is None else weight_decay,
            T=(20 if rescale else 1) if T is None else T, kind=choices.one_of("kind", kind, KINDS), ramp=True,
            rescale=rescale, adapt=adapt, **options, **trained,
        )  # fmt: skip

    @classmethod
    def paper(cls, model: nn.Module, likelihood: str | Likelihood | nn.Module, **options: Any) -> Self:
        """The optimizer with its paper's values wherever no other is given; plain, it has no momentum.

        Args:
            model: as for the class.
            likelihood: as for the class.
            **options: of the class.

        Returns:
            The optimizer.
        """
        own = {"min_damping": 0.0} if options.get("rescale", True) else {"momentum": 0.0}
        return super().paper(model, likelihood, **{**own, **options})

    def _compose(self, options: NaturalGradientOptions, defaults: dict[str, Any]) -> tuple[Directions, StepRule[Any]]:
        rule = super()._compose(options, defaults)[1]
        if isinstance(rule, QuadraticModel):
            rule.factored = self.heuristic_damping
        read = factored if self.heuristic_damping else as_damping
        return Preconditioned(read, owned=options.ownership == "one"), rule


def factored(damping: float | Damping) -> Damping | None:
    """λ as factored Tikhonov, γ = √λ (section 6.3)."""
    rule = as_damping(damping)
    if isinstance(rule, Tikhonov):
        return FactoredTikhonov(math.sqrt(rule.value)) if rule.value else None
    return rule
