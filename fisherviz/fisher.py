"""Fisher: the exact matrix of the probed parameters over data, never materialised unless asked.

Requests make passes over the data through the Probe (or over captures kept from an earlier pass) and combine streaming
statistics and example-space products (DESIGN sections 3 and 5). Approximations are built from `collect`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from fisherviz import guest
from fisherviz.batches import Batches
from fisherviz.captures import AnyCapture, Batch, Capture, concatenate, ragged
from fisherviz.examplespace import block_square_norm, columns_product, gram_tiles, rows_product
from fisherviz.forward_mode import fisher_product, forward_mode_is_right, output_tangent
from fisherviz.joint import JointBlocks
from fisherviz.kinds import EmpiricalVectors, NoVectors, make_vectors
from fisherviz.layers import ORDERS, LayerInfo, Order, ParameterSpace
from fisherviz.memory import human, keep_limit, require
from fisherviz.natural import WithScores, natural_gradient
from fisherviz.operators.lanczos import extreme_eigenvalues
from fisherviz.path_check import restarting
from fisherviz.posterior import sample_posterior
from fisherviz.probe import Probe
from fisherviz.products import weighted_moments_square_norm
from fisherviz.solving import DampedCholesky, woodbury_solve
from fisherviz.statistics import Block, Diagonal, GradientSum, Statistic, UnitBlocks, update_all

REDUCTIONS = ("mean", "sum")
_FULL_SPECTRUM = 3000
"""Spectra of matrices up to this size come from a full eigendecomposition, larger ones from Lanczos."""

Vector = Tensor | Mapping[str, Tensor]


class Fisher:
    """The Fisher information matrix of a probe's parameters over data; made by `Probe.fisher`.

    Flat vectors and dense matrices are in torch order: the probed parameters as in `named_parameters()`, each
    row-major. Every object knows its kind: "exact", "mc" or "empirical".
    """

    def __init__(
        self,
        probe: Probe,
        data: Any,
        targets: Tensor | None = None,
        *,
        kind: str = "exact",
        samples: int = 1,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
        self.probe = probe
        self.space = probe.space
        self.kind = kind
        self.samples = samples
        self.reduction = reduction
        self.vectors = make_vectors(probe.likelihood, kind, samples, generator, probe.device)
        self.data = Batches(data, targets)
        if kind == "empirical" and self.data.certainly_without_targets:
            raise ValueError(
                "kind='empirical' needs the data's labels; pass targets=, a tuple (inputs, targets) or batches of them."
            )
        self._weights = guest.fingerprint(probe.model)
        self._examples: int | None = None
        self._statistics: dict[Hashable, Statistic] = {}
        self._captures: dict[str, AnyCapture] | None = None
        self._ragged = False
        self._matrix: Tensor | None = None  # torch order
        self._dense_version = 0
        self._factors: dict[tuple[str, float], DampedCholesky] = {}
        self._largest: float | None = None

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.space.size, self.space.size)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """What the probed layers are, in torch order."""
        return self.probe.layers

    @property
    @restarting
    def examples(self) -> int:
        """Number N of examples; counting them may take a pass."""
        if self._examples is None:
            self._pass(lambda batch: None, gradients=False)
        assert self._examples is not None
        return self._examples

    @property
    def scale(self) -> float:
        """What sums over examples are multiplied with: 1/N for "mean", 1 for "sum"."""
        return 1.0 / self.examples if self.reduction == "mean" else 1.0

    @property
    def weights_fingerprint(self) -> str:
        """Digest of the model's parameters and buffers."""
        return guest.digest(self._weights)

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

    @property
    def _dense(self) -> Tensor | None:
        """The dense matrix in torch order, if made and not modified since it was handed out."""
        if self._matrix is not None and _version(self._matrix) != self._dense_version:
            self._matrix = None
        return self._matrix

    @_dense.setter
    def _dense(self, matrix: Tensor | None) -> None:
        self._matrix = matrix
        self._dense_version = 0 if matrix is None else _version(matrix)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the model's weights are not those that this Fisher was made for."""
        if guest.fingerprint(self.probe.model) != self._weights:
            raise RuntimeError(
                "the model changed since this Fisher was made (its parameters or buffers differ); "
                "make a new one with probe.fisher(...)."
            )

    def _pass(self, consume: Callable[[Batch], None], *, gradients: bool = True) -> None:
        """One pass over the data; captures stay in memory where they fit."""
        self.check_unchanged()
        if self._captures is not None and not self._ragged:
            consume(Batch(self._captures, self.examples))
            return
        kept: list[Batch] | None = [] if gradients else None
        vectors = self.vectors if gradients else NoVectors()
        held, limit, first = 0, keep_limit(self.probe.device), 0

        def take(batch: Batch) -> None:
            nonlocal kept, held
            consume(batch)
            if kept is not None:
                held += batch.bytes
                kept = [*kept, batch] if held <= limit else None

        for inputs, targets in self.data:
            first += self.probe.capture(inputs, targets, vectors, take, first)
        self._examples = first
        if kept and self._captures is None:
            made = {name: [batch.captures[name] for batch in kept] for name in self.space.names}
            self._ragged = any(ragged(captures) for captures in made.values())
            self._captures = {name: concatenate(captures) for name, captures in made.items()}

    def pass_with_scores(self, consume: Callable[[Batch], None]) -> None:
        """One pass that backpropagates the data's scores beside the kind's vectors, as the last one."""
        self.check_unchanged()
        vectors = WithScores(self.vectors, EmpiricalVectors(self.probe.likelihood))
        first = 0
        for inputs, targets in self.data:
            if targets is None:
                raise ValueError("the gradient needs the data's labels; pass targets= or tuples (inputs, targets).")
            first += self.probe.capture(inputs, targets, vectors, consume, first)
        self._examples = first

    def look(self) -> None:
        """Make sure that the probe has seen the model run: the layers' paths and positions are known."""
        if not self.probe.looked:
            inputs, _ = next(iter(self.data))
            self.probe.look(inputs)

    def fresh(self) -> Fisher:
        """The same Fisher with nothing computed yet, for timings that pay for their own passes."""
        other = copy.copy(self)
        other._statistics, other._captures, other._dense, other._factors = {}, None, None, {}
        return other

    def collect(self, statistics: Iterable[Statistic]) -> list[Statistic]:
        """Feed statistics by one pass over the data; those already known are not computed again.

        Args:
            statistics: what is wanted.

        Returns:
            Statistics of the same keys, in the same order, holding the sums over all examples.
        """
        wanted = list(statistics)
        fresh = {s.key: s for s in wanted if s.key not in self._statistics}
        if fresh:
            gradients = any(s.needs_gradients for s in fresh.values())
            self._pass(lambda batch: update_all(fresh.values(), batch), gradients=gradients)
            self._statistics |= fresh
        else:
            self.check_unchanged()
        return [self._statistics[s.key] for s in wanted]

    @restarting
    def example_space(self) -> dict[str, AnyCapture]:
        """Captures of all examples by layer name.

        Raises:
            MemoryError: they do not fit in a quarter of the free memory.
        """
        if self._captures is None:
            self._pass(lambda batch: None)
        else:
            self.check_unchanged()
        if self._captures is None:
            raise MemoryError(
                f"the inputs and pseudo-gradients of {self.examples:,} examples exceed the "
                f"{human(keep_limit(self.probe.device))} meant for them; use fewer examples, or kind='mc'."
            )
        return self._captures

    @property
    def columns(self) -> int:
        """Number K N of columns of U, F = s U Uᵀ; taken from kept captures."""
        capture = next(iter(self.example_space().values()))
        return capture.vectors * capture.examples

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
        self._plan(self.space.sizes[i] * self.space.sizes[j], f"block {self.space.names[i]!r}, {self.space.names[j]!r}")
        (statistic,) = self.collect([Block(self.space.names[i], self.space.names[j])])
        if statistic.total is not None and statistic.total.numel() > _FULL_SPECTRUM**2:
            del self._statistics[statistic.key]  # too large to keep beside what the caller holds
        assert statistic.total is not None
        return statistic.total * self.scale

    def _range(self, i: int) -> slice:
        return slice(self.space.offsets[i], self.space.offsets[i + 1])

    def _plan(self, entries: int, what: str) -> None:
        size = 3 * entries * torch.empty((), dtype=self.probe.dtype).element_size()
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
        assert statistic.total is not None
        return statistic.total * self.scale

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
        return self.space.join([s.total for s in found if s.total is not None]) * self.scale

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

    def has_targets(self) -> bool:
        """Whether every batch of the data carries targets; looks at one batch after the other until one has none."""
        return all(targets is not None for _, targets in self.data)

    @restarting
    def gradient(self) -> Tensor:
        """Gradient of the data's mean (or summed) negative log-likelihood, flat in torch order, (P,).

        Raises:
            ValueError: the data has no targets.
        """
        self.check_unchanged()
        sums = [GradientSum(name) for name in self.space.names]
        score, first = EmpiricalVectors(self.probe.likelihood), 0
        for inputs, targets in self.data:
            if targets is None:
                raise ValueError("the gradient needs the data's labels; pass targets= or tuples (inputs, targets).")
            first += self.probe.capture(inputs, targets, score, lambda batch: update_all(sums, batch), first)
        self._examples = first
        return self.space.join([s.total for s in sums if s.total is not None]) * self.scale

    # ---- products --------------------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Vector) -> Tensor | dict[str, Tensor]:
        """F v for v flat (P,) or (P, k) in torch order, or a dictionary like `named_parameters()`."""
        if isinstance(v, Mapping):
            return self.space.unflatten(self @ self.space.flatten(v))
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
            self.probe.forward_mode = forward_mode_is_right(self.probe, next(iter(self.data))[0])
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
        return total * self.scale

    def quadratic(self, u: Vector, v: Vector | None = None) -> float:
        """uᵀ F v (uᵀ F u without v) with forward products only.

        Args:
            u: flat (P,) in torch order or a dictionary.
            v: likewise.

        Returns:
            The number.
        """
        first_vector = self._check_vector(self.space.flatten(u) if isinstance(u, Mapping) else u, flat=True)
        second = first_vector if v is None else self._check_vector(
            self.space.flatten(v) if isinstance(v, Mapping) else v, flat=True
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

    def _check_vector(self, v: Any, flat: bool = False) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"a vector is a tensor or a dictionary name -> tensor, got {type(v).__name__}.")
        if v.dim() not in ((1,) if flat else (1, 2)) or v.shape[0] != self.space.size:
            raise ValueError(
                f"a flat vector must have {self.space.size} entries, one per probed parameter, got shape {tuple(v.shape)}."
            )
        return v.detach().to(device=self.probe.device, dtype=self.probe.dtype)

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
        v = self._check_vector(v)
        if isinstance(damping, bool) or not isinstance(damping, int | float):
            raise TypeError(f"the exact Fisher takes a number as Tikhonov damping, got {type(damping).__name__}.")
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
            self._factors[key], v, damping, self.rows, self.columns_product, self._example_product,
            (self._largest + damping) / damping,
        )

    def example_gram(self) -> Tensor:
        """UᵀU over all layers, (K N, K N), for F = s U Uᵀ."""
        from fisherviz.examplespace import example_gram

        captures = self.example_space()
        size = self.columns**2 * torch.empty((), dtype=self.probe.dtype).element_size()
        require(4 * size, self.probe.device, f"the Gram matrix of {self.columns:,} gradients",
                "use fewer examples or kind='mc'")
        total: Tensor | None = None
        for capture in captures.values():
            part = example_gram(capture)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

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
        if ord not in ("fro", "spectral", "trace"):
            raise ValueError(f"ord must be one of fro, spectral, trace, got {ord!r}.")
        pair = None if block is None else (self.space.position(block[0]), self.space.position(block[1]))
        if ord == "trace":
            return self._trace(pair)
        if self._dense is not None:
            self.check_unchanged()
            part = self._dense if pair is None else self._dense[self._range(pair[0]), self._range(pair[1])]
            return float(torch.linalg.matrix_norm(part.double(), "fro" if ord == "fro" else 2))
        if ord == "fro":
            return self._frobenius(pair)
        return self._spectral(pair)

    @restarting
    def _trace(self, pair: tuple[int, int] | None) -> float:
        if pair is not None and pair[0] != pair[1]:
            raise ValueError("an off-diagonal block has no trace; ask for the block (i, i).")
        names = self.space.names if pair is None else (self.space.names[pair[0]],)
        found = self.collect([Diagonal(name) for name in names])
        return self.scale * sum(float(s.total.sum(dtype=torch.float64)) for s in found if s.total is not None)

    @restarting
    def _frobenius(self, pair: tuple[int, int] | None) -> float:
        captures = self.example_space()
        if pair is not None:
            row, col = (captures[self.space.names[i]] for i in pair)
            return self.scale * block_square_norm(row, col) ** 0.5
        total = 0.0
        for tiles in gram_tiles(list(captures.values())):
            total += float(torch.stack(tiles).sum(0).square_().sum(dtype=torch.float64)) if len(tiles) > 1 else float(
                tiles[0].square().sum(dtype=torch.float64)
            )
        return self.scale * total**0.5

    def _spectral(self, pair: tuple[int, int] | None) -> float:
        if pair is None:
            return float(self.spectrum(1)[0])
        row, col = (self.example_space()[self.space.names[i]] for i in pair)
        scale, size = self.scale, self.space.sizes[pair[0]]

        def squared(x: Tensor) -> Tensor:  # F_ij F_ijᵀ x
            y = columns_product(col, rows_product(row, x.reshape(size, -1)))
            return columns_product(row, rows_product(col, y)).reshape(x.shape) * scale**2

        top = extreme_eigenvalues(squared, size, 1, dtype=self.probe.dtype, device=self.probe.device)
        return max(float(top[0]), 0.0) ** 0.5

    def spectrum(self, k: int | None = None) -> Tensor:
        """Eigenvalues in descending order: the k largest, or all the non-zero ones.

        Args:
            k: how many; None: all above rounding.

        Returns:
            Eigenvalues in float64, clamped at 0.
        """
        rank = self.space.size if self._dense is not None else min(self.space.size, self.columns)
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"k must be a positive whole number, got {k!r}.")
        if k is not None and rank > _FULL_SPECTRUM and k < rank // 10:
            def product(x: Tensor) -> Tensor:
                return self @ x

            values = extreme_eigenvalues(product, self.space.size, k, dtype=self.probe.dtype, device=self.probe.device)
        elif self._dense is not None or self.space.size <= self.columns:
            values = torch.linalg.eigvalsh(self.to_dense().double()).flip(0)
        else:
            values = torch.linalg.eigvalsh(self.example_gram().double()).flip(0) * self.scale
        values = values.double().clamp(min=0)
        if k is not None:
            return values[:k]
        # what rounding leaves of a zero eigenvalue is no eigenvalue
        floor = torch.finfo(self.probe.dtype).eps * max(self.shape[0], len(values)) * float(values[0])
        return values[values > floor]

    # ---- posterior -------------------------------------------------------------------------------------------------

    def sample(
        self, prior_precision: float | Tensor, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
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

    def seconds_per_pass(self) -> float:
        """Seconds of one forward+backward pass of the mean loss over the data: the unit that costs are given in."""
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for inputs, targets in self.data:
                self.probe.loss_gradient(inputs, targets)
            if self.probe.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best


def _version(matrix: Tensor) -> int:
    """Counts in-place changes; tensors made under inference mode have no counter."""
    return 0 if matrix.is_inference() else matrix._version
