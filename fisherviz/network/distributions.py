"""Predictive distributions r(y|z) of a network's output z: densities, samples, output Fishers and their factors.

The loss of one example is -log r(y|z); the output Fisher is F_R(z) = E_y[score scoreᵀ] = S Sᵀ (DESIGN section 5).
Everything above relies on `vectors`: the columns of S, ready to be backpropagated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fisherviz.support import choices


class Likelihood(ABC):
    """A predictive distribution r(y|z) whose negative logarithm is the loss of one example.

    Outputs z have shape (N, D), (N,) which means (N, 1), or (N, C, positions...) for `Categorical`.
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
        """Columns start..stop of the factor S with S Sᵀ = F_R(z), shape (stop - start, *z.shape)."""

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

    def check_axis(self, z: Tensor, y: Tensor | None) -> None:  # noqa: B027 - most have no axis to mistake
        """Raise ValueError if the data's targets, where they are at hand, show that z is read along a wrong axis."""

    def __repr__(self) -> str:
        return self.describe()


class Categorical(Likelihood):
    """Softmax distribution over C classes: z (N, C), labels (N,); further positions of an example sum up.

    Args:
        class_axis: where the classes are in outputs with positions: -1, (N, positions..., C), or 1,
            (N, C, positions...) as in `nn.CrossEntropyLoss`.

    F_R = diag(p) - p pᵀ has rank C - 1: its Cholesky factor has one column, and backpropagation, fewer than classes.
    """

    name = "categorical"

    def __init__(self, class_axis: int = -1) -> None:
        if class_axis not in (-1, 1):
            raise ValueError(f"class_axis must be -1 or 1, got {class_axis!r}.")
        self.class_axis = class_axis

    def _rows(self, z: Tensor) -> Tensor:
        """Logits as (N, C, positions)."""
        return z.movedim(self.class_axis, 1).flatten(2) if z.dim() > 2 else z.unsqueeze(2)

    def _back(self, rows: Tensor, z: Tensor) -> Tensor:
        """(..., N, C, positions) in the shape (..., *z.shape)."""
        if z.dim() == 2:
            return rows.squeeze(-1)
        lead = rows.dim() - 3
        shape = z.movedim(self.class_axis, 1).shape
        out = rows.reshape(*rows.shape[:lead], *shape)
        return out.movedim(lead + 1, -1) if self.class_axis == -1 else out

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each example, shape (N,), summed over positions."""
        y = self.check_targets(z, y)
        loss = nn.functional.cross_entropy(self._rows(z), y.reshape(len(z), -1), reduction="none")
        return loss.sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Softmax minus one-hot label, shape of z."""
        labels = y.reshape(len(z), 1, -1)
        others = torch.softmax(self._rows(z), 1).scatter(1, labels, 0.0)
        # minus the sum of the others, not p - 1, which cancels for confident and right examples
        return self._back(others.scatter(1, labels, -others.sum(1, keepdim=True)), z)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class indices (N,) or (N, positions...) drawn from the softmax."""
        p = torch.softmax(self._rows(z).transpose(1, 2).float(), -1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        return drawn.reshape(self._label_shape(z))

    def _label_shape(self, z: Tensor) -> torch.Size:
        return z.movedim(self.class_axis, -1).shape[:-1]

    def num_vectors(self, z: Tensor) -> int:
        """Positions times C - 1."""
        classes = z.shape[self.class_axis]
        return (classes - 1) * (math.prod(z.shape[1:]) // classes)

    def vectors(self, z: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns of the Cholesky factor of diag(p) - p pᵀ, without the last, which is zero."""
        stop = self.num_vectors(z) if stop is None else stop
        p = torch.softmax(self._rows(z), 1)
        n, classes, positions = p.shape
        if positions == 1:
            return self._back(_softmax_factor(p[..., 0], start, stop).unsqueeze(-1), z)
        out = z.new_zeros(stop - start, n, classes, positions)
        for position in range(start // (classes - 1), -(-stop // (classes - 1))):
            first = position * (classes - 1)
            low, high = max(start, first), min(stop, first + classes - 1)
            out[low - start : high - start, :, :, position] = _softmax_factor(
                p[..., position], low - first, high - first
            )
        return self._back(out, z)

    def product(self, z: Tensor, t: Tensor) -> Tensor:
        """p∘t - p (pᵀt) for each example and position."""
        p, rows = torch.softmax(self._rows(z), 1), self._rows(t)
        # a constant shift of t changes nothing; taking the likeliest class's entry as zero, nothing cancels
        rows = rows - rows.gather(1, p.argmax(1, keepdim=True))
        return self._back(p * (rows - (p * rows).sum(1, keepdim=True)), z)

    def check_output(self, z: Tensor) -> None:
        """Refuse outputs without a class dimension of at least two."""
        super().check_output(z)
        if z.dim() < 2 or z.shape[self.class_axis] < 2:
            raise ValueError(
                f"a categorical likelihood needs outputs (N, C) with C >= 2 logits, got {tuple(z.shape)}; "
                "use 'bernoulli' for one logit."
            )

    def check_axis(self, z: Tensor, y: Tensor | None) -> None:
        """Refuse labels of the shape that they would have if the classes were on the other axis, and only there."""
        other = Categorical(-1 if self.class_axis == 1 else 1)
        if z.dim() > 2 and y is not None and y.shape == other._label_shape(z) != self._label_shape(z):
            raise ValueError(
                f"targets of shape {tuple(y.shape)} say that the classes of outputs {tuple(z.shape)} are on axis "
                f"{other.class_axis}, not {self.class_axis}; pass fv.{other.describe()}."
            )

    def check_targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Integer labels (N,) or (N, positions...) in 0..C-1."""
        self.check_axis(z, y)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"categorical targets must be class indices of an integer type, got {y.dtype}; "
                "convert them with targets.long() (class probabilities are not supported)."
            )
        expected = tuple(self._label_shape(z))
        if tuple(y.shape) != expected:
            raise ValueError(f"categorical targets must have shape {expected}, got {tuple(y.shape)}.")
        y = y.to(device=z.device, dtype=torch.long)
        if y.numel():
            classes, low, high = z.shape[self.class_axis], int(y.min()), int(y.max())
            if low < 0 or high >= classes:
                raise ValueError(
                    f"targets out of range: the model has {classes} classes, 0..{classes - 1}, "
                    f"but the targets span {low}..{high}; drop or relabel the others."
                )
        return y

    def describe(self) -> str:
        """Name of the distribution."""
        return "Categorical()" if self.class_axis == -1 else "Categorical(class_axis=1)"


class Bernoulli(Likelihood):
    """Independent Bernoulli outputs with logits z (N, D); targets in [0, 1] of the same shape."""

    name = "bernoulli"

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
        if y.numel() and (float(y.min()) < 0 or float(y.max()) > 1):
            raise ValueError(
                f"targets out of range: bernoulli targets lie in [0, 1], but these span "
                f"{float(y.min()):.4g}..{float(y.max()):.4g}; rescale them."
            )
        return y

    def describe(self) -> str:
        """Name of the distribution."""
        return "Bernoulli()"


class Gaussian(Likelihood):
    """Gaussian around z (N, D) with a fixed variance; the loss is ‖y - z‖² / (2 variance)."""

    name = "gaussian"

    def __init__(self, variance: float = 1.0) -> None:
        choices.positive("the variance of a Gaussian likelihood", variance)
        self._variance = float(variance)

    def variance(self, z: Tensor) -> float:
        """Variance of each output."""
        return self._variance

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """Half the squared error over the variance, shape (N,)."""
        y = self.check_targets(z, y)
        return (z - y).reshape(len(z), -1).square().sum(1) / (2 * self.variance(z))

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """(z - y) / variance."""
        return (z - y) / self.variance(z)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normal around z, shape of z."""
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        return z + noise * self.variance(z) ** 0.5

    def vectors(self, z: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns of I / σ."""
        return _diagonal_columns(torch.full_like(z, self.variance(z) ** -0.5), start, stop)

    def product(self, z: Tensor, t: Tensor) -> Tensor:
        """Vector t over the variance."""
        return t / self.variance(z)

    def check_targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Targets of the shape of z."""
        y = _same_shape(self.name, z, y)
        if not bool(torch.isfinite(y.sum())):
            raise ValueError("gaussian targets contain NaN or infinity; clean the data first.")
        return y

    def describe(self) -> str:
        """Name of the distribution with its variance."""
        return f"Gaussian(variance={self._variance:g})"


def _same_shape(name: str, z: Tensor, y: Tensor) -> Tensor:
    if y.numel() != z.numel() or len(y) != len(z):
        raise ValueError(f"{name} targets must have the outputs' shape {tuple(z.shape)}, got {tuple(y.shape)}.")
    return y.reshape(z.shape).to(device=z.device, dtype=z.dtype)


def _softmax_factor(p: Tensor, start: int, stop: int) -> Tensor:
    """Columns start..stop of the Cholesky factor of diag(p) - p pᵀ, shape (stop - start, N, C).

    Made of tail sums and ratios alone, so that no digit of a confident example cancels (Tanabe & Sagae 1992).
    """
    tail = p.flip(1).cumsum(1).flip(1)  # p_j + ... + p_{C-1}
    rest = torch.cat([tail[:, 1:], torch.zeros_like(tail[:, :1])], 1)
    tiny = torch.finfo(p.dtype).tiny
    diagonal = (p * (rest / tail.clamp_min(tiny))).sqrt()
    index = torch.arange(start, stop, device=p.device)
    below = torch.arange(p.shape[1], device=p.device) > index[:, None]  # (J, C)
    ratio = p.unsqueeze(0) / rest[:, index].T.clamp_min(tiny).unsqueeze(-1)  # (J, N, C)
    columns = -(ratio * below.unsqueeze(1)) * diagonal[:, index].T.unsqueeze(-1)
    columns[index - start, :, index] = diagonal[:, index].T
    return columns


def _diagonal_columns(diagonal: Tensor, start: int, stop: int | None) -> Tensor:
    """Columns start..stop of diag(diagonal), shape (stop - start, *diagonal.shape)."""
    flat = diagonal.reshape(len(diagonal), -1)
    stop = flat.shape[1] if stop is None else stop
    out = flat.new_zeros(stop - start, *flat.shape)
    index = torch.arange(start, stop, device=flat.device)
    out[index - start, :, index] = flat[:, start:stop].T
    return out.reshape(stop - start, *diagonal.shape)
