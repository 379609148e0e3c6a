"""What every kind of layers with structure gives: how inputs and output gradients become rows of its matrix W̄.

A layer of weight sharing acts at T positions: s_t = W̄ ā_t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """A weight whose entries do not lie in memory as in W̄ (rows, columns).

    Attributes:
        shape: the weight's, or a finer one.
        axes: the order of its axes that makes them lie so.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]


class Kind(ABC):
    """What a class of modules has in common; its weight is (d_out, ...), its bias (d_out,)."""

    name = ""
    """What the kind is called; "" for the module's class."""
    weight, bias = "weight", "bias"
    """What its modules call them."""
    unseen = "its forward did not run on dense tensors, but its parameters act"
    """Why a layer of the kind may act without having been seen."""
    own_inputs = False
    """Whether every unit has an input of its own: such a layer has unit blocks, but no Kronecker factors."""
    one_hot = False
    """Whether the inputs are one-hot: `unfold` gives their positions (N, T), never the inputs."""

    goes_on = False
    """Whether its modules do more to what their matrix gives (an activation), element by element."""

    def refusal(self, module: Any) -> str:
        """Why a module of the kind has no structure; "" where it has."""
        return ""

    def stored(self, module: Any) -> Stored | None:
        """How the weight's entries lie in memory; None: row by row, as in W̄."""
        return None

    @abstractmethod
    def units(self, module: Any) -> int:
        """Output units or channels d_out."""

    def groups(self, module: Any) -> int:
        """Groups of units that see inputs of their own."""
        return 1

    def same_matrix(self, module: Any, kind: Kind, other: Any) -> bool:
        """Whether another module's parameters stand in its matrix as a module's own do in W̄."""
        return kind is self and (self.groups(module), self.stored(module)) == (kind.groups(other), kind.stored(other))

    def transposed_matrix(self, kind: Kind) -> bool:
        """Whether the weight of a module of another kind is the transpose of W̄ (without the bias)."""
        return False

    def fan_in(self, module: Any) -> int:
        """Inputs of one output unit, without the bias."""
        return math.prod(module.weight.shape[1:])

    def called(self, shape: torch.Size) -> Kind:
        """The kind in a call whose output has this shape."""
        return self

    def is_single(self, module: Any, x: Tensor) -> bool:
        """Whether an input is one row or image without an axis of several, which the module takes as well."""
        return False

    @abstractmethod
    def unfold(self, module: Any, x: Tensor) -> Tensor:
        """What the weight multiplies: (N, T, fan_in), or (N, T, groups, fan_in)."""

    @abstractmethod
    def positions(self, module: Any, x: Tensor) -> int:
        """Positions T that share the weight."""

    @abstractmethod
    def outputs(self, module: Any, g: Tensor) -> Tensor:
        """Gradients (K, N, ...) at the module's output as (K, N, T, dg), or (K, N, T, groups, dg)."""

    def ones(self, module: Any, x: Tensor) -> Tensor:
        """The bias coordinate alone, for a frozen weight."""
        groups = (self.groups(module),) if self.groups(module) > 1 else ()
        return x.new_ones(len(x), self.positions(module, x), *groups, 1)

    def with_bias(self, module: Any, x: Tensor) -> Tensor:
        """What W̄ multiplies: `unfold` with the bias coordinate appended."""
        columns = self.unfold(module, x)
        return torch.cat([columns, columns.new_ones(*columns.shape[:-1], 1)], -1)
