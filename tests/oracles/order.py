"""Where a weight stands: torch order, unit order (rows of W, their bias last), input order (columns of it).

A layer is (d_out, fan_in, bias) when it is a matrix, or the number of its parameters when it is not.
"""

from itertools import pairwise

import numpy as np


def layer_sizes(layers):
    return [layer if isinstance(layer, int) else layer[0] * (layer[1] + layer[2]) for layer in layers]


def matrix_positions(d_out, fan_in, bias):
    """Torch positions of the entries of the matrix with the bias as last column, (d_out, fan_in + bias)."""
    weight = np.arange(d_out * fan_in).reshape(d_out, fan_in)
    if not bias:
        return weight
    return np.concatenate([weight, d_out * fan_in + np.arange(d_out)[:, None]], axis=1)


def permutation(layers, order):
    """Index array `where` with dense_in_order = dense_in_torch_order[where][:, where]."""
    pieces, start = [], 0
    for layer, size in zip(layers, layer_sizes(layers), strict=True):
        if isinstance(layer, int) or order == "torch":
            where = np.arange(size)
        else:
            positions = matrix_positions(*layer)
            where = (positions if order == "unit" else positions.T).reshape(-1)
        pieces.append(start + where)
        start += size
    return np.concatenate(pieces)


def reorder(dense, layers, order):
    """A torch-order matrix in another order."""
    where = permutation(layers, order)
    return dense[np.ix_(where, where)]


def to_torch(dense, layers, order="unit"):
    """A matrix in `order`, back in torch order."""
    back = np.argsort(permutation(layers, order))
    return dense[np.ix_(back, back)]


def segments(layers):
    """One slice per layer; the same in all three orders."""
    edges = np.cumsum([0, *layer_sizes(layers)])
    return [slice(a, b) for a, b in pairwise(edges)]
