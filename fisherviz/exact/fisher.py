"""Fisher: the exact matrix of the probed parameters over data, never materialised unless asked.

Blocks, units, products, solves, norms and samples; requests make passes over the data, or use captures kept from an
earlier one. `passes.Passes` holds the data's side of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor

from fisherviz.exact import spectra
from fisherviz.exact.finite import blaming, finite_gram, require_finite_number
from fisherviz.exact.parts import KEPT, Parts
from fisherviz.exact.planning import REQUESTS, plan, require_fits
from fisherviz.exact.posterior import Posterior
from fisherviz.exact.products import Vector, damping_number
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.matrices.finite import require_finite_vector
from fisherviz.matrices.layered import LayeredMatrix, dense_matrix, inverse_title
from fisherviz.operators import Operator
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov
from fisherviz.operators.factorise import DampedCholesky, eigenvalues, symmetric
from fisherviz.operators.finite import square_sum
from fisherviz.operators.inverse import Inverse
from fisherviz.operators.lanczos import extreme_eigenvalues
from fisherviz.operators.residual import residual_of, tell, tell_of_rounding
from fisherviz.statistics.examples import Woodbury, solve_combination
from fisherviz.statistics.products import GRADIENT_ENTRIES
from fisherviz.support.choices import count, one_of
from fisherviz.support.memory import at_once
from fisherviz.support.plan import Plan
from fisherviz.support.tables import counted, paragraph


class Fisher(Parts):
    """The Fisher information matrix of a probe's parameters over data; made by `Probe.fisher`.

    Flat vectors and dense matrices are in torch order: the probed parameters as in `named_parameters()`, each
    row-major. Every object knows its kind: "exact", "mc" or "empirical".
    """

    def __repr__(self) -> str:
        label = f"mc, {counted(self.samples, 'sample')}" if self.kind == "mc" else self.kind
        over = "; no pass yet" if self.seen is None else f" over {counted(self.seen, 'example')}"
        return (
            f"Fisher {self.space.size:,} x {self.space.size:,} ({label}, {self.reduction}{over}, "
            f"{counted(len(self.layers), 'layer')}, {self.network.likelihood!r})"
        )

    def _repr_html_(self) -> str:
        return paragraph(repr(self)) + self.probe._repr_html_()

    def plan(self, *requests: str) -> Plan:
        """What requests will take, before any of them runs: bytes, multiply-adds, passes and time (`Plan`).

        The network runs on a few examples; the data are read once, to count them.

        Args:
            requests: names of methods, of "diagonal", "product" (F @ v), "norm", "example_gram", "solve", "spectrum"
                and "to_dense"; without any, all of these.

        Returns:
            The plan; print it.

        Raises:
            ValueError: a request is unknown.
        """
        for request in requests:
            one_of("request", request, tuple(REQUESTS))
        return plan(self, requests or tuple(REQUESTS))

    # ---- solves ----------------------------------------------------------------------------------------------------

    @overload
    def solve(self, v: Tensor, damping: float) -> Tensor: ...
    @overload
    def solve(self, v: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]: ...
    def solve(self, v: Vector, damping: float) -> Tensor | dict[str, Tensor]:
        """(F + damping I)⁻¹ v, dense or by Woodbury, whichever costs less; dense up to 3,000 where captures do not fit.

        Args:
            v: flat (P,) or (P, k) in torch order, or a dictionary.
            damping: Tikhonov damping, at least 0.

        Returns:
            Like v.

        Raises:
            ValueError: the damping is negative, or the damped matrix is singular.
        """
        value = damping_number(damping)

        def solved(right: Tensor) -> Tensor:
            solver = self._solver(value)
            if isinstance(solver, Woodbury):
                found = self.space.join(solver.solve(self.space.split(right)))
                image = self.space.join(self.in_example_space().product(self.space.split(found)))
            else:
                found = solver.solve(right)
                image = self._whole() @ found
            tell(residual_of(image + value * found, right), "the Fisher", right.dtype, self.norm)
            return require_finite_vector(found, self.space, "the solution")

        return self._applied(solved, v)

    def inverse(self, damping: float | Damping) -> LayeredMatrix:
        """(F + damping I)⁻¹ as a structured matrix: products, blocks, norms, and pictures beside an approximation's.

        In example space, where that costs less, nothing of P × P is formed before entries are asked for.

        Args:
            damping: Tikhonov damping, at least 0; `FactoredTikhonov` means its λ = γ², as F has no factors.

        Returns:
            The inverse, of the weights as they are now.

        Raises:
            ValueError: the damping is negative.
            SingularMatrixError: the damped matrix is singular; the message says which damping would do.
            MemoryError: the matrix, or the Gram matrix of the gradients, does not fit.
        """
        strength = damping.strength if isinstance(damping, FactoredTikhonov) else damping_number(damping)
        solver, title = self._solver(strength), inverse_title(self.title, Tikhonov(strength))
        what = f"the dense {self.space.size:,} x {self.space.size:,} inverse"
        if isinstance(solver, Woodbury):
            identity = partial(torch.eye, self.space.size, dtype=self.network.precision, device=self.network.device)
            operator: Operator = ExampleSpace(self.in_example_space(), strength, solver)

            def entries() -> Tensor:
                self._plan(self.space.size**2, what)
                width = max(1, at_once(GRADIENT_ENTRIES, self.empty) // self.space.size)
                return symmetric(torch.cat([operator.solve(some) for some in identity().split(width, 1)], 1))

            return LayeredMatrix(self.space, Inverse(operator, self.space.sizes, entries), title)
        self._plan(self.space.size**2, what, double=3)  # beside the factor, and F
        whole = self.space.reorder_dense(symmetric(solver.inverse().to(self.network.precision)), "unit")
        return dense_matrix(self.space, whole, title)

    def log_determinant(self, damping: float) -> float:
        """Log det(F + damping I), exact: dense or by Sylvester's identity in example space, as `solve`.

        Args:
            damping: Tikhonov damping, at least 0.

        Returns:
            The natural logarithm.

        Raises:
            ValueError: the damping is negative.
            SingularMatrixError: the damped matrix is singular.
        """
        return self._solver(damping_number(damping)).log_determinant

    def _solver(self, damping: float) -> DampedCholesky | Woodbury:
        """The damped matrix factorised, dense or in example space, whichever costs less; the last one is kept."""
        self.check_unchanged()
        dense = self._kept.matrix is not None or damping == 0 or self._dense_is_less()
        key = ("dense" if dense else "woodbury", damping)
        if self._kept.solver is None or self._kept.solver[0] != key:
            if dense:
                self._plan(self.space.size**2, f"the dense {self.shape[0]:,} x {self.shape[1]:,} Fisher", double=1)
                whole = self._whole()
                tell_of_rounding(damping, square_sum(whole) ** 0.5, whole.dtype)
                made: DampedCholesky | Woodbury = DampedCholesky(whole, damping, "the Fisher")
            else:
                require_fits(self, "solve")
                with blaming(self.example_space):
                    made = Woodbury(self.in_example_space(), damping)
            self._kept.solver = (key, made)
        return self._kept.solver[1]

    def release_solver(self) -> None:
        """Let go of the factorisation that solves keep, as large as the Gram matrix of the gradients."""
        self._kept.solver = None

    def _dense_is_less(self) -> bool:
        """Whether the matrix is no larger than the Gram matrix; or small, where the captures behind that do not fit."""
        with contextlib.suppress(*([MemoryError] if self.space.size <= KEPT else [])):
            return self.space.size <= self.columns
        return True

    def natural_gradient(self, damping: float) -> Tensor:
        """(F + damping I)⁻¹ ∇h for the data's gradient, flat in torch order, (P,); one pass for both.

        In example space the gradient is itself a combination of outer products, so that its products with the Gram
        matrix's columns and the final combination share their work (Benzing 2021, eq. 18-21).

        Args:
            damping: Tikhonov damping, at least 0; positive for fewer gradients than parameters.

        Returns:
            The damped natural gradient.

        Raises:
            ValueError: the data has no targets, or the damping is negative.
        """
        damping = damping_number(damping)
        joint = self.with_scores() if self._kept.held is None or self._kept.joint is not None else None
        if joint is None or damping == 0 or self.space.size <= self.columns:
            return self.solve(self.gradient(), damping)
        require_fits(self, "solve")
        weights = torch.full((self.examples,), self.scale, dtype=joint.dtype, device=self.network.device)
        with blaming(self.example_space):
            found = solve_combination(joint, joint.captures[0].vectors - 1, weights, damping, self.space)
        return require_finite_vector(found, self.space, "the natural gradient")

    def example_gram(self) -> Tensor:
        """UᵀU over all layers, (K N, K N), for F = s U Uᵀ.

        Raises:
            MemoryError: it does not fit.
        """
        examples = self.in_example_space()
        require_fits(self, "example_gram")
        return finite_gram(examples.make_gram(), self.example_space)

    # ---- norms and spectra -----------------------------------------------------------------------------------------

    def norm(self, ord: str = "fro", block: tuple[str | int, str | int] | None = None) -> float:
        """Norm of the matrix or of one block, without materialising it.

        Args:
            ord: "fro", "spectral" or "trace" (sum of the diagonal; diagonal blocks only).
            block: (row, col) layers; None: the whole matrix.

        Returns:
            The norm.

        Raises:
            ValueError: the norm is unknown, or the trace of an off-diagonal block was asked for.
        """
        one_of("ord", ord, ("fro", "spectral", "trace"))
        if block is not None and (isinstance(block, str) or not isinstance(block, Sequence) or len(block) != 2):
            raise ValueError(f"block is a pair (row, col) of layers, got {block!r}.")
        pair = None if block is None else (self.space.position(block[0]), self.space.position(block[1]))
        return require_finite_number(
            self._norm(ord, pair), f"the {ord} norm", self.network.precision, self.example_space
        )

    def _norm(self, ord: str, pair: tuple[int, int] | None) -> float:
        if ord == "trace":
            return spectra.trace(self, pair)
        if (whole := self._held()) is not None:
            part = whole if pair is None else self.space.part(whole, *pair)
            return float(torch.linalg.matrix_norm(part.double(), "fro" if ord == "fro" else 2))
        if ord == "fro":
            return spectra.frobenius(self, pair)
        if pair is not None:
            return spectra.spectral(self, pair)
        largest = self.spectrum(1)
        return float(largest[0]) if len(largest) else 0.0  # of a zero matrix nothing is above rounding

    def spectrum(self, k: int | None = None) -> Tensor:
        """Eigenvalues in descending order: the k largest, or all the non-zero ones.

        Args:
            k: how many at most; None: all above rounding.

        Returns:
            Eigenvalues in float64, clamped at 0.
        """
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"k must be a positive whole number, got {k!r}.")
        size, dense = self.space.size, self._held() is not None
        rank = size if dense else min(size, self.columns)
        if k is not None and rank > spectra.FULL and k < rank // 10:
            values = extreme_eigenvalues(
                lambda x: self @ x, size, k, dtype=self.network.precision, device=self.network.device
            )
        elif dense or size <= self.columns:
            self._plan(size**2, f"the spectrum of a {size:,} x {size:,} matrix", double=2)
            values = eigenvalues(self._whole().double()).flip(0)
        else:
            require_fits(self, "spectrum")
            values = eigenvalues(self.example_gram().double()).flip(0) * self.scale
        return spectra.clean(values, rank, size, self.network.precision)[:k]

    # ---- posterior -------------------------------------------------------------------------------------------------

    def sample(self, prior_precision: float | Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of the Laplace posterior N(θ, (Λ₀ + Σₙ Fₙ)⁻¹) (Benzing, appendix A.1).

        Args:
            prior_precision: Λ₀, a positive number or a flat torch-order vector (P,) of them.
            n: number of samples.
            generator: source of the samples; None: a private one seeded from `torch.initial_seed()`.

        Returns:
            Samples (n, P) around the model's parameters, flat in torch order.

        Raises:
            ValueError: the prior precision is not positive.
            MemoryError: so many samples do not fit.
        """
        count("n", n)
        posterior = Posterior(self, prior_precision)
        with blaming(self.example_space):
            return posterior.around_weights(posterior.deviations(self.to_dense, n, generator))


def require_fisher(fisher: object, what: str) -> None:
    """Raise TypeError for what is not a Fisher."""
    if not isinstance(fisher, Fisher):
        raise TypeError(
            f"{what} takes a Fisher, got {type(fisher).__name__}; "
            "make one with fv.Probe(model, likelihood).fisher(data)."
        )
