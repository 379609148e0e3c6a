"""Thin presets of NaturalGradient: FOOF, CW-NGD, EKFAC and TENGraD.

Each is one constructor; what they do is in `optimizer`. lr, momentum and κ are one rule's for all; λ is 0.1 where F is
averaged over steps and 1 where it is one mini-batch's, of low rank. `PAPER` has the papers' values. FOOF: Benzing 2021,
eq. 4; CW-NGD: Sang et al. 2022, algorithm 1; EKFAC: George et al. 2018; TENGraD: Soori et al. 2021 as in Shrestha 2023,
eq. 37-43.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict, Unpack

from torch import Tensor, nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Damping
from fisherviz.optim.exact import BatchUnits
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.options import DIRECTION, require_known
from fisherviz.support import choices

ModelLikelihood = str | Likelihood | nn.Module
Output = Callable[[Any], Tensor] | None


class FOOF(NaturalGradient):
    """Gradient descent on neuron outputs: (A + λI)⁻¹ ⊗ I, from activations alone (Benzing 2021, equation 4).

    A is the mean over examples, summed over weight-sharing positions; no labels are drawn, and there is no
    second
    backward pass. Benzing's public code sums A over the batch: divide its learning rate and λ by the batch
    size.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`; FOOF takes from it only which outputs the loss leaves out.
        params: parameter groups, None for all.
        lr: learning rate.
        damping: λ.
        momentum: of the preconditioned gradient.
        weight_decay: ℓ₂ coefficient.
        T: steps between inversions.
        decay: of the average of A.
        kl_clip: κ, as for `NaturalGradient`: bounds the change of the layers' outputs.
        output: picks the output tensor from what the model returns.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"lr": 0.3, "damping": 1.0, "momentum": 0.0, "kl_clip": math.inf}

    def __init__(
        self,
        model: nn.Module,
        likelihood: ModelLikelihood,
        *,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        damping: float | Damping = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        T: int = 1,
        decay: float = 0.95,
        kl_clip: float = 1e-3,
        output: Output = None,
    ) -> None:
        super().__init__(
            model, likelihood, "foof", params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, T=T, decay=decay, kl_clip=kl_clip, output=output,
        )  # fmt: skip


class CWNGD(NaturalGradient):
    """Component-wise natural gradient descent (Sang et al. 2022, algorithm 1).

    Blocks of one output unit or channel of the batch's summed empirical Fisher, with the mean gradient: the scores
    are read from the user's own backward, over the unit's fan-in or over the examples, whichever is smaller.

    Algorithm 1 leaves open whether its COST is the batch's sum or mean. Read as the mean over P examples, each score
    carries a 1/P: `CWNGD.paper` takes `loss_scale=1.0, lr=1/P`, which is a natural gradient of the mean Fisher with
    damping γ P, and which comes near the paper's table I where the literal reading does not (figures/claims.md).

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        params: parameter groups, None for all.
        lr: the paper's α, which is 1 there.
        damping: the paper's γ, which is 1e-4 there. It is added to sums over the batch: 100 with lr=10 is, for 100
            examples, λ = 1 with lr=0.1 beside means.
        momentum: of the preconditioned gradient.
        weight_decay: ℓ₂ coefficient.
        T: steps between factorisations.
        loss_scale: c where the loss that is backpropagated is c times the sum of the examples' nll; None: 1/N, the
            mean, but for a categorical likelihood whose outputs have positions, or some of them left out, what the
            loss's own gradient tells. A GradScaler, which multiplies by a scale of its own, is refused
            for kind "empirical".
        kl_clip: κ, as for `NaturalGradient`; of the mean Fisher.
        kind: "empirical" (the paper), "mc" or "exact".
        output: picks the output tensor from what the model returns.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"lr": 1.0, "damping": 1e-4, "momentum": 0.0, "kl_clip": math.inf}

    def __init__(
        self,
        model: nn.Module,
        likelihood: ModelLikelihood,
        *,
        params: Iterable[Any] | None = None,
        lr: float = 10.0,
        damping: float | Damping = 100.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        T: int = 1,
        loss_scale: float | None = None,
        kl_clip: float = 1e-3,
        kind: str = "empirical",
        output: Output = None,
    ) -> None:
        choices.one_of("kind", kind, KINDS)
        super().__init__(
            model, likelihood, BatchUnits, params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, T=T, decay=0.0, kind=kind, reduction="sum", loss_scale=loss_scale,
            kl_clip=kl_clip, output=output,
        )  # fmt: skip


class EKFACKeywords(TypedDict, total=False):
    """Rare options of `EKFAC`."""

    samples: int
    setting: str
    kl_clip: float


class EKFAC(NaturalGradient):
    """KFAC's eigenbasis with the running second moment of the gradient in it (George et al. 2018).

    The basis is renewed every T steps, and the second moments start again in it; in between they are
    averaged.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        params: parameter groups, None for all.
        lr: learning rate.
        damping: λ, added to the eigenvalues.
        momentum: of the preconditioned gradient.
        weight_decay: ℓ₂ coefficient.
        T: steps between eigendecompositions.
        decay: of the factors and of the second moments.
        kind: "mc", "exact" or "empirical".
        samples: labels per example for kind "mc".
        setting: "expand" or "reduce", of the factors under weight sharing.
        kl_clip: κ, as for `NaturalGradient`.
        output: picks the output tensor from what the model returns.
    """

    Options: ClassVar[type] = EKFACKeywords
    PAPER: ClassVar[Mapping[str, Any]] = {"lr": 1e-2, "damping": 1e-2, "kl_clip": math.inf}

    def __init__(
        self,
        model: nn.Module,
        likelihood: ModelLikelihood,
        *,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        damping: float | Damping = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        T: int = 20,
        decay: float = 0.95,
        kind: str = "mc",
        output: Output = None,
        **options: Unpack[EKFACKeywords],
    ) -> None:
        require_known(type(self), options)
        options.setdefault("kl_clip", DIRECTION["kl_clip"])
        choices.one_of("kind", kind, KINDS)
        super().__init__(
            model, likelihood, "ekfac", params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, T=T, decay=decay, kind=kind, output=output,
            **options,
        )  # fmt: skip


class TENGraD(NaturalGradient):
    """Exact Fisher block of each layer by Woodbury in example space (Soori et al. 2021; Shrestha 2023).

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        params: parameter groups, None for all.
        lr: learning rate.
        damping: λ.
        momentum: of the preconditioned gradient.
        weight_decay: ℓ₂ coefficient.
        T: steps between factorisations; the block is that of the last such step's batch.
        kind: "mc" (the authors' code) or "empirical" (Shrestha, equation 37).
        loss_scale: c where the loss that is backpropagated is c times the sum of the examples' nll; None: 1/N, the
            mean, but for a categorical likelihood whose outputs have positions, or some of them left out, what the
            loss's own gradient tells. A GradScaler, which multiplies by a scale of its own, is refused
            for kind "empirical".
        kl_clip: κ, as for `NaturalGradient`; of the batch's own damped Fisher.
        output: picks the output tensor from what the model returns.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"lr": 0.01, "damping": 0.1, "kind": "empirical", "kl_clip": math.inf}

    def __init__(
        self,
        model: nn.Module,
        likelihood: ModelLikelihood,
        *,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        damping: float | Damping = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        T: int = 1,
        kind: str = "mc",
        loss_scale: float | None = None,
        kl_clip: float = 1e-3,
        output: Output = None,
    ) -> None:
        choices.one_of("kind", kind, KINDS)
        super().__init__(
            model, likelihood, "layer", params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, T=T, decay=0.0, kind=kind, loss_scale=loss_scale, kl_clip=kl_clip,
            output=output, dense_parameters=0,
        )  # fmt: skip
