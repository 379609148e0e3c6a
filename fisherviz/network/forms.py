"""What a list means that somebody gives as data: the batch [inputs, targets] that a DataLoader makes, or batches.

Told by what its parts are, and by what can be no targets of the likelihood; what may be either is refused. Everything
that takes data relies on it, through `Batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fisherviz.network.distributions import Likelihood


def is_pair(batch: Any) -> bool:
    """Whether a batch has the form (inputs, targets)."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def is_split_batch(
    data: list[Any], likelihood: Likelihood | None = None, belongs: Callable[[Any, Tensor], bool] | None = None
) -> bool:
    """Whether a list is one batch [inputs, targets], as a DataLoader gives it, and not a list of batches.

    Args:
        data: the list.
        likelihood: whose targets the second part would be; None: of any.
        belongs: whether a tensor can be targets of a model's outputs for some inputs; asked for numbers alone, as ids
            with a mask, which can be no targets either, would be read as two batches; None: it may.

    Raises:
        TypeError: it may be either.
    """
    if len(data) > 2:
        _refuse_parts(data)
    if len(data) != 2 or not isinstance(data[1], Tensor) or not data[1].dim():
        return False
    first, second = data
    if _examples(first) != len(second):
        return False
    if not isinstance(first, Tensor):
        if is_pair(first):
            _refuse("a pair and a tensor", "((first, second), targets)", "[(inputs, targets), (inputs, None)]")
        return True  # no two batches of the same inputs
    if first.dtype != second.dtype or first.dim() != second.dim():
        return True
    other_width = first.is_floating_point() and first.dim() == 2 and first.shape != second.shape
    if not other_width and likelihood is not None and not likelihood.may_be_targets(second):
        return False
    if not other_width and first.is_floating_point() and belongs is not None and not belongs(first, second):
        return False
    _refuse(
        f"two tensors of shapes {tuple(first.shape)} and {tuple(second.shape)}", "(inputs, targets)",
        "[(first,), (second,)]",
    )  # fmt: skip
    return False


def _examples(inputs: Any) -> int | None:
    """Number of examples of inputs that are tensors alone."""
    leaves = pytree.tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors and len(tensors) == len(leaves) else None


def _refuse(parts: str, pair: str, batches: str) -> None:
    raise TypeError(
        f"a list of {parts} may be inputs with their targets or two batches; pass a tuple {pair}, or {batches} for two "
        "batches."
    )


def _refuse_parts(data: list[Any]) -> None:
    """Refuse a list of as many examples of several kinds: the inputs and targets of one batch, no batches."""
    if not all(isinstance(part, Tensor) and part.dim() for part in data) or len({len(part) for part in data}) > 1:
        return
    if len({(part.dtype, part.dim()) for part in data}) > 1:
        shapes = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" for part in data)
        raise TypeError(
            f"a list of tensors {shapes} is no list of batches, whose inputs are alike; pass one batch of several "
            "inputs as a tuple ((first, second), targets), and batches as [(inputs, targets), ...]."
        )
