"""The sum of two operators of one structure, where the sum has that structure too.

Sums over data sets are such: first factors A ⊗ I add up to first factors, unit blocks to unit blocks. Two products of
two factors do not add up to one (Benzing 2021, appendix C).
"""

from __future__ import annotations

from torch import Tensor

from fisherviz.operators.base import Operator
from fisherviz.operators.dense import Dense, UnitBlocks
from fisherviz.operators.direct_sum import DirectSum
from fisherviz.operators.kronecker import Kronecker
from fisherviz.operators.simple import Diagonal, Identity


def added(x: Operator, y: Operator) -> Operator | None:
    """The sum of two operators that takes no more memory than one of them.

    Args:
        x: an operator.
        y: another.

    Returns:
        The sum, or None where two operators of these structures have none of the same.
    """
    if x.shape != y.shape or type(x) is not type(y):
        return None
    if isinstance(x, DirectSum) and isinstance(y, DirectSum):
        return _side_by_side(x, y)
    if isinstance(x, Kronecker) and isinstance(y, Kronecker):
        same = x.first_alone and y.first_alone and x.A.shape == y.A.shape
        return Kronecker.over_units(x.A + y.A, x.shape[0] // len(x.A)) if same else None
    if isinstance(x, Identity):
        return Identity(x.size, x.factor + y.tensors[0])
    if isinstance(x, UnitBlocks) and isinstance(y, UnitBlocks):
        return _entries(UnitBlocks, x.B, y.B)
    for kind in (Diagonal, Dense):
        if isinstance(x, kind):
            return _entries(kind, x.tensors[0], y.tensors[0])
    return None


def _entries(kind: type[Operator], x: Tensor, y: Tensor) -> Operator | None:
    return kind(x + y) if x.shape == y.shape else None  # type: ignore[call-arg]


def _side_by_side(x: DirectSum, y: DirectSum) -> DirectSum | None:
    if x.rows != y.rows or x.cols != y.cols:
        return None
    parts = [added(one, other) for one, other in zip(x.operators, y.operators, strict=True)]
    known = [part for part in parts if part is not None]
    return DirectSum(known, x.places) if len(known) == len(parts) else None
