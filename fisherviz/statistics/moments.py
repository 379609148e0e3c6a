"""Streaming sufficient statistics: sums over examples that a Capture updates, with their count.

Approximations and optimizers name the statistics they need; one pass over the data feeds all of them. Every statistic
merges (batches, processes), blends (exponential decay), and serialises. Equations: DESIGN section 5.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Batch, Capture
from fisherviz.statistics.products import block, gram, pair_gram, weighted_moments

Setting = Literal["expand", "reduce", "sum"]
SETTINGS: tuple[Setting, ...] = ("expand", "reduce", "sum")


class Statistic(ABC):
    """A sum over examples of something that the captures of one or two layers show.

    Attributes:
        layers: names of the layers whose captures it reads.
        total: the running sum, None before the first update; the mean while `normalised`.
        count: the number of examples in it.
        normalised: whether `normalise` has turned the sum into the mean.
    """

    needs_gradients: ClassVar[bool] = True
    """Whether it reads pseudo-gradients; a pass for statistics that do not skips the backward half."""

    def __init__(self, *layers: str) -> None:
        self.layers = layers
        self.total: Tensor | None = None
        self.count = 0.0
        self.normalised = False

    @property
    def key(self) -> Hashable:
        """Equal for statistics that hold the same quantity, so that a pass computes it once."""
        return (type(self).__name__, *self.layers)

    def empty(self) -> Self:
        """The same statistic of no example yet."""
        made = copy.copy(self)
        made.total, made.count, made.normalised = None, 0.0, False
        return made

    @abstractmethod
    def contribution(self, *captures: AnyCapture) -> Tensor:
        """The sum over the examples of a batch, from the captures of `layers`."""

    @property
    def mean(self) -> Tensor:
        """The sum over the count; RuntimeError before the first update."""
        if self.total is None:
            raise RuntimeError(f"{self.key} has seen no example yet; update it first.")
        return self.total if self.normalised or self.count == 1 else self.total / self.count

    def normalise(self) -> None:
        """Turn the sum into the mean, in place: no second copy is held by those who read the mean."""
        if self.total is not None and not self.normalised:
            self.total.div_(self.count)
            self.normalised = True

    def _sum(self) -> Tensor | None:
        return self.total if self.total is None or not self.normalised else self.total * self.count

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        self.add(self.contribution(*(batch.captures[name] for name in self.layers)), batch.examples)

    def add(self, total: Tensor, count: float) -> None:
        """Add a sum over `count` examples."""
        if total.dtype in (torch.float16, torch.bfloat16):
            total = total.float()
        self.total, self.normalised = self._sum(), False
        # the first sum may be a view of a capture; later ones are added into memory of our own
        self.total = (
            total.clone()
            if self.total is None and total._is_view()
            else (total if self.total is None else self.total.add_(total))
        )
        self.count += count

    def merge(self, other: Statistic) -> None:
        """Add the examples of another statistic of the same key."""
        if other.key != self.key:
            raise ValueError(f"cannot merge {other.key} into {self.key}; they hold different quantities.")
        added = other._sum()
        if added is not None:
            self.add(added if other.normalised else added.clone(), other.count)

    def blend(self, other: Statistic, decay: float) -> None:
        """Exponential moving average of means: decay * self + (1 - decay) * other; starts as `other`."""
        if other.total is None:
            raise RuntimeError(f"{other.key} has seen no example yet; update it first.")
        share = 1.0 if other.normalised else 1 / other.count
        if self.total is None:
            self.total = other.total * share
        else:  # in place: a moving average is the optimizers' every step
            self.normalise()
            self.total.mul_(decay).add_(other.total, alpha=(1 - decay) * share)
        self.count, self.normalised = 1.0, False

    def state_dict(self) -> dict[str, Any]:
        """Total and count."""
        total = self._sum()
        return {"total": None if total is None else total.clone(), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        total = state["total"]
        self.total, self.normalised = None if total is None else total.clone(), False
        self.count = float(state["count"])


class InputFactor(Statistic):
    """Second moment of a layer's inputs, (da, da), or (groups, da, da).

    Settings: "expand" averages over positions, 1/T Σ_t ā_t ā_tᵀ; "reduce" takes the outer product of mean_t ā_t;
    "sum" adds over positions (FOOF).
    """

    needs_gradients = False

    def __init__(self, layer: str, setting: Setting = "expand") -> None:
        super().__init__(layer)
        self.setting = _check_setting(setting)

    @property
    def key(self) -> Hashable:
        """Name, layer and setting."""
        return ("InputFactor", *self.layers, self.setting)

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch."""
        capture = _structured(captures[0], self)
        if self.setting == "reduce":
            return gram(_by_group(capture.a.mean(1, keepdim=True), capture.grouped))
        total = gram(_by_group(capture.a, capture.grouped))
        return total.div_(capture.positions) if self.setting == "expand" and capture.positions > 1 else total


class OutputFactor(Statistic):
    """Second moment of a layer's pseudo-gradients, (dg, dg), or (groups, dg, dg).

    Settings: "expand" adds outer products over positions, Σ_t g_t g_tᵀ; "reduce" takes that of Σ_t g_t.
    """

    def __init__(self, layer: str, setting: Setting = "expand") -> None:
        super().__init__(layer)
        self.setting = _check_setting(setting)

    @property
    def key(self) -> Hashable:
        """Name, layer and setting."""
        return ("OutputFactor", *self.layers, self.setting)

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        capture = _structured(captures[0], self)
        g = capture.g.sum(2, keepdim=True) if self.setting == "reduce" else capture.g
        return gram(_by_group(g, capture.grouped))


class CrossInputFactor(Statistic):
    """Cross moment of two layers' inputs, (da_row, da_col)."""

    needs_gradients = False

    def __init__(self, row: str, col: str, setting: Setting = "expand") -> None:
        super().__init__(row, col)
        self.setting = _check_setting(setting)

    @property
    def key(self) -> Hashable:
        """Name, layers and setting."""
        return ("CrossInputFactor", *self.layers, self.setting)

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch."""
        row, col = (_structured(c, self) for c in captures)
        if self.setting == "reduce":
            return pair_gram(row.a.mean(1), col.a.mean(1))
        _check_aligned(row, col, self)
        return pair_gram(row.a, col.a) / row.positions


class CrossOutputFactor(Statistic):
    """Cross moment of two layers' pseudo-gradients, (dg_row, dg_col)."""

    def __init__(self, row: str, col: str, setting: Setting = "expand") -> None:
        super().__init__(row, col)
        self.setting = _check_setting(setting)

    @property
    def key(self) -> Hashable:
        """Name, layers and setting."""
        return ("CrossOutputFactor", *self.layers, self.setting)

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        row, col = (_structured(c, self) for c in captures)
        if self.setting == "reduce":
            return pair_gram(row.g.sum(2), col.g.sum(2))
        _check_aligned(row, col, self)
        return pair_gram(row.g, col.g)


class UnitBlocks(Statistic):
    """Blocks of each output unit's weights with its bias, (d_out, da, da): E[g_o² ā āᵀ] where T = 1."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        capture = _structured(captures[0], self)
        if capture.factored:
            work = torch.promote_types(capture.a.dtype, torch.float32)
            return weighted_moments(capture.a[:, 0].to(work), capture.g[:, :, 0].to(work).square().sum(0))
        da = capture.a.shape[-1]
        units = capture.gradients.unflatten(2, (-1, da)).flatten(0, 1).transpose(0, 1)  # (d_out, K N, da)
        return units.transpose(1, 2) @ units


class Diagonal(Statistic):
    """Second moment of each entry of the gradient, (P,) in unit order."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return captures[0].square_sum()


class Block(Statistic):
    """Exact Fisher block between two layers, (P_row, P_col) in unit order."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return block(captures[0], captures[-1])


class EigenMoment(Statistic):
    """Second moment of the gradient in a Kronecker eigenbasis, (dg, da), or (groups, dg, da) (EKFAC)."""

    def __init__(self, layer: str, qa: Tensor, qg: Tensor) -> None:
        super().__init__(layer)
        self.qa, self.qg = qa, qg

    @property
    def key(self) -> Hashable:
        """Unique to this pair of bases."""
        return ("EigenMoment", *self.layers, id(self.qa), id(self.qg))

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        capture = _structured(captures[0], self)
        capture = Capture(capture.a.to(self.qa.dtype), capture.g.to(self.qg.dtype))
        if capture.grouped:
            a = torch.einsum("nthi,hij->nthj", capture.a, self.qa)
            turned = Capture(a, torch.einsum("knthi,hij->knthj", capture.g, self.qg))
        else:
            turned = Capture(capture.a @ self.qa, capture.g @ self.qg)
        if turned.factored:
            weights = turned.g[:, :, 0].square().sum(0)
            return weights.T @ turned.a[:, 0].square()
        shape = (*self.qg.shape[:-1], self.qa.shape[-1])
        return turned.gradients.square().sum((0, 1)).reshape(shape)


class GradientSum(Statistic):
    """Sum of the gradient over examples and vectors, (P,) in unit order."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return captures[0].sum()


def update_all(statistics: Iterable[Statistic], batch: Batch) -> None:
    """Feed one batch to all statistics."""
    for statistic in statistics:
        statistic.update(batch)


def _check_setting(setting: str) -> Setting:
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}.")
    return setting


def _structured(capture: AnyCapture, statistic: Statistic) -> Capture:
    if not isinstance(capture, Capture):
        raise NotImplementedError(
            f"layer {statistic.layers[0]!r} has no inputs and pseudo-gradients (generic path), which "
            f"{type(statistic).__name__} needs; use its exact block or diagonal."
        )
    return capture


def _check_aligned(row: Capture, col: Capture, statistic: Statistic) -> None:
    if row.grouped or col.grouped or row.positions != col.positions:
        raise ValueError(
            f"layers {statistic.layers[0]!r} and {statistic.layers[1]!r} share weights over different positions "
            f"({row.positions} and {col.positions}) or in groups; "
            "their cross factor needs setting='reduce' without groups."
        )


def _by_group(x: Tensor, grouped: bool) -> Tensor:
    """Rows (R, d), or (groups, R, d), from (..., d) or (..., groups, d)."""
    return x.flatten(0, -3).transpose(0, 1) if grouped else x.flatten(0, -2)
