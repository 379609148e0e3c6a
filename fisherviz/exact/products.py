"""Products with the exact Fisher: on the network itself by forward mode where it can be believed, else from captures.

F v = Jᵀ F_R J v costs about 1.7 forward+backward passes whatever the layer's size (`capture.forward_mode`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, overload

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.doubts import require_independent
from fisherviz.capture.evidence import TOGETHER, telling_examples
from fisherviz.capture.forward_mode import Product, product, tangent, try_forward_mode
from fisherviz.exact.finite import require_finite_number
from fisherviz.exact.passes import Consumer
from fisherviz.exact.run import Run
from fisherviz.exact.scores import Scores
from fisherviz.matrices.finite import require_finite_vector
from fisherviz.network.batches import Inputs, count_examples, move, select, take_rows
from fisherviz.network.guest import as_guest, check_modes
from fisherviz.operators.damping import Tikhonov
from fisherviz.operators.finite import dot, is_finite
from fisherviz.operators.scipy_operator import linear_operator
from fisherviz.statistics.examples import Examples
from fisherviz.support.counting import counted_as
from fisherviz.support.memory import at_once, require
from fisherviz.support.modes import full_precision

Vector = Tensor | Mapping[str, Tensor]


class Products(Scores):
    """The Fisher as what it does to vectors."""

    @property
    def title(self) -> str:
        """What it is in two words, for pictures: "exact Fisher"."""
        return f"{self.kind} Fisher"

    def _held(self) -> Tensor | None:
        """The whole matrix in torch order, if an earlier request has left it."""
        self.check_unchanged()
        return self._kept.matrix

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Vector) -> Tensor | dict[str, Tensor]:
        """F v for v flat (P,) or (P, k) in torch order, or a dictionary like `named_parameters()`."""

        def product(columns: Tensor) -> Tensor:
            return require_finite_vector(self._product(columns), self.space, "the product with the Fisher")

        return self._applied(product, v)

    def to_scipy(self) -> LinearOperator:
        """The matrix as scipy's `LinearOperator` (P, P) in torch order, for `eigsh`, `cg` and their like."""
        return linear_operator(self.__matmul__, self.space.size, self.network.precision, self.network.device)

    def _applied(self, function: Callable[[Tensor], Tensor], v: Vector) -> Tensor | dict[str, Tensor]:
        """A function of columns (P, k) in working precision, of a vector in any of its forms, and back in the same."""
        if isinstance(v, Mapping):
            flat = self._applied(function, self.space.flatten(v))
            assert isinstance(flat, Tensor)
            return self.space.unflatten(flat)
        columns = self._check_vector(v)
        if not columns.numel():
            return columns.to(v.dtype) if v.dtype == self.network.dtype else columns  # no column: nothing to compute
        if columns.dim() == 2:
            size, what = 3 * columns.numel() * columns.element_size(), f"a product with {columns.shape[1]:,} vectors"
            require(size, columns.device, what, "take fewer columns at a time")
        with full_precision(self.network.model):
            out = function(columns.unsqueeze(1))[:, 0] if columns.dim() == 1 else function(columns)
        half = v.dtype == self.network.dtype != self.network.precision
        return out.to(v.dtype) if half else out  # half precision is worked with in float32, and handed back as it came

    def _product(self, v: Tensor) -> Tensor:
        """F v, (P, k)."""
        if (whole := self._held()) is not None:
            return whole @ v
        if self._kept.held is None and self._forward_mode():
            columns = [self._network_product(column) for column in v.unbind(1)]
            right = [column for column in columns if column is not None]
            if len(right) == len(columns):
                return torch.stack(right, 1) if len(right) > 1 else right[0].unsqueeze(1)
        if self._kept.held is None:
            return self._streamed_product(v)
        return self.space.join(self.in_example_space().product(self.space.split(v)))

    def _streamed_product(self, v: Tensor) -> Tensor:
        """F v by one pass, from the captures of some examples and vectors at a time; they are kept where they fit."""
        pieces, totals = list[Tensor](), list[Tensor]()

        def begin() -> Consumer:
            pieces[:] = self.space.split(v)  # anew where the pass starts again: the layers' paths have changed
            totals[:] = [torch.zeros_like(piece) for piece in pieces]
            return add

        def add(batch: Batch) -> None:
            part = Examples([batch.smaller(name) for name in self.space.names], 1.0)
            for total, found in zip(totals, part.product(pieces), strict=True):
                total += found

        self._pass(begin)
        return self.space.join(_there(self.processes.add_up(totals))).mul_(self.scale)

    def _forward_mode(self) -> bool:
        """Whether products may run on the network itself; otherwise they come from captures, just as exact."""
        self.look()
        if self.network.dtype != self.network.precision:
            return False  # derivatives of half precisions have two or three digits, captures are summed in float32
        if self.structure.forward_mode is None:
            # a few examples tell whether it works at all: every product shows on all of the data whether it is right
            with self.processes.agreeing("a try of forward mode"):
                inputs, _ = next(iter(self.data))
                right = try_forward_mode(self.network, take_rows(inputs, telling_examples(inputs)[:TOGETHER]))
            self.network.note(forward_mode=self.processes.all(right))
        return bool(self.structure.forward_mode)

    def _verified_everywhere(self) -> bool:
        """Whether forward mode is right on every batch: forms, unlike products, do not show it themselves."""
        if not self._kept.verified:
            with self.processes.agreeing("a try of forward mode") as check:
                right = all(try_forward_mode(self.network, inputs) for inputs, _, _ in self._shares(check))
            self._kept.verified = self.processes.all(right)
            self.network.note(forward_mode=self._kept.verified)
        return self._kept.verified

    def _shares(self, check: Callable[[], None]) -> Iterator[tuple[Inputs, Tensor | None, int]]:
        """This process's part of each batch, piece by piece, with the position of its first example."""
        check_modes(self.network.model)
        self.network.check_trainable()
        run = Run(self.network, self.data, self.vectors, self.witness, self.processes)
        run.check = check
        for inputs, targets, first in run.shares():
            n, step = count_examples(inputs), self._step()
            for start in range(0, n, step):
                some = slice(start, min(start + step, n))
                yield select(inputs, some.start, some.stop), None if targets is None else targets[some], first + start
        self.seen = run.examples

    def _step(self) -> int:
        """Examples whose activations fit, with their tangents and the graph of both."""
        each = 4 * sum(self.structure.example_bytes)
        return max(1, at_once(self.network.capture_bytes, self.empty.to(torch.uint8)) // max(1, each))

    def _network_product(self, v: Tensor) -> Tensor | None:
        """F v by forward and reverse mode; None where they disagree on a batch: then forward mode is given up."""
        tangents, total, agrees = self.space.unflatten(v), torch.zeros_like(v), True
        with self.processes.agreeing("a product with the Fisher") as check:
            for inputs, targets, first in self._shares(check):
                part = self._one_product(inputs, targets, tangents, first)
                if not (agrees := part.agrees):
                    break
                total += self.space.flatten(part.parts)
        if not self.processes.all(agrees):
            self.network.note(forward_mode=False)
            return None
        (found,) = _there(self.processes.add_up([total]))
        return found.mul_(self.scale)

    def _one_product(self, inputs: Any, targets: Tensor | None, tangents: Mapping[str, Tensor], first: int) -> Product:
        seen: list[Tensor] = []

        def output(z: Tensor, t: Tensor) -> Tensor:
            self.witness.confirm(self.network, z, first)
            seen.append(z)
            return self.vectors.product(z, t, targets, first)

        made = product(self.network, inputs, tangents, output)
        self._turn(inputs, seen, first)
        return made

    def _turn(self, inputs: Any, seen: Sequence[Tensor], first: int) -> None:
        """See whether outputs depend on which other examples there are, where that was not seen yet."""
        for z in seen:
            if self.witness.reverses(first, len(z)):
                with as_guest(self.network.model), counted_as(0):
                    require_independent(self.network, move(inputs, self.network.device), z, first)

    def quadratic(self, u: Vector, v: Vector | None = None) -> float:
        """uᵀ F v (uᵀ F u without v) with forward products only.

        Args:
            u: flat (P,) in torch order or a dictionary.
            v: likewise.

        Returns:
            The number.
        """
        first, second = (
            None if x is None else self._check_vector(self.space.flatten(x) if isinstance(x, Mapping) else x, flat=True)
            for x in (u, v)
        )
        assert first is not None
        form = self._form(first, second)
        return require_finite_number(form, "the form of the Fisher", self.network.precision, self.example_space)

    def _form(self, first: Tensor, second: Tensor | None) -> float:
        """uᵀ F v for flat vectors."""
        if self._kept.held is None and self._forward_mode() and self._verified_everywhere():
            return self._forward_form(first, second)
        if self._kept.held is None:
            image = self._streamed_product(first.unsqueeze(1))[:, 0]
            return dot(image, first if second is None else second)
        examples = self.in_example_space()
        left = examples.project(self.space.split(first.unsqueeze(1)))
        right = left if second is None else examples.project(self.space.split(second.unsqueeze(1)))
        return self.scale * dot(left, right)

    def _forward_form(self, u: Tensor, v: Tensor | None) -> float:
        """uᵀ F v (uᵀ F u without v) by forward mode alone."""
        total = 0.0
        with self.processes.agreeing("a form of the Fisher") as check:
            for inputs, targets, first in self._shares(check):
                z, t = tangent(self.network, inputs, self.space.unflatten(u))
                self.witness.confirm(self.network, z, first)
                other = t if v is None else tangent(self.network, inputs, self.space.unflatten(v))[1]
                total += dot(other, self.vectors.product(z, t, targets, first))
                self._turn(inputs, [z], first)
        return self.scale * sum(self.processes.exchange(total))

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
        found = v.detach().to(device=self.network.device, dtype=self.network.precision)
        if not is_finite(found):
            raise ValueError(f"a vector must be finite in {found.dtype}, this one holds NaN or infinite entries.")
        return found


def _there(sums: Sequence[Tensor | None]) -> list[Tensor]:
    """Sums to which every process has given something, if only zeros."""
    return [total for total in sums if total is not None]


def damping_number(damping: Any) -> float:
    """The λ of a number, a scalar tensor or `Tikhonov`."""
    if isinstance(damping, Tikhonov):
        return damping.value
    scalar = isinstance(damping, Tensor) and damping.numel() == 1
    if not scalar and (isinstance(damping, bool) or not isinstance(damping, Real)):
        raise TypeError(f"the exact Fisher takes a number as Tikhonov damping, got {type(damping).__name__}.")
    if not 0 <= float(damping) < float("inf"):
        raise ValueError(f"damping must be a finite number of at least 0, got {float(damping)}.")
    return float(damping)
