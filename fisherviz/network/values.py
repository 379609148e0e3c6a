"""Tensors, arrays and random generators with the values that they have now, and how these are put back in place."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Value:
    """A tensor and its values.

    Args:
        tensor: the tensor.
        copied: whether its values are kept; otherwise torch's count of changes tells that they changed.
        large: whether values are kept only because it was seen to change, or to see whether it does.
    """

    __slots__ = ("data", "large", "place", "plain", "saved", "tensor", "version")

    def __init__(self, tensor: Tensor, copied: bool, large: bool) -> None:
        self.tensor, self.large = tensor, large
        self.data = data = tensor.detach()
        self.plain, self.saved = _is_plain(tensor), data.clone() if copied else None
        if self.plain:
            self.place = tensor.data_ptr()
            if 0 in tensor.stride() and _overlaps(tensor):
                self.plain, self.saved = False, None
        # what has no plain values, or whose entries share them, is told by torch's count of changes
        self.version = 0 if self.plain and copied and not large else _version(tensor)

    def changed(self) -> bool:
        """Whether its values are others, as far as they can be put back."""
        if self.saved is None or (self.large and self._stays() and _version(self.tensor) == self.version):
            return False
        return not self._same(self.saved)

    def fresh(self) -> Tensor | None:
        """A tensor with the values that it had; None where it must be this one, since gradients go to it."""
        return None if self.saved is None or self.tensor.requires_grad else self.saved.clone()

    def restore(self) -> bool:
        """Put its memory and its values back; whether they were others."""
        if self.saved is None:
            return _version(self.tensor) != self.version
        stays = self._stays() and self.tensor.shape == self.data.shape
        if stays and self._same(self.saved):
            return False
        if not stays:
            self.tensor.data = self.data
        if not self._same(self.saved) and not self.tensor.is_inference():
            with torch.no_grad():
                self.tensor.copy_(self.saved)
        return True

    def _stays(self) -> bool:
        """Whether it has the memory that it had, and in the same type."""
        return not self.plain or (self.tensor.data_ptr() == self.place and self.tensor.dtype is self.data.dtype)

    def _same(self, saved: Tensor) -> bool:
        if not self.plain:
            return _version(self.tensor) == self.version
        now = self.tensor
        return now.dtype is saved.dtype and now.shape == saved.shape and same_bits(now, saved)


class Array:
    """A numpy array and its values."""

    __slots__ = ("array", "large", "saved")

    def __init__(self, array: np.ndarray[Any, Any], large: bool) -> None:
        self.array, self.large, self.saved = array, large, array.copy()

    def restore(self) -> bool:
        """Put its values back; whether they were others."""
        if self.array.shape != self.saved.shape or self.array.dtype != self.saved.dtype:
            return True  # resized or retyped, which a reference to it forbids
        if self.array.tobytes() == self.saved.tobytes():
            return False
        np.copyto(self.array, self.saved)
        return True


def same_bits(p: Tensor, saved: Tensor) -> bool:
    """Whether two tensors have the same values, NaN where the other has it."""
    return torch.equal(p, saved) or bool(((p == saved) | (p.isnan() & saved.isnan())).all())


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be compared, at a place in memory."""
    odd = tensor.is_meta or tensor.is_quantized or tensor.is_nested
    return tensor.layout is torch.strided and not odd


def _version(tensor: Tensor) -> int:
    """Torch's count of changes in place; tensors of inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


def _overlaps(tensor: Tensor) -> bool:
    """Whether entries of a tensor share memory, as those of an expanded one."""
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def generator_state(generator: Any) -> Any:
    """The state of a random generator of torch, numpy or Python."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def set_generator_state(generator: Any, state: Any) -> None:
    """Put it back."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
