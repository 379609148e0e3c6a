"""The example space: F = s U Uᵀ over some layers, one column of U per example and vector, and Woodbury in it.

U itself is never formed. (λI + s U Uᵀ)⁻¹ v = (v - U (λ/s I + UᵀU)⁻¹ Uᵀ v) / λ (Benzing eq. 18-21; Shrestha eq. 40-43).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.network.space import ParameterSpace
from fisherviz.operators.factorise import DampedCholesky, eigh
from fisherviz.operators.finite import square_sum
from fisherviz.operators.residual import tell_of_rounding
from fisherviz.statistics.gradients import (
    Rows,
    add_example_gram,
    columns_product,
    gram_and_cross,
    gram_strips,
    mirrored,
    rows_product,
)
from fisherviz.support.memory import require

ACCURATE = 1e4
"""Condition number of the damped matrix up to which float32 keeps enough digits for Woodbury's difference."""


class Examples:
    """F = s U Uᵀ with the per-example gradients of some layers as U's columns.

    Args:
        captures: one per layer, of the same examples and vectors.
        scale: s, 1/N for a mean over examples.
        working: the type that is computed in, each layer's captures being converted when they are read; None: theirs.
    """

    def __init__(self, captures: Sequence[AnyCapture], scale: float, working: torch.dtype | None = None) -> None:
        self.captures, self.scale, self.working = tuple(captures), scale, working

    @property
    def columns(self) -> int:
        """Number K N of columns of U."""
        return self.captures[0].vectors * self.captures[0].examples

    @property
    def size(self) -> int:
        """Number P of parameters, the layers' together."""
        return sum(capture.size for capture in self.captures)

    @property
    def dtype(self) -> torch.dtype:
        """Of results."""
        return self.working or self.captures[0].tensors[0].dtype

    def only(self, layers: Iterable[int]) -> Examples:
        """The same over some of the layers, by position."""
        return Examples([self.captures[i] for i in layers], self.scale, self.working)

    def double(self) -> Examples:
        """The same in float64, held so."""
        return Examples([capture.to(torch.float64) for capture in self.captures], self.scale)

    def in_double(self) -> Examples:
        """The same in float64, of a few products: one layer at a time is held so."""
        return Examples(self.captures, self.scale, torch.float64)

    def _each(self) -> Iterator[AnyCapture]:
        """The captures as they are computed with."""
        return (c if self.working in (None, c.tensors[0].dtype) else c.to(self.dtype) for c in self.captures)

    def project(self, pieces: Sequence[Tensor]) -> Tensor:
        """Uᵀ v, (K N, r), for one unit-order piece (P_i, r) of v per layer."""
        return _sum(rows_product(capture, piece) for capture, piece in zip(self._each(), pieces, strict=True))

    def combine(self, w: Tensor) -> list[Tensor]:
        """U w as one unit-order piece (P_i, r) per layer, for w (K N, r)."""
        return [columns_product(capture, w) for capture in self._each()]

    def combine_flat(self, w: Tensor, space: ParameterSpace) -> Tensor:
        """U w for one column w (K N,), flat in torch order (P,), each parameter written where it stands."""
        out = w.new_empty(space.size)
        for i, capture in enumerate(self._each()):
            if isinstance(capture, Capture) and capture.factored and space.lies_as_matrix(i):
                combined = (capture.g[:, :, 0] * w.view(capture.vectors, -1, 1)).sum(0)
                for place in space.of(i):
                    torch.mm(combined.T, capture.a[:, 0, place.columns], out=out[place.flat].view(place.matrix))
                continue
            parts = space.scatter(i, columns_product(capture, w.unsqueeze(1))[:, 0])
            for place in space.of(i):
                out[place.flat] = parts[place.name]
        return out

    def product(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """F v by pieces."""
        return self.combine(self.project(pieces).mul_(self.scale))

    def make_gram(self) -> Tensor:
        """UᵀU, (K N, K N); MemoryError where it does not fit beside a layer's part of it."""
        like, columns = self.captures[0].tensors[0], self.columns
        what = f"the Gram matrix of {columns:,} gradients"
        require(2 * columns**2 * self.dtype.itemsize, like.device, what, "use fewer examples or kind='mc'")
        total = like.new_zeros(columns, columns, dtype=self.dtype)
        for capture in self._each():
            add_example_gram(total, capture)
        return total

    def least_norm(self) -> float:
        """What ‖F‖_F is at least: the trace over the root of the rank, for one product with each gradient entry."""
        trace = sum(float(capture.square_sum().sum(dtype=torch.float64)) for capture in self._each())
        return self.scale * trace / min(self.columns, self.size) ** 0.5

    def gram_and_cross(self, k: int) -> tuple[Tensor, Tensor]:
        """UᵀU and Uᵀ U' with the first k vectors' columns in U and the others' in U'."""
        grams, crosses = zip(*(gram_and_cross(capture, k) for capture in self._each()), strict=True)
        return _sum(grams), _sum(crosses)

    def square_norm(self, ranges: Sequence[Rows] | None = None) -> float:
        """‖F‖²_F, accumulated in float64 over tiles of the Gram matrix; what some `tile_ranges` give of it."""
        total = 0.0
        for strips in gram_strips(self.captures, ranges):
            total += mirrored(lambda each: square_sum(each[0]), [_sum(strips)])
        return self.scale**2 * total

    def vectors(self, start: int, stop: int) -> Examples:
        """The same with the columns of vectors start..stop alone."""
        some = [capture.select_vectors(start, stop) for capture in self.captures]
        return Examples(some, self.scale, self.working)


class Woodbury:
    """(F + λI)⁻¹ in example space, factorised once, in float64.

    Where the damping is small beside F, float32's rounding of U's products would drown it: then all of it is float64.
    Where it is below the rounding of U itself, a warning says so.

    Args:
        examples: F.
        damping: λ, positive.
        gram: UᵀU, where it is known.

    Raises:
        SingularMatrixError: λ drowns in rounding; the message names, in F's units, the damping that would do.
    """

    def __init__(self, examples: Examples, damping: float, gram: Tensor | None = None) -> None:
        self.damping, self.dtype = damping, examples.dtype
        own, s, most = gram is None, examples.scale, (ACCURATE - 1) * damping
        less = examples.dtype != torch.float64
        self.widened = less and gram is None and most < examples.least_norm() < math.inf
        """Whether it works in float64 on examples of less."""
        if gram is None and not self.widened:
            gram = examples.make_gram()
        if gram is not None:
            self.widened = less and s * square_sum(gram) ** 0.5 > most
        if self.widened:
            own, gram = True, None  # before a larger one is made
            examples = examples.in_double()
            gram = examples.make_gram()
        assert gram is not None
        tell_of_rounding(damping, s * square_sum(gram) ** 0.5, self.dtype)
        self.examples = examples
        if own:
            gram = gram.double()  # what it was made in goes before the factor comes
        again = (lambda: examples.make_gram().double()) if own else None
        self.factor = DampedCholesky(gram, damping / s, "the Fisher in example space", s, again)

    @property
    def log_determinant(self) -> float:
        """Log det(F + λI), by Sylvester's identity: (P - K N) log λ + log det s(λ/s I + UᵀU)."""
        columns, scale = self.examples.columns, self.examples.scale
        rest = (self.examples.size - columns) * math.log(self.damping)
        return rest + columns * math.log(scale) + self.factor.log_determinant

    def solve(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """(F + λI)⁻¹ v by unit-order pieces (P_i, r)."""
        work = self.examples.dtype
        given = [piece.to(work) for piece in pieces]
        w = self.examples.combine(self.factor.solve(self.examples.project(given)))
        return [((v - u) / self.damping).to(self.dtype) for v, u in zip(given, w, strict=True)]


def solve_combination(joint: Examples, k: int, c: Tensor, damping: float, space: ParameterSpace) -> Tensor:
    """(F + λI)⁻¹ v for a combination v = U' c of further vectors' gradients on the same inputs.

    v is never written down: its products with U come from Gram matrices, and (v - U w) / λ is one combination.

    Args:
        joint: [U U'], the k vectors of U first.
        k: how many vectors are the Fisher's.
        c: (L N,).
        damping: λ, positive.
        space: the layers' parameters.

    Returns:
        Flat in torch order, (P,).
    """
    gram, cross = joint.gram_and_cross(k)
    solver = Woodbury(joint.vectors(0, k), damping, gram)
    if solver.widened:
        joint, c = joint.in_double(), c.double()
        cross = joint.gram_and_cross(k)[1]
    w = solver.factor.solve((cross @ c).unsqueeze(1))[:, 0]
    return joint.combine_flat(torch.cat([w.neg_(), c]).div_(damping), space).to(solver.dtype)


def root_correction(gram: Tensor, scale: float, shift: float, what: str) -> Tensor:
    """The W with (s U Uᵀ + shift I)^(-1/2) = shift^(-1/2) I + U W Uᵀ, the symmetric root, from UᵀU alone.

    With UᵀU = Y diag(σ²) Yᵀ its eigenvalues are ((s σ² + t)^(-1/2) − t^(-1/2)) / σ², written so that nothing cancels.

    Args:
        gram: UᵀU (..., n, n), in float64.
        scale: s.
        shift: t, positive.
        what: the Gram matrix in words, for the error.

    Returns:
        W (..., n, n).
    """
    values, vectors = eigh(gram, what)
    root, own = shift**0.5, (scale * values.clamp_min(0) + shift).sqrt()
    return (vectors * (-scale / (root * own * (root + own))).unsqueeze(-2)) @ vectors.mT


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Sum of new tensors, into the first."""
    return reduce(lambda total, part: total.add_(part), parts)
