"""Elastic weight consolidation: what is known of earlier tasks as a spring at their weights, from any approximation.

Kirkpatrick et al. 2017, equation 3, with the diagonal; Ritter et al. 2018 with Kronecker factors; Benzing 2021,
appendices A.2 and C, for the exact Fisher and for first factors, which add up over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.exact.fisher import Fisher
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.matrices.saved import SavedMatrix
from fisherviz.network.space import ParameterSpace
from fisherviz.operators.added import added
from fisherviz.support.choices import number
from fisherviz.support.tables import counted, paragraph


class Curvature(Protocol):
    """What a penalty asks of a matrix: a Fisher, an approximation, or any matrix over layers."""

    @property
    def space(self) -> ParameterSpace:
        """The probed parameters."""
        ...

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply a flat vector in torch order."""
        ...


@dataclass(frozen=True, eq=False)
class Spring:
    """½ dᵀ M d − ℓᵀ d + c with d = θ − θ*.

    Attributes:
        matrix: M.
        strength: λ, what the matrix is multiplied by.
        anchor: θ*, flat in torch order.
        linear: ℓ, likewise; None: 0.
        constant: c.
    """

    matrix: Curvature
    strength: float
    anchor: Tensor
    linear: Tensor | None = None
    constant: float = 0.0

    def slope(self, moved: Tensor) -> Tensor:
        """M d."""
        return (self.matrix @ moved).to(moved.dtype) * self.strength

    def value(self, moved: Tensor) -> Tensor:
        """Of d = θ − θ*."""
        value = _Quadratic.apply(moved, self)
        return value if self.linear is None else value - self.linear @ moved + self.constant

    def joined(self, other: Spring) -> Spring | None:
        """Both as one whose matrix takes no more memory than one of them; None where there is no such matrix."""
        if not (isinstance(self.matrix, LayeredMatrix) and isinstance(other.matrix, LayeredMatrix)):
            return None
        mine, theirs = (s.matrix.whole.scale(s.strength) for s in (self, other) if isinstance(s.matrix, LayeredMatrix))
        both = added(mine, theirs)
        if both is None:
            return None
        away = other.anchor - self.anchor
        pull = other.slope(away)
        linear, constant = pull, self.constant + other.constant + 0.5 * float(away @ pull)
        if other.linear is not None:
            linear, constant = linear + other.linear, constant + float(other.linear @ away)
        if self.linear is not None:
            linear = linear + self.linear
        matrix = LayeredMatrix(self.matrix.space, both, self.matrix.title)
        return Spring(matrix, 1.0, self.anchor, linear, constant)


class _Times(torch.autograd.Function):
    """λ M v, whose derivative is the product with the same symmetric matrix."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, spring: Spring) -> Tensor:
        ctx.spring = spring
        return spring.slope(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Times.apply(grad, ctx.spring), None


class _Quadratic(torch.autograd.Function):
    """½ λ dᵀ M d by one product, which is its gradient too; another one only where that is differentiated."""

    @staticmethod
    def forward(ctx: Any, moved: Tensor, spring: Spring) -> Tensor:
        slope = spring.slope(moved)
        ctx.spring = spring
        ctx.save_for_backward(moved, slope)
        return 0.5 * torch.dot(slope, moved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        moved, slope = ctx.saved_tensors
        return grad * (_Times.apply(moved, ctx.spring) if torch.is_grad_enabled() else slope), None


class Penalty:
    """½ λ (θ − θ*)ᵀ F̂ (θ − θ*), summed over tasks; made by `penalty`. Call it for the value, add it to others.

    Args:
        parameters: θ, by their names in the matrix.
        springs: one per task, or several tasks in one.
        tasks: how many.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], springs: tuple[Spring, ...], tasks: int = 1) -> None:
        self.parameters, self.springs, self.tasks = dict(parameters), springs, tasks

    def __call__(self) -> Tensor:
        """The penalty at the parameters as they are now.

        Returns:
            A scalar that backpropagates to the parameters.
        """
        flat = torch.cat([p.reshape(-1) for p in self.parameters.values()])
        values = [spring.value(flat - spring.anchor) for spring in self.springs]
        return torch.stack(values).sum()

    def __add__(self, other: Penalty) -> Penalty:
        """Both tasks' penalties.

        Where the sum of two matrices has their structure (first factors, diagonals, unit and dense blocks), one matrix
        and one vector hold all tasks (Benzing 2021, appendix C).

        Args:
            other: of the same parameters.

        Returns:
            A new penalty.

        Raises:
            TypeError: the other is no penalty.
            ValueError: it holds other parameters.
        """
        if not isinstance(other, Penalty):
            raise TypeError(f"a penalty adds to another penalty, not to {type(other).__name__}; call it for its value.")
        mine, theirs = self.parameters, other.parameters
        if list(mine) != list(theirs) or any(mine[name] is not theirs[name] for name in mine):
            raise ValueError(
                "the two penalties hold different parameters; make both of matrices over the same layers, with the "
                "same model=."
            )
        springs = list(self.springs)
        for spring in other.springs:
            for i, own in enumerate(springs):
                if (both := own.joined(spring)) is not None:
                    springs[i] = both
                    break
            else:
                springs.append(spring)
        return Penalty(mine, tuple(springs), self.tasks + other.tasks)

    @property
    def bytes(self) -> int:
        """Memory that the matrices known by operators and the vectors hold."""
        held = sum(s.matrix.bytes for s in self.springs if isinstance(s.matrix, LayeredMatrix))
        vectors = [v for s in self.springs for v in (s.anchor, s.linear) if v is not None]
        return held + sum(v.numel() * v.element_size() for v in vectors)

    def __repr__(self) -> str:
        numbers = sum(p.numel() for p in self.parameters.values())
        matrices = "matrix" if len(self.springs) == 1 else "matrices"
        return f"Penalty of {counted(self.tasks, 'task')} over {numbers:,} parameters, {len(self.springs)} {matrices}"

    def _repr_html_(self) -> str:
        return paragraph(repr(self))


def penalty(matrix: Curvature, strength: float = 1.0, model: nn.Module | None = None) -> Penalty:
    """The spring of elastic weight consolidation, ½ λ (θ − θ*)ᵀ F̂ (θ − θ*), with θ* the weights as they are now.

    Call the result and add its value to the loss of the next task; add the penalties of several tasks. With `strength`
    = N, the number of examples of the old task, it is the old task's Laplace approximation, beside a loss that is
    summed over the new task's examples; divide by their number beside a mean. FOOF's first factors and diagonals take
    the memory of one task however many there are.

    Args:
        matrix: F̂: an approximation (of any method, or loaded from a file), a damped one, or an exact Fisher, whose
            products take passes over its data.
        strength: λ, at least 0.
        model: whose parameters are held, by name; None: the model that the matrix was made of. With an exact Fisher,
            which is that of its model's weights at the moment, a copy of the model, which is the one to train.

    Returns:
        The penalty.

    Raises:
        TypeError: it is no matrix over layers, or one that was read from a file, without `model`.
        RuntimeError: the approximation has not been fitted.
        ValueError: the strength is negative, the model has no parameter of a name and shape, or an exact Fisher's own
            model is to be trained.
    """
    if isinstance(matrix, Approximation) and not matrix.fitted:
        raise RuntimeError(f"{matrix.name} has not been fitted; use fv.approximate(fisher, {matrix.name!r}).")
    if not hasattr(matrix, "space") or not hasattr(matrix, "__matmul__"):
        raise TypeError(
            f"a penalty is made of an approximation or a Fisher, got {type(matrix).__name__}; "
            "fv.approximate(fisher, 'kfac') gives one."
        )
    number("strength", strength, 0.0, math.inf)
    own = _parameters(matrix, model)
    if isinstance(matrix, Fisher) and {*map(id, own.values())} & {*map(id, _parameters(matrix, None).values())}:
        raise ValueError(
            "an exact Fisher is that of its model's weights at the moment of a product: train a copy of the model and "
            "pass it as model=, or take fv.approximate(fisher, 'layer')."
        )
    anchor = torch.cat([p.detach().reshape(-1) for p in own.values()])
    return Penalty(own, (Spring(matrix, float(strength), anchor),))


def _parameters(matrix: Curvature, model: nn.Module | None) -> dict[str, nn.Parameter]:
    """The matrix's parameters in torch order, or those of the same names of another model."""
    if model is None:
        if isinstance(matrix, SavedMatrix):
            raise TypeError("a matrix that was read from a file knows no model; pass model=.")
        known = {name: p for layer in matrix.space.layers for name, p in layer.parameters.items()}
        return {place.name: known[place.name] for place in matrix.space.places}
    given = dict(model.named_parameters(remove_duplicate=False))
    for place in matrix.space.places:
        shape = None if place.name not in given else tuple(given[place.name].shape)
        if shape != tuple(place.shape):
            raise ValueError(
                f"the model has no parameter {place.name!r} of shape {tuple(place.shape)}"
                f"{'' if shape is None else f', its own is {shape}'}; pass the network that the matrix was made of."
            )
    return {place.name: given[place.name] for place in matrix.space.places}
