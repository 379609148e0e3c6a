"""The K-FAC paper's cumulant error bound: why F̃ is close to F, measured (section 3.1, eqs. 3-4, appendix A).

For each pair of weights F - F̃ is a sum of products of joint cumulants of ā¹, ā², g¹, g²; the bound adds their absolute
values. T = 1. Works in tiles of each block, so that no P² array is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from fisherviz.capture.captures import Capture
from fisherviz.exact.fisher import Fisher, require_fisher
from fisherviz.operators.finite import NonFiniteMatrixError, not_finite
from fisherviz.support.memory import at_once
from fisherviz.support.progress import progress_bar
from fisherviz.support.tables import counted, html_table

MOST_PAIRS = 20
"""Pairs of layers that a notebook shows."""
_TILE_ENTRIES = 2**23
"""Entries of per-example products, and of a block's tile, held at once."""


@dataclass(frozen=True)
class CumulantBound:
    """Sums over all weight pairs of |F - F̃| and of its cumulant bound.

    Attributes:
        error: Σ |F - F̃|.
        bound: Σ of the absolute values of the cumulant terms.
        frame: one row per ordered pair of layers: row, col, error, bound.
        kind: kind of the Fisher. For "exact", three terms remain of the bound; for "mc" and "empirical" the mean of g
            and its covariance with ā do not vanish, and eleven do.
    """

    error: float
    bound: float
    frame: pd.DataFrame
    kind: str

    @property
    def ratio(self) -> float:
        """Error / bound; 0 where both vanish."""
        return self.error / self.bound if self.bound else 0.0

    def __repr__(self) -> str:
        return f"cumulant bound ({self.kind}): Σ|F - F̃| = {self.error:.6g} ≤ {self.bound:.6g}, ratio {self.ratio:.3f}"

    def _repr_html_(self) -> str:
        largest = self.frame.sort_values("bound", ascending=False, kind="stable").head(MOST_PAIRS)
        rows = [
            (str(row), str(col), f"{error:.4g}", f"{bound:.4g}", f"{error / bound:.3f}" if bound else "–")
            for row, col, error, bound in largest[["row", "col", "error", "bound"]].itertuples(index=False)
        ]
        smaller = len(self.frame) - len(rows)
        rest = [f"{counted(smaller, 'pair')} of layers with smaller bounds: .frame has all."] if smaller else []
        return html_table(
            ("layer", "layer", "error", "bound", "ratio"), rows, words=(0, 1), caption=repr(self), notes=rest
        )


def cumulants(
    fisher: Fisher, layers: Sequence[str | int] | str | int | None = None, *, progress: bool = True
) -> CumulantBound:
    """Sum the error of KFAC's Khatri-Rao matrix and its cumulant bound over all pairs of weights.

    Args:
        fisher: the exact Fisher.
        layers: names or positions of the layers taken jointly; None: all but those that scale single features
            (normalisation, PReLU), which have no factors.
        progress: show a progress bar over block pairs where it takes longer than a moment, on a terminal or in a
            notebook; False: never.

    Returns:
        A `CumulantBound`. For reduction "sum", both are N times those of the mean.

    Raises:
        NotImplementedError: a layer has weight sharing or takes the generic path.
        ValueError: a sum overflows; the sentence names the layers.
        TypeError: the layers are neither names nor positions.
    """
    require_fisher(fisher, "fv.cumulants")
    captures = fisher.example_space()
    factors = [layer.name for layer in fisher.space.layers if not layer.own_inputs]
    if layers is not None and not isinstance(layers, Iterable | int):
        raise TypeError(f"layers= takes names or positions of layers, got {type(layers).__name__}.")
    named = [layers] if isinstance(layers, str | int) else factors if layers is None else layers
    chosen = list(dict.fromkeys(fisher.space.position(k) for k in named))
    if not chosen:
        raise ValueError("no layer with Kronecker factors is named or there; name one with layers=.")
    sides: dict[int, Capture] = {}
    for i in chosen:
        layer = fisher.space.layers[i]
        capture = captures[layer.name]
        if not isinstance(capture, Capture) or not capture.factored:
            shared = "it shares weights over positions or has groups"
            why = layer.note or ("it scales single features" if layer.own_inputs else shared)
            raise NotImplementedError(
                f"the cumulant bound is for one input vector per example; layer {layer.name!r} has none: {why}."
            )
        sides[i] = capture.to(torch.float64)  # products of four, whose differences are wanted
    factor = fisher.scale * fisher.examples
    rows = []
    pairs = [(i, j) for i in chosen for j in chosen if i <= j]
    bar = progress_bar(len(pairs), "cumulants", "block", progress and fisher.processes.rank == 0)

    def summed(pair: tuple[int, int]) -> tuple[float, float]:
        found = _pair(sides[pair[0]], sides[pair[1]], fisher.kind)
        bar.update()
        return found

    with bar:
        sums = fisher.deal(pairs, summed, "cumulant sums")
    for (i, j), (error, bound) in zip(pairs, sums, strict=True):
        if not math.isfinite(error + bound):
            names = " and ".join(dict.fromkeys(f"layer {fisher.space.names[k]!r}" for k in (i, j)))
            raise NonFiniteMatrixError(not_finite(f"{names}: the cumulants", torch.float64))
        for row, col in sorted({(i, j), (j, i)}):
            rows.append((fisher.space.names[row], fisher.space.names[col], factor * error, factor * bound))
    frame = pd.DataFrame(rows, columns=["row", "col", "error", "bound"])
    return CumulantBound(float(frame["error"].sum()), float(frame["bound"].sum()), frame, fisher.kind)


@dataclass(frozen=True)
class _Side:
    """One layer's inputs a (N, da) and pseudo-gradients g (K, N, dg) in float64-safe shape, with first moments."""

    a: Tensor
    g: Tensor

    @property
    def mean_a(self) -> Tensor:
        """E[ā]."""
        return self.a.mean(0)

    @property
    def single_g(self) -> Tensor:
        """The mean over vectors of the unscaled scores, (N, dg): the stored ones are divided by √K."""
        return self.g.sum(0) / len(self.g) ** 0.5


def _pair(row: Capture, col: Capture, kind: str) -> tuple[float, float]:
    """Σ|F - F̃| and Σ bound over one block."""
    i, j = _Side(row.a[:, 0], row.g[:, :, 0]), _Side(col.a[:, 0], col.g[:, :, 0])
    A = i.a.T @ j.a / len(i.a)
    error = bound = 0.0
    for units in _slices(A, i.g.shape[2], j.g.shape[2] * len(i.a)):
        outer = torch.einsum("kno,knp->nop", i.g[:, :, units], j.g)  # Σ_k g¹ g², (N, o, p)
        n, o, p = outer.shape
        flat = outer.reshape(n, o * p)
        G = flat.mean(0).reshape(o, p)
        first = (flat.T @ i.a / n).reshape(o, p, -1)  # E[ā¹ g¹ g²]
        second = (flat.T @ j.a / n).reshape(o, p, -1)  # E[ā² g¹ g²]
        room = max(1, at_once(_TILE_ENTRIES, A) // (o * p * j.a.shape[1]))
        for inputs in _slices(A, i.a.shape[1], j.a.shape[1] * max(n, o * p), room):
            products = (i.a[:, inputs, None] * j.a[:, None, :]).reshape(n, -1)
            F = (flat.T @ products / n).reshape(o, p, -1, j.a.shape[1])
            difference = F - G[:, :, None, None] * A[inputs]
            third_i = first[:, :, inputs] - G[..., None] * i.mean_a[inputs]  # E[ā¹gg] - E[ā¹]E[gg]
            third_j = second - G[..., None] * j.mean_a
            error += _total(difference)
            if kind == "exact":
                terms = _exact_terms(difference, third_i, third_j, i.mean_a[inputs], j.mean_a)
            else:
                terms = _all_terms(difference, third_i, third_j, i, j, units, inputs, A, G)
            bound += sum(_total(term) for term in terms)
    return error, bound


def _exact_terms(
    difference: Tensor, third_i: Tensor, third_j: Tensor, mean_i: Tensor, mean_j: Tensor
) -> Iterator[Tensor]:
    """κ(ā¹,ā²,g¹,g²), E[ā¹] κ(ā²,g¹,g²), E[ā²] κ(ā¹,g¹,g²): E[g] = 0 and cov(ā, g) = 0 hold identically."""
    one = mean_i[None, None, :, None] * third_j[:, :, None, :]
    two = mean_j[None, None, None, :] * third_i[:, :, :, None]
    yield difference - one - two
    yield one
    yield two


def _all_terms(
    difference: Tensor,
    third_i: Tensor,
    third_j: Tensor,
    i: _Side,
    j: _Side,
    units: slice,
    inputs: slice,
    A: Tensor,
    G: Tensor,
) -> Iterator[Tensor]:
    """The 11 of 15 partitions of (ā¹, ā², g¹, g²) that F̃ = E[ā¹ā²] E[g¹g²] does not hold, from joint moments.

    Axes: (o, p, inputs of i, inputs of j).
    """
    n = len(i.a)
    a1, a2 = i.a[:, inputs], j.a
    g1, g2 = i.single_g[:, units], j.single_g
    ma1, ma2, mg1, mg2 = a1.mean(0), a2.mean(0), g1.mean(0), g2.mean(0)
    c11 = g1.T @ a1 / n - torch.outer(mg1, ma1)  # κ(ā¹, g¹), (o, i)
    c12 = g2.T @ a1 / n - torch.outer(mg2, ma1)  # κ(ā¹, g²), (p, i)
    c21 = g1.T @ a2 / n - torch.outer(mg1, ma2)  # κ(ā², g¹), (o, j)
    c22 = g2.T @ a2 / n - torch.outer(mg2, ma2)  # κ(ā², g²), (p, j)
    caa = A[inputs] - torch.outer(ma1, ma2)
    pairs = (a1[:, :, None] * a2[:, None, :]).reshape(n, -1)
    # third cumulants κ(ā¹, ā², g): joint moment less the products of lower cumulants
    k1 = (g1.T @ pairs / n).reshape(len(mg1), len(ma1), len(ma2))
    k1 = k1 - caa * mg1[:, None, None] - c11[:, :, None] * ma2 - c21[:, None, :] * ma1[:, None] - _outer3(mg1, ma1, ma2)
    k2 = (g2.T @ pairs / n).reshape(len(mg2), len(ma1), len(ma2))
    k2 = k2 - caa * mg2[:, None, None] - c12[:, :, None] * ma2 - c22[:, None, :] * ma1[:, None] - _outer3(mg2, ma1, ma2)
    # κ(ā, g¹, g²): third_x is E[ā g g] - E[ā] E[g g]; take away what the means of g bring in
    ki = third_i - mg1[:, None, None] * c12[None] - mg2[None, :, None] * c11[:, None, :]
    kj = third_j - mg1[:, None, None] * c22[None] - mg2[None, :, None] * c21[:, None, :]
    o, p = (slice(None), None, None, None), (None, slice(None), None, None)
    terms = [
        ma1[:, None] * kj[:, :, None, :],
        ma2 * ki[:, :, :, None],
        mg1[o] * k2[None],
        mg2[p] * k1[:, None],
        c11[:, None, :, None] * c22[None, :, None, :],
        c12[None, :, :, None] * c21[:, None, None, :],
        c11[:, None, :, None] * ma2 * mg2[p],
        c12[None, :, :, None] * ma2 * mg1[o],
        c21[:, None, None, :] * ma1[:, None] * mg2[p],
        c22[None, :, None, :] * ma1[:, None] * mg1[o],
    ]
    rest = difference
    for term in terms:
        rest = rest - term
        yield term
    yield rest  # κ(ā¹, ā², g¹, g²)


def _outer3(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return x[:, None, None] * y[:, None] * z


def _total(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))


def _slices(like: Tensor, size: int, width: int, most: int | None = None) -> Iterator[slice]:
    """Consecutive slices of range(size), each `width` entries per index, that hold at most a tile's entries."""
    step = max(1, at_once(_TILE_ENTRIES, like) // width)
    step = step if most is None else min(step, most)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
