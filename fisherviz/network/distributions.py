"""Predictive distributions r(y|z) of a network's output z: densities, samples, output Fishers and their factors.

The loss of one example is -log r(y|z); the output Fisher is F_R(z) = E_y[score scoreᵀ] = S Sᵀ
(Martens & Grosse 2015, section 2).
Everything above relies on `vectors`: the columns of S, ready to be backpropagated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fisherviz.support import choices

SECOND = (
    "the second part of a batch is its targets, and inputs that a model takes together go in a tuple of their own, "
    "((a, b), targets or None), or in a dictionary"
)
"""What to know where a second input may have been taken for targets."""
_LOST = 1e-4
"""Share of a Gaussian's standard deviation that rounding may take of a drawn label."""


class Likelihood(ABC):
    """A predictive distribution r(y|z) whose negative logarithm is the loss of one example.

    Outputs z have shape (N, D), (N,) which means (N, 1), or with further positions for `Categorical`, which alone takes
    targets that leave positions out.
    """

    name: str

    @abstractmethod
    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood of each example, shape (N,), up to a constant that z does not enter."""

    @abstractmethod
    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Derivative of the negative log-likelihood with respect to z, shape of z."""

    @abstractmethod
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One label per example drawn from r(y|z)."""

    def num_vectors(self, z: Tensor) -> int:
        """Number K of columns of the factor S; unless a distribution knows better, one per output."""
        return math.prod(z.shape[1:])

    @abstractmethod
    def vectors(self, z: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns start..stop of the factor S with S Sᵀ = F_R(z), shape `(stop - start, *z.shape)`."""

    @abstractmethod
    def product(self, z: Tensor, t: Tensor) -> Tensor:
        """Product F_R(z) t for each example, shape of z."""

    @abstractmethod
    def check_targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the targets in the shape that `nll` takes; ValueError or TypeError if they cannot belong to z."""

    @abstractmethod
    def describe(self) -> str:
        """How the likelihood prints, with its scale."""

    def factor(self, z: Tensor) -> Tensor:
        """Factor S of the output Fisher, shape (N, D, K), with S Sᵀ = F_R(z)."""
        return self.vectors(z.unsqueeze(1) if z.dim() == 1 else z).flatten(2).permute(1, 2, 0)

    def fisher(self, z: Tensor) -> Tensor:
        """Output Fisher F_R(z) of each example, shape (N, D, D)."""
        factor = self.factor(z)
        return factor @ factor.transpose(1, 2)

    def check_output(self, z: Tensor) -> None:
        """Raise ValueError if z cannot parameterise this distribution."""
        if z.dim() == 0:
            raise ValueError(f"the model's output is a scalar; a {self.name} likelihood needs one row per example.")
        if z.is_complex():
            raise ValueError(
                f"the model's output is complex; a {self.name} likelihood needs real numbers: give them by "
                "output=torch.view_as_real, say."
            )

    def check_data(self, z: Tensor, y: Tensor) -> None:
        """Raise ValueError or TypeError if the data's targets cannot belong to z, whether or not a kind reads them.

        More than `check_targets` takes may pass: targets that say what z should be, in a form without a score.
        """
        self.check_targets(z, y)

    def may_be_targets(self, y: Tensor) -> bool:
        """Whether a tensor could be targets of some outputs: False where it is certainly none."""
        return True

    def counted(self, y: Tensor) -> Tensor | None:
        """The positions (N, ...) that targets do not leave out; None: they leave none out."""
        return None

    def only(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """Values `(..., *z.shape)` times a weight of each position (N, ...), 0 where it is left out; None: 1."""
        return values

    def reached(self, z: Tensor, gradient: Tensor) -> Tensor | None:
        """The positions (N, ...) that a loss with this gradient at z does not leave out; None: it leaves none out."""
        return None

    def loss_scale(self, z: Tensor, gradient: Tensor, counted: Tensor | None) -> float | None:
        """Scale c of a loss c Σ nll with this gradient at z where means can differ; None: the mean over examples."""
        return None

    def __repr__(self) -> str:
        return self.describe()


class Bernoulli(Likelihood):
    """Independent Bernoulli outputs with logits z (N, D); targets in [0, 1] of the same shape, none left out."""

    name = "bernoulli"

    def check_data(self, z: Tensor, y: Tensor) -> None:
        """Refuse class indices, other shapes, and numbers outside [0, 1]; NaN may stand for what is missing."""
        _refuse_classes(self.name, z, y)
        _require_shape(self.name, z, y)
        self._require_range(y)

    def may_be_targets(self, y: Tensor) -> bool:
        """Whether all numbers are in [0, 1]."""
        return not _outside(y)

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy summed over the outputs, shape (N,)."""
        y = self.check_targets(z, y)
        loss = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
        return loss.reshape(len(z), -1).sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """σ(z) - y, written so that confident and right examples keep their digits."""
        return (1 - y) * torch.sigmoid(z) - y * torch.sigmoid(-z)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones of the shape of z."""
        return torch.bernoulli(torch.sigmoid(z), generator=generator)

    def vectors(self, z: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns of diag √(σ(z) σ(-z))."""
        # σ(z) σ(-z) rather than σ (1 - σ): the latter is 0 in float32 from z = 17 on
        return _diagonal_columns((torch.sigmoid(z) * torch.sigmoid(-z)).sqrt(), start, stop)

    def product(self, z: Tensor, t: Tensor) -> Tensor:
        """σ(z) σ(-z) t."""
        return torch.sigmoid(z) * torch.sigmoid(-z) * t

    def check_targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Targets of the shape of z with values in [0, 1]."""
        y = _same_shape(self.name, z, y)
        self._require_range(y)
        return y

    @staticmethod
    def _require_range(y: Tensor) -> None:
        if _outside(y):
            raise ValueError(
                f"targets out of range: bernoulli targets lie in [0, 1], but these span "
                f"{float(y.min()):.4g}..{float(y.max()):.4g}; rescale them ({SECOND})."
            )

    def describe(self) -> str:
        """Name of the distribution."""
        return "Bernoulli()"


class Gaussian(Likelihood):
    """Gaussian around z (N, D) with a fixed variance; the loss is ‖y - z‖² / (2 variance), no target left out."""

    name = "gaussian"

    def __init__(self, variance: float = 1.0) -> None:
        choices.positive("the variance of a Gaussian likelihood", variance)
        self._variance = float(variance)

    def variance(self, z: Tensor) -> float:
        """Variance of each output."""
        return self._variance

    def check_output(self, z: Tensor) -> None:
        """Refuse variances whose inverse root is no number of the outputs' type."""
        super().check_output(z)
        if self.variance(z) ** -0.5 > torch.finfo(torch.promote_types(z.dtype, torch.float32)).max:
            raise ValueError(
                f"a variance of {self.variance(z):.1e} is too small for outputs of {z.dtype}; take model.double(), or "
                "bring targets and variance to another scale."
            )

    def check_data(self, z: Tensor, y: Tensor) -> None:
        """Refuse class indices, and other shapes; NaN may stand for what is missing."""
        _refuse_classes(self.name, z, y)
        _require_shape(self.name, z, y)

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """Half the squared error over the variance, shape (N,)."""
        y = self.check_targets(z, y)
        return (z - y).reshape(len(z), -1).square().sum(1) / (2 * self.variance(z))

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """(z - y) / variance, in the type of z; of labels in float64, the difference is."""
        return ((z - y) / self.variance(z)).to(z.dtype)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normal around z, shape of z, in float64: of outputs far beyond σ, little of the noise is left in float32.

        Raises:
            ValueError: little is left of it in float64 either.
        """
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        deviation, largest = self.variance(z) ** 0.5, float(z.detach().abs().max()) if z.numel() else 0.0
        if largest * torch.finfo(torch.float64).eps > _LOST * deviation:
            raise ValueError(
                f"outputs of {largest:.1e} are so far beyond the standard deviation {deviation:.1e} that labels drawn "
                "around them cannot be told from them; pass kind='exact', or bring targets and variance to one scale."
            )
        return z.double() + noise.double() * deviation

    def vectors(self, z: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns of I / σ."""
        return _diagonal_columns(torch.full_like(z, self.variance(z) ** -0.5), start, stop)

    def product(self, z: Tensor, t: Tensor) -> Tensor:
        """Vector t over the variance."""
        return t / self.variance(z)

    def check_targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Targets of the shape of z."""
        return _same_shape(self.name, z, y)

    def describe(self) -> str:
        """Name of the distribution with its variance."""
        return f"Gaussian(variance={self._variance:g})"


def _require_shape(name: str, z: Tensor, y: Tensor) -> None:
    if _unpadded(y) != _unpadded(z) or len(y) != len(z):
        raise ValueError(
            f"{name} targets must have the outputs' shape {tuple(z.shape)}, got {tuple(y.shape)}; give a number for "
            f"each output, or pass 'categorical' with targets.long() if they are class indices ({SECOND})."
        )


def _same_shape(name: str, z: Tensor, y: Tensor) -> Tensor:
    _require_shape(name, z, y)
    y = y.reshape(z.shape).to(device=z.device, dtype=z.dtype)
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"{name} targets contain NaN or infinity; clean the data first.")
    return y


def _unpadded(t: Tensor) -> list[int]:
    """A shape without the dimensions of one, which say nothing."""
    return [size for size in t.shape if size != 1]


def _outside(y: Tensor) -> bool:
    """Whether some numbers are outside [0, 1], told by one question to the device."""
    return y.numel() > 0 and bool(torch.stack([(y < 0).any(), (y > 1).any()]).any())


def _refuse_classes(name: str, z: Tensor, y: Tensor) -> None:
    """Integer targets (N,) of several outputs are indices of classes."""
    if not y.is_floating_point() and y.dim() == 1 and math.prod(z.shape[1:]) > 1:
        raise ValueError(
            f"the data's targets {tuple(y.shape)} are {y.dtype}, one for outputs {tuple(z.shape)}: class indices, "
            f"which are no targets of a {name} likelihood; pass 'categorical', or targets of the outputs' shape."
        )


def _diagonal_columns(diagonal: Tensor, start: int, stop: int | None) -> Tensor:
    """Columns start..stop of diag(diagonal), shape (stop - start, *diagonal.shape)."""
    flat = diagonal.reshape(len(diagonal), -1)
    stop = flat.shape[1] if stop is None else stop
    out = flat.new_zeros(stop - start, *flat.shape)
    index = torch.arange(start, stop, device=flat.device)
    out[index - start, :, index] = flat[:, start:stop].T
    return out.reshape(stop - start, *diagonal.shape)
