"""The cumulant error bound pair by pair of weights, from all 15 partitions (K-FAC paper, appendix A).

F - F~ is the sum of the 11 partitions that do not keep {a1, a2} apart from {g1, g2}; the bound is the sum of
their absolute values. Nothing is assumed to vanish, so one formula serves every kind of Fisher.
"""

import math

import numpy as np


def partitions(items):
    """All ways to split a tuple into non-empty sets."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        for k in range(len(smaller)):
            yield [*smaller[:k], (first, *smaller[k]), *smaller[k + 1 :]]
        yield [(first,), *smaller]


PARTITIONS = {count: list(partitions(tuple(range(count)))) for count in range(1, 5)}


def cumulant(weights, variables):
    """Joint cumulant of up to four sample vectors under probability weights, by the moment formula."""
    total = 0.0
    for partition in PARTITIONS[len(variables)]:
        term = (-1) ** (len(partition) - 1) * math.factorial(len(partition) - 1)
        for block in partition:
            term = term * (weights @ math.prod(variables[k] for k in block))
        total += term
    return total


def error_and_bound(weights, a1, a2, g1, g2):
    """F - F~ and its bound for one pair of weights."""
    variables = (a1, a2, g1, g2)
    error = bound = 0.0
    for partition in PARTITIONS[4]:
        if all(set(block) <= {0, 1} or set(block) <= {2, 3} for block in partition):
            continue
        term = math.prod(cumulant(weights, [variables[k] for k in block]) for block in partition)
        error += term
        bound += abs(term)
    return error, bound


def table(moments):
    """(error, bound): dictionaries over pairs of layers of (P_i, P_j) matrices, in unit order, for T = 1."""
    weights = np.array([w for w, _, _ in moments])
    units = []
    for i in range(len(moments[0][1])):
        a = np.stack([a[i][0] for _, a, _ in moments])
        g = np.stack([g[i][0] for _, _, g in moments])
        units.append([(a[:, k], g[:, o]) for o in range(g.shape[1]) for k in range(a.shape[1])])
    error, bound = {}, {}
    for i, row in enumerate(units):
        for j, col in enumerate(units):
            pairs = [[error_and_bound(weights, a1, a2, g1, g2) for a2, g2 in col] for a1, g1 in row]
            error[i, j], bound[i, j] = np.moveaxis(np.array(pairs), -1, 0)
    return error, bound
