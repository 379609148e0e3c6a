"""Fisher: the exact matrix of the probed parameters over data, never materialised unless asked.

Blocks, units, products, solves, norms and samples; requests make passes over the data, or use captures kept from an
earlier one (DESIGN sections 3 and 5). `passes.Passes` holds the data's side of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor

from fisherviz.capture.captures import Capture
from fisherviz.capture.forward_mode import fisher_product, forward_mode_is_right, output_tangent
from fisherviz.capture.structure import restarting
from fisherviz.exact import spectra
from fisherviz.exact.blocks import JointBlocks
from fisherviz.exact.natural import natural_gradient
from fisherviz.exact.passes import Passes
from fisherviz.exact.posterior import sample_posterior
from fisherviz.exact.solving import DampedCholesky, woodbury_solve
from fisherviz.network.layers import ORDERS, Order, ParameterSpace
from fisherviz.operators.damping import Tikhonov
from fisherviz.statistics.examples import columns_product, example_gram, rows_product
from fisherviz.statistics.moments import Block, Diagonal, UnitBlocks
from fisherviz.statistics.products import weighted_moments_square_norm
from fisherviz.support.memory import require

_KEPT_BLOCK = 3000
"""Blocks of more than this squared entries are not kept beside what the caller holds."""

Vector = Tensor | Mapping[str, Tensor]


class Fisher(Passes):
    """The Fisher information matrix of a probe's parameters over data; made by `Probe.fisher`.

    Flat vectors and dense matrices are in torch order: the probed parameters as in `named_parameters()`, each
    row-major. Every object knows its kind: "exact", "mc" or "empirical".
    """

    def __repr__(self) -> str:
        label = {"exact": "exact", "mc": f"mc, {self.samples} sample(s)", "empirical": "empirical"}[self.kind]
        count = f"{self._examples:,} examples" if self._examples is not None else "no pass yet"
        return (
            f"Fisher {self.space.size:,} x {self.space.size:,} ({label}, {self.reduction} over {count}, "
            f"{len(self.layers)} layers, {self.probe.likelihood!r})"
        )

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(repr(self))}</p>{self.probe._repr_html_()}"

    # ---- parts of the matrix ---------------------------------------------------------------------------------------

    @restarting
    def block(self, row: str | int, col: str | int | None = None) -> Tensor:
        """Exact block between two layers in torch order, (P_row, P_col).

        Args:
            row: a layer's name or position.
            col: another; None: the diagonal block.

        Returns:
            The block.

        Raises:
            ValueError: no such layer.
            MemoryError: the block does not fit.
        """
        i = self.space.position(row)
        j = i if col is None else self.space.position(col)
        if self._dense is not None:
            self.check_unchanged()
            return self._dense[self._range(i), self._range(j)].clone()
        entries = self.space.sizes[i] * self.space.sizes[j]
        self._plan(entries, f"block {self.space.names[i]!r}, {self.space.names[j]!r}")
        layers = [self.space.layers[k] for k in dict.fromkeys((i, j))]
        joint = JointBlocks(ParameterSpace(layers), (0, len(layers) - 1))
        self._pass(joint.update)
        return joint.finish_block(self.scale)

    @restarting
    def unit_block(self, i: int, j: int) -> Tensor:
        """Exact block between the layers at two positions in unit order."""
        if self._dense is not None:
            self.check_unchanged()
            part = self._dense[self._range(i), self._range(j)]
            rows, cols = (self.space.layers[k].unit_from_torch.to(part.device) for k in (i, j))
            return part[rows][:, cols]
        self._plan(
            self.space.sizes[i] * self.space.sizes[j],
            f"block {self.space.names[i]!r}, {self.space.names[j]!r}",
        )
        (statistic,) = self.collect([Block(self.space.names[i], self.space.names[j])])
        found = statistic.mean
        if found.numel() > _KEPT_BLOCK**2:
            del self._statistics[statistic.key]  # too large to keep beside what the caller holds
            return found.mul_(self.weight)
        return found * self.weight

    def _range(self, i: int) -> slice:
        return slice(self.space.offsets[i], self.space.offsets[i + 1])

    def _plan(self, entries: int, what: str) -> None:
        size = 3 * entries * torch.empty((), dtype=self.probe.precision).element_size()
        require(
            size,
            self.probe.device,
            what,
            "ask for products, norms or solves instead (they never form it), or probe fewer layers=",
        )

    @restarting
    def units(self, layer: str | int) -> Tensor:
        """Exact blocks of each output unit's weights with its bias last, (d_out, fan_in [+ 1], fan_in [+ 1]).

        Raises:
            NotImplementedError: the layer takes the generic path and has no units.
        """
        (statistic,) = self.collect([UnitBlocks(self.space.names[self.space.position(layer)])])
        return statistic.mean * self.weight

    @restarting
    def units_square_norm(self, layer: str | int) -> float:
        """Squared Frobenius norm of a layer's exact unit blocks; without forming them where T = 1."""
        i = self.space.position(layer)
        capture = self.example_space()[self.space.names[i]]
        if isinstance(capture, Capture) and capture.factored:
            a, weights = capture.a[:, 0], capture.g[:, :, 0].square().sum(0)
            return self.scale**2 * weighted_moments_square_norm(a, weights)
        return float(self.units(i).square().sum(dtype=torch.float64))

    @restarting
    def diagonal(self) -> Tensor:
        """Diagonal of the matrix, flat in torch order, (P,)."""
        found = self.collect([Diagonal(name) for name in self.space.names])
        return self.space.join([s.mean for s in found]) * self.weight

    @restarting
    def to_dense(self, order: Order = "torch") -> Tensor:
        """The whole matrix, (P, P).

        Args:
            order: "torch", "unit" (each output unit's weights with its bias) or "input" (K-FAC's vec(W̄)).

        Raises:
            ValueError: the order is unknown.
            MemoryError: the matrix does not fit.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
        if self._dense is None:
            self._plan(self.space.size**2, f"the dense {self.space.size:,} x {self.space.size:,} Fisher")
            joint = JointBlocks(self.space)
            self._pass(joint.update)
            self._dense = joint.finish(self.scale)
        else:
            self.check_unchanged()
        if order != "torch":
            return self.space.reorder_dense(self._dense, order)
        # handed out without a copy; what the caller does to it in place is noticed by its version
        return self._dense

    # ---- products --------------------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Vector) -> Tensor | dict[str, Tensor]:
        """F v for v flat (P,) or (P, k) in torch order, or a dictionary like `named_parameters()`."""
        if isinstance(v, Mapping):
            return self.space.unflatten(self @ self.space.flatten(v))
        if self._in_half_precision(v):
            return (self @ v.to(self.probe.precision)).to(v.dtype)
        v = self._check_vector(v)
        if v.dim() == 1:
            return (self @ v.unsqueeze(1))[:, 0]
        if self._dense is not None:
            self.check_unchanged()
            return self._dense @ v
        if self._captures is not None or not self._forward_mode():
            self.check_unchanged()
            return self._example_product(v)
        columns = [self._network_product(column) for column in v.unbind(1)]
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, 1)

    def _forward_mode(self) -> bool:
        """Whether products may run on the network itself; otherwise they come from captures, just as exact."""
        self.look()
        if self.probe.forward_mode is None:
            with warnings.catch_warnings():  # torch scripts its own derivatives when forward mode is first used
                warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
                # half precisions: a network's own derivatives have two or three digits, captures are summed in float32
                self.probe.forward_mode = self.probe.dtype == self.probe.precision and forward_mode_is_right(
                    self.probe, next(iter(self.data))[0]
                )
        return self.probe.forward_mode

    def _example_product(self, v: Tensor) -> Tensor:
        return self.scale * self.columns_product(self.rows(v))

    def rows(self, v: Tensor) -> Tensor:
        """Uᵀ v, (K N, r)."""
        captures = self.example_space().values()
        total: Tensor | None = None
        for capture, piece in zip(captures, self.space.split(v), strict=True):
            part = rows_product(capture, piece)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def columns_product(self, w: Tensor) -> Tensor:
        """U w, (P, r) in torch order."""
        return self.space.join([columns_product(capture, w) for capture in self.example_space().values()])

    def _network_product(self, v: Tensor) -> Tensor:
        self.check_unchanged()
        tangents = self.space.unflatten(v)
        total: Tensor | None = None
        first = 0
        for inputs, targets in self.data:
            part, n = fisher_product(self.probe, inputs, targets, self.vectors, tangents, first)
            flat = self.space.flatten(part)
            total = flat if total is None else total.add_(flat)
            first += n
        self._examples = first
        assert total is not None
        return total.mul_(self.scale)

    def quadratic(self, u: Vector, v: Vector | None = None) -> float:
        """uᵀ F v (uᵀ F u without v) with forward products only.

        Args:
            u: flat (P,) in torch order or a dictionary.
            v: likewise.

        Returns:
            The number.
        """
        first_vector = self._check_vector(self.space.flatten(u) if isinstance(u, Mapping) else u, flat=True)
        second = (
            first_vector
            if v is None
            else self._check_vector(self.space.flatten(v) if isinstance(v, Mapping) else v, flat=True)
        )
        if self._captures is not None or not self._forward_mode():
            self.check_unchanged()
            left = self.rows(first_vector.unsqueeze(1))
            right = left if v is None else self.rows(second.unsqueeze(1))
            return self.scale * float((left * right).sum(dtype=torch.float64))
        self.check_unchanged()
        total, first = 0.0, 0
        for inputs, targets in self.data:
            z, t = output_tangent(self.probe, inputs, self.space.unflatten(first_vector))
            other = t if v is None else output_tangent(self.probe, inputs, self.space.unflatten(second))[1]
            total += float((other * self.vectors.product(z, t, targets, first)).sum(dtype=torch.float64))
            first += len(z)
        self._examples = first
        return self.scale * total

    def _in_half_precision(self, v: Any) -> bool:
        """Whether a vector has a half-precision model's type: worked with in float32, handed back as it came."""
        return isinstance(v, Tensor) and v.dtype == self.probe.dtype != self.probe.precision

    def _check_vector(self, v: Any, flat: bool = False) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"a vector is a tensor or a dictionary name -> tensor, got {type(v).__name__}.")
        if v.is_complex():
            raise TypeError("a vector must be real, got a complex tensor; multiply its real and imaginary parts apart.")
        if v.dim() not in ((1,) if flat else (1, 2)) or v.shape[0] != self.space.size:
            raise ValueError(
                f"a flat vector must have {self.space.size} entries, one per probed parameter, "
                f"got shape {tuple(v.shape)}."
            )
        return v.detach().to(device=self.probe.device, dtype=self.probe.precision)

    # ---- solves ----------------------------------------------------------------------------------------------------

    @overload
    def solve(self, v: Tensor, damping: float) -> Tensor: ...
    @overload
    def solve(self, v: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]: ...
    def solve(self, v: Vector, damping: float) -> Tensor | dict[str, Tensor]:
        """(F + damping I)⁻¹ v, dense or by Woodbury in example space, whichever costs less.

        Args:
            v: flat (P,) or (P, k) in torch order, or a dictionary.
            damping: Tikhonov damping, at least 0.

        Returns:
            Like v.

        Raises:
            ValueError: the damping is negative, or the damped matrix is singular.
        """
        if isinstance(v, Mapping):
            return self.space.unflatten(self.solve(self.space.flatten(v), damping))
        if self._in_half_precision(v):
            return self.solve(v.to(self.probe.precision), damping).to(v.dtype)
        v = self._check_vector(v)
        damping = _number(damping)
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be a finite number of at least 0, got {damping}.")
        right = v.unsqueeze(1) if v.dim() == 1 else v
        dense = self._dense is not None or damping == 0 or self.space.size <= self.columns
        out = self._solve_dense(right, damping) if dense else self._solve_woodbury(right, damping)
        return out[:, 0] if v.dim() == 1 else out

    def natural_gradient(self, damping: float) -> Tensor:
        """(F + damping I)⁻¹ ∇h for the data's gradient, flat in torch order, (P,); one pass for both.

        In example space the gradient is itself a combination of outer products, so that its products with the Gram
        matrix's columns and the final combination share their work (Benzing eq. 18-21; DESIGN section 6).

        Args:
            damping: Tikhonov damping, at least 0; positive for fewer gradients than parameters.

        Returns:
            The damped natural gradient.

        Raises:
            ValueError: the data has no targets, or the damping is negative.
        """
        return natural_gradient(self, damping)

    def _solve_dense(self, v: Tensor, damping: float) -> Tensor:
        key = ("dense", damping)
        if key not in self._factors:
            self._factors = {key: DampedCholesky(self.to_dense(), damping, "the Fisher")}
        else:
            self.check_unchanged()
        return self._factors[key].solve(v)

    def _solve_woodbury(self, v: Tensor, damping: float) -> Tensor:
        key = ("woodbury", damping)
        scale = self.scale
        if key not in self._factors:
            gram = self.example_gram()
            self._largest = float(gram.diagonal().max()) * scale
            self._factors = {key: DampedCholesky(gram, damping / scale, "the damped Gram matrix of the examples")}
        assert self._largest is not None
        return woodbury_solve(
            self._factors[key],
            v,
            damping,
            self.rows,
            self.columns_product,
            self._example_product,
            (self._largest + damping) / damping,
        )

    def example_gram(self) -> Tensor:
        """UᵀU over all layers, (K N, K N), for F = s U Uᵀ."""
        captures = self.example_space()
        size = self.columns**2 * torch.empty((), dtype=self.probe.precision).element_size()
        require(
            4 * size,
            self.probe.device,
            f"the Gram matrix of {self.columns:,} gradients",
            "use fewer examples or kind='mc'",
        )
        total: Tensor | None = None
        for capture in captures.values():
            part = example_gram(capture)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    # ---- norms and spectra -----------------------------------------------------------------------------------------

    @restarting
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
        if ord not in ("fro", "spectral", "trace"):
            raise ValueError(f"ord must be one of fro, spectral, trace, got {ord!r}.")
        if block is not None and (isinstance(block, str) or not isinstance(block, Sequence) or len(block) != 2):
            raise ValueError(f"block is a pair (row, col) of layers, got {block!r}.")
        pair = None if block is None else (self.space.position(block[0]), self.space.position(block[1]))
        if ord == "trace":
            return spectra.trace(self, pair)
        if self._dense is not None:
            self.check_unchanged()
            part = self._dense if pair is None else self._dense[self._range(pair[0]), self._range(pair[1])]
            return float(torch.linalg.matrix_norm(part.double(), "fro" if ord == "fro" else 2))
        return spectra.frobenius(self, pair) if ord == "fro" else spectra.spectral(self, pair)

    @restarting
    def spectrum(self, k: int | None = None) -> Tensor:
        """Eigenvalues in descending order: the k largest, or all the non-zero ones.

        Args:
            k: how many at most; None: all above rounding.

        Returns:
            Eigenvalues in float64, clamped at 0.
        """
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"k must be a positive whole number, got {k!r}.")
        return spectra.spectrum(self, k, self._dense is not None)

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
        """
        return sample_posterior(self, prior_precision, n, generator)


def _number(damping: Any) -> float:
    """The λ of a number, a scalar tensor or `Tikhonov`."""
    if isinstance(damping, Tikhonov):
        return damping.value
    if isinstance(damping, Tensor) and damping.numel() == 1:
        return float(damping)
    if isinstance(damping, bool) or not isinstance(damping, Real):
        raise TypeError(f"the exact Fisher takes a number as Tikhonov damping, got {type(damping).__name__}.")
    return float(damping)


def require_fisher(fisher: object, what: str) -> None:
    """Raise TypeError for what is not a Fisher."""
    if not isinstance(fisher, Fisher):
        raise TypeError(
            f"{what} takes a Fisher, got {type(fisher).__name__}; "
            "make one with fv.Probe(model, likelihood).fisher(data)."
        )
