"""Single entries of structured operators, without the matrix: from factors where it has any, else by products."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.operators import (
    Dense,
    Diagonal,
    DiagonalKronecker,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    Operator,
    UnitBlocks,
)
from fisherviz.operators.kronecker import kron
from fisherviz.statistics.picked import Pick, picked_moments

COLUMN_ENTRIES = 2**20
"""Entries of an operator's columns that are formed at once, unless one has more."""
COLUMNS = 6
"""Vectors of a layer's size that the product with one column takes, at most."""


def entries(operator: Operator, row: Pick, col: Pick) -> Tensor:
    """An operator's entries at picked rows and columns.

    Args:
        operator: a block between two layers, in unit order.
        row: what is picked of the first layer.
        col: of the second; the very same object for a layer's own block.

    Returns:
        (S_row, S_col).
    """
    if isinstance(operator, Kronecker):
        A = operator.A[row.inputs][:, col.inputs]
        identity = len(operator.tensors) == 1  # G is one that is not written down
        G = _same(row.units, col.units).to(A.dtype) if identity else operator.G[row.units][:, col.units]
        return kron(G, A)
    if isinstance(operator, KroneckerSum):
        return torch.stack([entries(term, row, col) for term in operator.terms]).sum(0)
    if isinstance(operator, DiagonalKronecker):
        return kron(operator.G[row.units][:, col.units], torch.diag(operator.A[row.inputs]))
    if isinstance(operator, KroneckerEigen):
        return _of_eigenbasis(operator, row)
    if isinstance(operator, Dense):
        return operator.M[row.flat][:, col.flat]
    if isinstance(operator, Diagonal | Identity):
        return torch.diag(operator.diagonal()[row.flat])
    if isinstance(operator, UnitBlocks):
        return torch.block_diag(*operator.B[row.units][:, row.inputs][:, :, row.inputs])
    if isinstance(operator, ExampleSpace | ExampleUnits):
        found = picked_moments([operator.capture], [row]).mul_(operator.factor)
        if isinstance(operator, ExampleUnits):
            unit = row.units.repeat_interleave(len(row.inputs))
            found *= _same(unit, unit)
        found.diagonal().add_(operator.shift)
        return found
    return _by_products(operator, row.flat, col.flat)


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Which of two lists' numbers are equal, (n, m)."""
    return one.unsqueeze(1) == other


def _of_eigenbasis(operator: KroneckerEigen, pick: Pick) -> Tensor:
    """Σ_kl Q_G[o,k] Q_G[o',k] S[k,l] Q_A[i,l] Q_A[i',l], outputs first: no vectors of the layer's size are formed."""
    outputs, count = operator.QG[pick.units], len(pick.units)
    pairs = (outputs.unsqueeze(1) * outputs).flatten(0, 1)  # (u u, dg)
    if operator.QA is None:
        blocks = (pairs @ operator.S[:, pick.inputs]).diag_embed()
    else:
        inputs = operator.QA[pick.inputs]
        blocks = torch.stack([(inputs * weights) @ inputs.mT for weights in pairs @ operator.S])
    return blocks.unflatten(0, (count, count)).transpose(1, 2).reshape(pick.size, pick.size)


def _by_products(operator: Operator, rows: Tensor, cols: Tensor) -> Tensor:
    """Rows of some columns, as many at a time as fit."""
    found = []
    for part in cols.split(max(1, COLUMN_ENTRIES // max(operator.shape))):
        units = torch.zeros(operator.shape[1], len(part), dtype=operator.dtype, device=operator.device)
        units[part, torch.arange(len(part), device=part.device)] = 1
        found.append((operator @ units)[rows])
    return torch.cat(found, 1)
