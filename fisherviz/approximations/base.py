"""Approximation: names the statistics that it needs and returns one operator per layer, or per pair of layers.

Subclass it, register it, and it is in `compare`, the report, the plots and the optimizers: they all run this code
(DESIGN section 3). What depends on a first pass is asked for by `refine`.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fisherviz.approximations.matrices import BlockDiagonal, LayeredMatrix
from fisherviz.capture.structure import PathChanged
from fisherviz.network.layers import Layer
from fisherviz.network.space import Order, ParameterSpace
from fisherviz.operators import Diagonal as DiagonalOperator
from fisherviz.operators import Operator
from fisherviz.operators.damping import Damping
from fisherviz.statistics.moments import Diagonal, Statistic

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher

Values = Mapping[str, Any]
"""Means over examples, by the names that `statistics` and `refine` gave; `"capture"` where it was asked for."""


class Approximation(LayeredMatrix):
    """An approximation of the Fisher, built from statistics alone.

    A subclass gives `statistics(layer)` and `operator_for(layer, values)`. Options are keyword arguments of its
    constructor; `fit` builds the matrix, which then behaves like any structured matrix.
    """

    name: ClassVar[str] = "approximation"
    plot_order: ClassVar[Order] = "torch"
    """The order of the paper that it comes from, for plots."""
    handles_generic: ClassVar[bool] = False
    """Whether `operator_for` takes layers of the generic path; otherwise they get the exact diagonal."""
    needs_chain: ClassVar[bool] = False
    """Whether it is meant for networks whose layers form a chain."""
    follows_scale: ClassVar[bool] = True
    """Whether the operators scale with the Fisher's `reduction`; FOOF and the identity do not depend on it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds of the statistics and operators, once fitted."""

    # ---- what a subclass gives -------------------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """The statistics that a layer's operator needs, by any names."""

    @abstractmethod
    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """The layer's operator in unit order, from the means of its statistics."""

    def refine(self, layer: Layer, values: Values) -> dict[str, Statistic]:
        """Further statistics that depend on the first ones; they take a pass of their own. None by default."""
        return {}

    def wants_capture(self, layer: Layer) -> bool:
        """Whether `operator_for` reads the layer's capture itself, as `values["capture"]`. False by default."""
        return False

    def prepare(self, layers: Sequence[Layer], positions: Mapping[str, int]) -> None:
        """Look at the layers and their numbers of weight-sharing positions first. Nothing by default."""

    def pairs(self, layers: Sequence[Layer], adjacent: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Pairs of layer positions (row, col) that are coupled; none by default.

        Args:
            layers: the probed layers.
            adjacent: names of structured layers that are neighbours in execution.
        """
        return []

    def pair_statistics(self, row: Layer, col: Layer) -> dict[str, Statistic]:
        """The statistics that a pair's coupling needs."""
        return {}

    def assemble(
        self,
        space: ParameterSpace,
        operators: Sequence[Operator],
        couplings: Mapping[tuple[int, int], Values],
    ) -> LayeredMatrix:
        """The whole matrix from the layers' operators and the means of the pairs; block-diagonal by default."""
        return BlockDiagonal(space, operators)

    # ---- building --------------------------------------------------------------------------------------------------

    def _handles(self, layer: Layer) -> bool:
        return layer.structured or self.handles_generic

    def needs(self, layer: Layer) -> dict[str, Statistic]:
        """The statistics for a layer, the exact diagonal where it has no structure."""
        if not self._handles(layer):
            return {"diagonal": Diagonal(layer.name)}
        with naming(self, f"statistics({layer.name!r})"):
            named = self.statistics(layer)
        return self._checked_statistics(named, f"statistics({layer.name!r})")

    def build(
        self, space: ParameterSpace, values: Sequence[Values], couplings: Mapping[tuple[int, int], Values]
    ) -> LayeredMatrix:
        """The matrix from the means of the layers' and the pairs' statistics, wherever these come from.

        Args:
            space: the probed parameters.
            values: per layer, the means of what `needs` and `refine` named.
            couplings: per pair, the means of what `pair_statistics` named.

        Returns:
            The structured matrix (of the mean Fisher).
        """
        operators = [
            self._operator(layer, v) if self._handles(layer) else DiagonalOperator(v["diagonal"])
            for layer, v in zip(space.layers, values, strict=True)
        ]
        with naming(self, "assemble"):
            return self.assemble(space, operators, couplings)

    def _operator(self, layer: Layer, values: Values) -> Operator:
        with naming(self, f"operator_for({layer.name!r})"):
            operator = self.operator_for(layer, values)
        return self._checked(layer, operator)

    def _checked_statistics(self, named: Any, method: str) -> dict[str, Statistic]:
        if isinstance(named, Mapping) and all(isinstance(value, Statistic) for value in named.values()):
            return dict(named)
        values = named.values() if isinstance(named, Mapping) else [named]
        wrong = next(type(value).__name__ for value in values if not isinstance(value, Statistic))
        raise TypeError(
            f"{type(self).__name__}.{method} must return a dictionary name -> Statistic, got {wrong}; "
            "fisherviz.statistics has them."
        )

    def _checked(self, layer: Layer, operator: Operator) -> Operator:
        """Authors of approximations learn here, not at a later product, that an operator does not fit."""
        if not isinstance(operator, Operator) or operator.shape != (layer.size, layer.size):
            got = f"{operator.shape}" if isinstance(operator, Operator) else type(operator).__name__
            raise TypeError(
                f"{type(self).__name__}.operator_for({layer.name!r}) must return an Operator of size "
                f"{layer.size} x {layer.size}, got {got}."
            )
        return operator

    def fit(self, fisher: Fisher) -> Approximation:
        """Collect the statistics over the Fisher's data and build the operators.

        Args:
            fisher: the exact Fisher whose data, kind and reduction are used.

        Returns:
            self.
        """
        if not hasattr(fisher, "collect"):
            raise TypeError(
                f"{self.name} is built from a Fisher, got {type(fisher).__name__}; "
                "make one with fv.Probe(model, likelihood).fisher(data)."
            )
        start = time.perf_counter()
        self.kind, self.reduction = fisher.kind, fisher.reduction
        fisher.look()
        pairs: list[tuple[int, int]] = []

        def first() -> list[dict[str, Statistic]]:
            """What the layers need on their present paths; asked again where a pass has changed one."""
            nonlocal pairs
            layers = fisher.space.layers
            with naming(self, "prepare"):
                self.prepare(layers, fisher.structure.positions)
            with naming(self, "pairs"):
                pairs = self.pairs(layers, fisher.structure.neighbours)
            with naming(self, "pair_statistics"):
                coupled = [self.pair_statistics(layers[i], layers[j]) for i, j in pairs]
            return [self.needs(layer) for layer in layers] + coupled

        means = collect_means(fisher, first)
        self.space, layers = fisher.space, fisher.space.layers
        generic = [layer.name for layer in layers if not layer.structured and not self.handles_generic]
        if generic:
            warnings.warn(
                f"{self.name} has no structure for layers {', '.join(map(repr, generic))}; "
                "it takes the exact diagonal there.",
                stacklevel=3,
            )
        if self.needs_chain and not fisher.structure.is_chain:
            warnings.warn(
                f"the network is no chain of layers; {self.name} couples the layers that are neighbours in execution: "
                f"{', '.join(f'{a!r}-{b!r}' for a, b in fisher.structure.neighbours) or 'none'}.",
                stacklevel=3,
            )
        values, couplings = means[: len(layers)], dict(zip(pairs, means[len(layers) :], strict=True))
        for layer, named in zip(layers, values, strict=True):
            if self.wants_capture(layer):
                named["capture"] = fisher.example_space()[layer.name]
        with naming(self, "refine"):
            further = [
                self.refine(layer, v) if self._handles(layer) else {} for layer, v in zip(layers, values, strict=True)
            ]
        if any(further):
            values = [v | more for v, more in zip(values, collect_means(fisher, lambda: further), strict=True)]
        self.matrix = self.build(fisher.space, values, couplings)
        if fisher.reduction == "sum" and self.follows_scale:
            self.matrix = self.matrix.scale(fisher.examples)
        if fisher.network.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        return self

    # ---- the fitted matrix -----------------------------------------------------------------------------------------

    def _fitted(self) -> LayeredMatrix:
        if "matrix" not in self.__dict__:
            raise RuntimeError(f"{self.name} has not been fitted; use fv.approximate(fisher, {self.name!r}).")
        return self.matrix

    def operator(self, i: int, j: int) -> Operator:
        """The operator between the layers at two positions, in unit order."""
        return self._fitted().operator(i, j)

    def _product(self, pieces: list[Tensor]) -> list[Tensor]:
        return self._fitted()._product(pieces)

    def _solved(self, pieces: list[Tensor]) -> list[Tensor]:
        return self._fitted()._solved(pieces)

    def damped(self, damping: float | Damping | None) -> LayeredMatrix:
        """The matrix with damping added."""
        return self._fitted().damped(damping)

    def scale(self, factor: float) -> LayeredMatrix:
        """The matrix times a positive number."""
        return self._fitted().scale(factor)

    def inverse(self, damping: float | Damping | None = None) -> LayeredMatrix:
        """The inverse of the damped matrix."""
        return self._fitted().inverse(damping)

    def norm(self, ord: str = "fro") -> float:
        """Norm "fro", "spectral" or "trace"."""
        return self._fitted().norm(ord)

    @property
    def bytes(self) -> int:
        """Memory that the operators hold."""
        return self._fitted().bytes

    def __repr__(self) -> str:
        if "matrix" not in self.__dict__:
            return f"{type(self).__name__}(not fitted)"
        return (
            f"{self.name} approximation, {self.space.size:,} x {self.space.size:,} "
            f"({self.kind}, {self.reduction}, {len(self.space.layers)} layers, {self.bytes / 2**20:.2f} MiB)"
        )

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(repr(self))}</p>"


@contextlib.contextmanager
def naming(approximation: Approximation, method: str) -> Iterator[None]:
    """What goes wrong in an author's method says which one; a bare exception becomes a RuntimeError that says so.

    Args:
        approximation: whose method runs.
        method: how the method was called, for the message.
    """
    known = f" (method {approximation.name!r})" if approximation.name != Approximation.name else ""
    where = f"{type(approximation).__name__}.{method}{known}"
    try:
        yield
    except PathChanged:
        raise
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # meant for the user as they are
        if not type(approximation).__module__.startswith("fisherviz."):
            error.add_note(f"raised in {where}.")
        raise
    except Exception as error:
        raise RuntimeError(f"{where} failed with {type(error).__name__}: {error}; correct it.") from error


def collect_means(fisher: Fisher, ask: Callable[[], Sequence[Mapping[str, Statistic]]]) -> list[dict[str, Any]]:
    """Means of the statistics of every layer, fed by one pass; asked again where the pass has changed the layers."""
    asked: list[Sequence[Mapping[str, Statistic]]] = []

    def flat() -> list[Statistic]:
        asked.append(ask())
        return [statistic for named in asked[-1] for statistic in named.values()]

    found = iter(fisher.collect(flat))
    return [{key: next(found).mean for key in named} for named in asked[-1]]
