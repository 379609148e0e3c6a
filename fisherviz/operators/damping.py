"""Damping: plain Tikhonov λI, and the K-FAC paper's factored form of it (section 6.3, equation 7).

A damping is a frozen value; `applied_to` adds it to an operator. Others rely on λ and γ never being rescaled
silently, and on factored damping being refused where there are no two factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from fisherviz.operators.base import Operator
from fisherviz.operators.dense import spectral_norm_of
from fisherviz.operators.factorise import SingularMatrixError, plus_identity
from fisherviz.operators.finite import NonFiniteMatrixError, not_finite
from fisherviz.support.choices import one_of, positive
from fisherviz.support.numbers import three_digits


def _diagonal(M: Tensor) -> Tensor:
    return M if M.ndim == 1 else M.diagonal()


BALANCES: dict[str, Callable[[Tensor], float]] = {
    "trace-norm": lambda M: float(_diagonal(M).mean()),
    "frobenius-norm": lambda M: float(torch.linalg.vector_norm(M)) / math.sqrt(len(M)),
    "spectral-norm": lambda M: float(torch.linalg.vector_norm(M, math.inf)) if M.ndim == 1 else spectral_norm_of(M),
    "traces": lambda M: float(_diagonal(M).sum()),
}
"""Sizes of the factors whose ratio is π²: norms of A ⊗ I and I ⊗ G without what they have in common, or bare traces."""


@dataclass(frozen=True)
class Tikhonov:
    """Add λI to the matrix.

    Args:
        value: λ ≥ 0.

    Raises:
        ValueError: when λ is negative or not finite.
        TypeError: when λ is no number.
    """

    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        object.__setattr__(self, "value", _non_negative(self.value, "Tikhonov damping"))

    def __str__(self) -> str:
        """For pictures and lines of text."""
        return f"λ = {three_digits(self.value)}"

    @property
    def strength(self) -> float:
        """λ."""
        return self.value

    def applied_to(self, operator: Operator) -> Operator:
        """Return operator + λI.

        Args:
            operator: a square operator.

        Returns:
            The damped operator.

        Raises:
            ValueError: when the operator is rectangular.
        """
        operator.require_square("damping")
        return operator.shifted(self.value)


@dataclass(frozen=True)
class FactoredTikhonov:
    """Damp the two factors of a Kronecker product instead of the product (Martens & Grosse 2015, equation 7).

    Args:
        gamma: γ ≥ 0, the square root of the corresponding λ.
        pi: how γ is shared: A takes πγ and G γ/π. A norm of `BALANCES` ("trace-norm", "frobenius-norm",
            "spectral-norm") gives π² = ‖A ⊗ I‖ / ‖I ⊗ G‖ (section 6.3), "traces" gives tr A / tr G, without dimensions
            (Benzing 2021, equation 3), a number is π itself: 1 for γ on both.

    Raises:
        ValueError: when γ is negative or not finite, or π is no positive number and none of the names.
        TypeError: when γ is no number.
    """

    gamma: float
    pi: float | str = "trace-norm"

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "gamma", _non_negative(self.gamma, "factored Tikhonov damping"))
        if isinstance(self.pi, str):
            one_of("pi", self.pi, BALANCES)
        else:
            positive("pi", self.pi)
            object.__setattr__(self, "pi", float(self.pi))

    def __str__(self) -> str:
        """For pictures and lines of text."""
        shared = self.pi if isinstance(self.pi, str) else f"= {self.pi:g}"
        own = "" if self.pi == FactoredTikhonov.pi else f", π {shared}"
        return f"λ = {three_digits(self.strength)}, factored{own}"

    @property
    def strength(self) -> float:
        """λ = γ², the plain damping that this one stands for."""
        return self.gamma**2

    @property
    def tikhonov(self) -> Tikhonov:
        """The same as plain damping, for operators without factors."""
        return Tikhonov(self.strength)

    def balance(self, A: Tensor, G: Tensor) -> float:
        """Return π for two factors.

        Args:
            A: (d_a, d_a) input factor, or its diagonal (d_a,).
            G: (d_g, d_g) output factor.

        Returns:
            π; 1 for a dead layer, whose A or G is zero.

        Raises:
            NonFiniteMatrixError: when the size of one overflows.
        """
        if not isinstance(self.pi, str):
            return self.pi
        size_a, size_g = (BALANCES[self.pi](M.double()) for M in (A, G))
        for name, size in (("A", size_a), ("G", size_g)):
            if not math.isfinite(size):
                raise NonFiniteMatrixError(not_finite(f"the {name} factor", A.dtype))
        if not (size_a > 0 and size_g > 0):
            return 1.0
        return math.sqrt(size_a) / math.sqrt(size_g)

    def factors(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """Return the damped factors A + πγI and G + (γ/π)I.

        Args:
            A: (d_a, d_a) input factor, or its diagonal (d_a,) where it has no other entries.
            G: (d_g, d_g) output factor.

        Returns:
            New tensors of the same shapes.

        Raises:
            ValueError: when a factor is not square, or its size overflows.
        """
        for name, M in (("A", A), ("G", G)):
            if M.ndim != 1 and (M.ndim != 2 or M.shape[0] != M.shape[1]):
                raise ValueError(f"factored damping needs square factors, {name} has shape {tuple(M.shape)}.")
        pi = self.balance(A, G)
        return _shifted(A, pi * self.gamma), _shifted(G, self.gamma / pi)

    def applied_to(self, operator: Operator) -> Operator:
        """Damp the factors of the Kronecker product, or of each one that the operator consists of.

        Args:
            operator: a `Kronecker`, a `DirectSum` of them, a `BlockTridiagonal`.

        Returns:
            An operator of the same structure.

        Raises:
            TypeError: when the operator has no two factors.
        """
        return operator.map_factors(self.factors)


Damping: TypeAlias = Tikhonov | FactoredTikhonov


@contextmanager
def told_in_factors(rule: Damping | None) -> Iterator[None]:
    """Say of factors that a `FactoredTikhonov` damps too little what is added to them, and not to their product.

    Args:
        rule: the damping of what is factorised inside.

    Raises:
        SingularMatrixError: the one that was raised inside, in these units.
    """
    try:
        yield
    except SingularMatrixError as error:
        if not isinstance(rule, FactoredTikhonov):
            raise
        own: BaseException = error
        while isinstance(own.__cause__, SingularMatrixError):
            own = own.__cause__
        assert isinstance(own, SingularMatrixError)
        remedy = "choose a damping λ = γ² that gives the factor (πγ to A, γ/π to G) a shift"
        raise SingularMatrixError(error.what, error.size, error.smallest, own.damping, error.why, remedy) from error


def as_damping(damping: float | Damping | None) -> Damping | None:
    """Read a user's damping: a number means Tikhonov, None means none.

    Args:
        damping: λ, a damping, or None.

    Returns:
        A damping or None.

    Raises:
        TypeError: for anything else.
        ValueError: for a negative or non-finite number.
    """
    if damping is None or isinstance(damping, (Tikhonov, FactoredTikhonov)):
        return damping
    return Tikhonov(damping)


def damp(operator: Operator, damping: Damping | None) -> Operator:
    """Damp a matrix whose blocks may lack factors: under factored damping such a block takes plain λ = γ².

    Args:
        operator: a square operator.
        damping: a damping, or None for none.

    Returns:
        The damped operator.
    """
    if isinstance(damping, FactoredTikhonov):
        return operator.each(lambda block: block.damped(damping if block.factored else damping.tikhonov))
    return operator.damped(damping)


def _shifted(M: Tensor, value: float) -> Tensor:
    return M + value if M.ndim == 1 else plus_identity(M, value)


def _non_negative(value: object, name: str) -> float:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}.")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, not {number}.")
    return number
