"""The categorical distribution, over one label per example or one per position, some of which may be left out.

What is left out is told by the targets (`ignore_index`), or by a loss's gradient where nobody shows the targets: in a
training loop of the user's. Others rely on both giving the same positions for the same loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fisherviz.network.distributions import SECOND, Likelihood

_LEFT_OUT = -1
"""The label of a position that is left out, whatever ignore_index is: drawn labels are never it."""
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Relative differences that rounding of a loss's gradient explains, by type; 0.1 for the half precisions."""


class Categorical(Likelihood):
    """Softmax distribution over C classes: z (N, C), labels (N,); further positions of an example sum up.

    Args:
        class_axis: where the classes are in outputs with positions: -1, (N, positions..., C), or 1,
            (N, C, positions...) as in `nn.CrossEntropyLoss`.
        ignore_index: the label of positions that are left out: padding, a prompt.

    A position that is left out contributes nothing to anything, and an example without any other is as if it were not
    in the data. What remains is summed over the positions of an example and averaged over examples, however many
    positions each has: a loss that is the mean over M positions has N/M times this Fisher.

    F_R = diag(p) - p pᵀ has rank C - 1: its Cholesky factor has one column, and backpropagation, fewer than classes.
    """

    name = "categorical"

    def __init__(self, class_axis: int = -1, ignore_index: int = -100) -> None:
        if class_axis not in (-1, 1):
            raise ValueError(f"class_axis must be -1 or 1, got {class_axis!r}.")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be a whole number, a label, got {ignore_index!r}.")
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index must be a label as int64 holds them, got {ignore_index!r}.")
        self.class_axis, self.ignore_index = class_axis, ignore_index

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
        loss = nn.functional.cross_entropy(
            self._rows(z), y.reshape(len(z), -1), reduction="none", ignore_index=_LEFT_OUT
        )
        return loss.sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Softmax minus one-hot label, shape of z; labels as `check_targets` returns them."""
        labels = y.reshape(len(z), 1, -1)
        there, labels = labels != _LEFT_OUT, labels.clamp(min=0)
        others = torch.softmax(self._rows(z), 1).scatter(1, labels, 0.0).mul_(there)
        # minus the sum of the others, not p - 1, which cancels for confident and right examples
        return self._back(others.scatter(1, labels, -others.sum(1, keepdim=True)), z)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class indices (N,) or (N, positions...) drawn from the softmax."""
        p = torch.softmax(self._rows(z).transpose(1, 2).float(), -1)
        # one uniform number for each label: torch.multinomial draws one for each class
        below = p.reshape(-1, p.shape[-1]).cumsum(1, dtype=torch.float64)
        u = torch.rand(len(below), 1, generator=generator, dtype=below.dtype, device=below.device)
        drawn = torch.searchsorted(below, u * below[:, -1:], right=True).clamp_(max=p.shape[-1] - 1)
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

    def check_data(self, z: Tensor, y: Tensor) -> None:
        """Refuse what is neither labels nor a distribution over the classes: one-hot, smoothed, a teacher's."""
        if not _probabilities(z, y, self.class_axis):
            self.check_targets(z, y)

    def may_be_targets(self, y: Tensor) -> bool:
        """Whether a tensor is labels, of any number of classes, or a distribution over them."""
        if y.dim() > 1 and _probabilities(y, y, self.class_axis):
            return True
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            return False
        y = y.long()
        return bool(((y >= 0) | (y == self.ignore_index)).all())

    def _check_axis(self, z: Tensor, y: Tensor) -> None:
        """Refuse labels of the shape that they would have if the classes were on the other axis, and only there."""
        if z.dim() > 2 and y.shape == self._other._label_shape(z) != self._label_shape(z):
            self._refuse_axis(f"targets of shape {tuple(y.shape)} say", z)

    @property
    def _other(self) -> Categorical:
        """The same with its classes on the other axis."""
        return Categorical(-1 if self.class_axis == 1 else 1, self.ignore_index)

    def _refuse_axis(self, evidence: str, z: Tensor) -> None:
        raise ValueError(
            f"{evidence} that the classes of outputs {tuple(z.shape)} are on axis {self._other.class_axis}, not "
            f"{self.class_axis}; pass fv.{self._other.describe()}."
        )

    def counted(self, y: Tensor) -> Tensor | None:
        """Where labels are not ignore_index: as numbers, since torch compares small types modulo 256."""
        there = (y if y.is_floating_point() else y.long()) != self.ignore_index
        return None if bool(there.all()) else there

    def only(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """Each position's classes times its weight."""
        return values if weight is None else values * weight.to(values).unsqueeze(self.class_axis)

    def reached(self, z: Tensor, gradient: Tensor) -> Tensor | None:
        """Where the gradient is not zero, or had to be for the likeliest label, because the softmax is one-hot.

        Raises:
            ValueError: it is that of a softmax along the other axis.
        """
        if z.dim() < 2:
            return None
        if z.dim() > 2 and not _cancels(gradient, self.class_axis) and _cancels(gradient, self._other.class_axis):
            self._refuse_axis("the loss's gradient says", z)
        found = (gradient != 0).any(self.class_axis)
        if not bool(found.all()):
            p = torch.softmax(z.to(_wide(gradient)), self.class_axis)
            others = p.scatter(self.class_axis, p.argmax(self.class_axis, keepdim=True), 0.0)
            scale = self._fit(z, gradient, found)[0] or 1 / found.numel()
            found |= others.amax(self.class_axis) * scale < _smallest(gradient.dtype)
        return None if bool(found.all()) else found

    def loss_scale(self, z: Tensor, gradient: Tensor, counted: Tensor | None) -> float | None:
        """Scale c by least squares where outputs have positions or some are left out: c (p - onehot) is the gradient.

        Raises:
            ValueError: no c makes it so.
        """
        if (z.dim() == 2 and counted is None) or not bool(gradient.any()):
            return None
        scale, off = self._fit(z, gradient, counted)
        if scale == 0.0:
            return None
        if not off <= 1.0:
            raise ValueError(
                "the loss's gradient at the model's output is no multiple of the categorical scores (class weights, "
                "label smoothing, a further term), so that its scale over positions cannot be told; train on the plain "
                "cross-entropy, or give an optimizer that takes it loss_scale=c, the loss being c times the summed nll."
            )
        return scale

    def _fit(self, z: Tensor, gradient: Tensor, counted: Tensor | None) -> tuple[float, float]:
        """The scale c, and how far the gradient is off c (p - onehot), in units of what is taken for rounding.

        c comes from the classes that are not the label: there the gradient is c p, whose digits do not cancel as those
        of p - 1 do where the network is sure. It is 0 where these are too small to tell.
        """
        axis, g = self.class_axis, gradient.to(_wide(gradient))
        logs = torch.log_softmax(z.to(g), axis)
        p = logs.exp() if counted is None else logs.exp() * counted.unsqueeze(axis)
        # a gradient that vanished in rounding may be the label's or not: the likeliest is
        label = torch.where(g == g.amin(axis, keepdim=True), p, -1.0).argmax(axis, keepdim=True)
        others, g_others, g_label = p.scatter(axis, label, 0.0), g.scatter(axis, label, 0.0), g.gather(axis, label)
        if counted is not None:
            g_others = g_others * counted.unsqueeze(axis)
        smallest, size = _smallest(gradient.dtype) * g.numel() ** 0.5, _norm(others)
        if _norm(g_others) <= 16 * smallest or size == 0.0:
            return 0.0, math.inf
        c, eps = float((g_others / size * (others / size)).sum()), torch.finfo(z.dtype).eps
        # a softmax adds its small terms to one near 1, and each may lose all that it has, or half a digit
        whole = others.sum(axis, keepdim=True)
        lost = whole.clamp(max=eps / 2 * p.shape[axis]) + 2 * eps
        missing = ((g_label + c * whole).abs() - c * lost).clamp(min=0.0)
        drift = _norm((p * logs).nan_to_num(0.0))  # of the exponentials, whose arguments are rounded
        rounding, tolerance = abs(c) * eps * drift + smallest, _TOLERANCE.get(z.dtype, 0.1)
        left = (_norm(g_others - c * others), _norm(g_others)), (_norm(missing), _norm(g_label))
        return c, max(gap / (tolerance * own + rounding) for gap, own in left)

    def check_targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Integer labels (N,) or (N, positions...) in 0..C-1, and -1 where they are ignore_index."""
        self._check_axis(z, y)
        if y.is_floating_point() and not _probabilities(z, y, self.class_axis):
            raise TypeError(
                f"the data's targets are {y.dtype} and no probabilities of classes, so that they are no labels of a "
                "categorical likelihood; pass 'gaussian' for regression, or targets.long() if they are class indices "
                f"({SECOND})."
            )
        if y.is_floating_point() or y.is_complex():
            raise TypeError(
                f"categorical targets must be class indices of an integer type, got {y.dtype}; "
                "convert them with targets.long() (class probabilities are not supported)."
            )
        expected = tuple(self._label_shape(z))
        if tuple(y.shape) != expected:
            raise ValueError(
                f"categorical targets must have shape {expected}, got {tuple(y.shape)}{_way_out(z, y, expected)}."
            )
        if y.dtype == torch.bool:
            raise TypeError(
                "categorical targets must be class indices of an integer type, got torch.bool; convert them with "
                f"targets.long() ({SECOND})."
            )
        y = y.to(device=z.device, dtype=torch.long)
        there = self.counted(y)
        labels = y if there is None else y[there]
        if labels.numel():
            classes, (low, high) = z.shape[self.class_axis], torch.stack(labels.aminmax()).tolist()
            if low < 0 or high >= classes:
                raise ValueError(
                    f"targets out of range: the model has {classes} classes, 0..{classes - 1}, "
                    f"but the targets span {low}..{high}; drop or relabel the others, or leave them out by "
                    f"fv.Categorical(ignore_index=...) ({SECOND})."
                )
        return y if there is None else y.masked_fill(~there, _LEFT_OUT)

    def describe(self) -> str:
        """Name of the distribution."""
        given = [f"class_axis={self.class_axis}"] if self.class_axis != -1 else []
        given += [f"ignore_index={self.ignore_index}"] if self.ignore_index != -100 else []
        return f"Categorical({', '.join(given)})"


def _way_out(z: Tensor, y: Tensor, expected: tuple[int, ...]) -> str:
    """What to do with targets of another shape: one-hot rows, or dimensions of one too many."""
    if y.shape == z.shape and bool(((y == 0) | (y == 1)).all()):
        return "; of one-hot rows pass the classes, targets.argmax(...) over the class axis"
    return "; drop the dimensions of size 1" if y.numel() == math.prod(expected) else f"; {SECOND}"


def _probabilities(z: Tensor, y: Tensor, axis: int) -> bool:
    """Whether targets are a distribution over the classes."""
    if y.shape != z.shape:
        return False
    sums = y.sum(axis)
    return bool((y >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)


def _wide(gradient: Tensor) -> torch.dtype:
    """What a gradient is looked at in."""
    return torch.promote_types(gradient.dtype, torch.float32)


def _smallest(dtype: torch.dtype) -> float:
    """The smallest number above zero."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _cancels(gradient: Tensor, axis: int) -> bool:
    """Whether a gradient sums to zero along an axis, as that of a softmax does along its classes."""
    gap = float(torch.linalg.vector_norm(gradient.sum(axis, dtype=torch.float64), 1))
    return gap <= _TOLERANCE.get(gradient.dtype, 0.1) * float(torch.linalg.vector_norm(gradient, 1))


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
