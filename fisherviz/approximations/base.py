"""Approximation: names the statistics that it needs and returns one operator per layer, or per pair of layers.

Subclass it, register it, and it is in `compare`, the report, the plots and the optimizers: they all run this code.
What depends on a first pass is asked for by `refine`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fisherviz.approximations.fitting import Recipe, Wanted, run_together
from fisherviz.matrices.layered import LayeredMatrix, block_diagonal
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import Dense, Operator
from fisherviz.operators import Diagonal as DiagonalOperator
from fisherviz.operators import UnitBlocks as UnitBlocksOperator
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov
from fisherviz.operators.factorise import located
from fisherviz.statistics import Block, Diagonal, Statistic, UnitBlocks
from fisherviz.support.choices import count, is_number, one_of, positive
from fisherviz.support.counting import is_counting
from fisherviz.support.generators import private
from fisherviz.support.memory import require_samples
from fisherviz.support.numbers import human
from fisherviz.support.tables import counted
from fisherviz.support.warning import warn

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher

Values = Mapping[str, Any]
"""Means over examples, by the names that `statistics` and `refine` gave; `"capture"` where it was asked for."""
PerFeature = Literal["units", "block", "diagonal"]
EXACTLY: dict[PerFeature, tuple[Callable[[str], Statistic], Callable[..., Operator]]] = {
    "units": (UnitBlocks, UnitBlocksOperator),
    "block": (lambda name: Block(name, name), Dense),
    "diagonal": (Diagonal, DiagonalOperator),
}
"""Parts of a layer's exact block: their statistic, by the layer's name, and their operator."""
Couplings = Mapping[tuple[int, int], Values]
"""The means of the pairs of layers that are coupled, by their positions (row, col)."""


def check_per_feature(given: PerFeature) -> PerFeature:
    """Refuse what cannot stand for a layer that scales single features."""
    one_of("per_feature", given, EXACTLY)
    return given


class Approximation(LayeredMatrix, ABC):
    """An approximation of the Fisher, built from statistics alone.

    A subclass gives `statistics(layer)` and `operator_for(layer, values)`. Options are keyword arguments of its
    constructor; `fit` builds the matrix, which then behaves like any structured matrix.
    """

    name: ClassVar[str] = "Approximation"
    """What it is registered as; a class that is not goes by its own name."""
    handles_generic: ClassVar[bool] = False
    """Whether `operator_for` takes layers of the generic path; otherwise they get the exact diagonal."""
    takes_factors: ClassVar[bool] = False
    """Whether `operator_for` needs Kronecker factors; normalisation and PReLU get `per_feature` instead."""
    per_feature: PerFeature = "units"
    """What stands for a normalisation or PReLU: exact 2 x 2 "units", the exact "block", or its "diagonal"."""
    needs_chain: ClassVar[bool] = False
    """Whether it is meant for networks whose layers form a chain."""
    of_both_uses: ClassVar[str] = ""
    """What it takes of a weight that is an embedding's first and a Linear's too; "": the exact diagonal."""
    follows_scale: ClassVar[bool] = True
    """Whether the operators scale with the Fisher's `reduction`; FOOF and the identity do not depend on it."""

    matrix: LayeredMatrix
    """Once fitted."""
    examples: int
    """N of the data that it was fitted on, once fitted."""
    operations: int | None = None
    """Of its own statistics and operators, and of the passes behind them, a multiply-add as two, where they were
    counted (`support.counting`)."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __init__(self) -> None:
        self.seconds = 0.0
        """Of its own statistics and operators, and of the passes behind them, once fitted."""

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

    def takes_tied(self, layer: Layer) -> bool:
        """Whether `operator_for` takes a weight that is both an embedding's and a Linear's; else its exact diagonal."""
        return self.handles_generic or (bool(self.of_both_uses) and layer.one_hot)

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

    def assemble(self, space: ParameterSpace, operators: Sequence[Operator], couplings: Couplings) -> LayeredMatrix:
        """The whole matrix from the layers' operators and the means of the pairs; block-diagonal by default."""
        return block_diagonal(space, operators)

    # ---- building --------------------------------------------------------------------------------------------------

    def _exactly(self, layer: Layer) -> PerFeature | None:
        """What stands for a layer that the method does not take: a part of its exact block."""
        if self.takes_factors and layer.own_inputs:
            return self.per_feature
        taken = self.takes_tied(layer) if layer.both_ways else layer.structured or self.handles_generic
        return None if taken else "diagonal"

    def _handles(self, layer: Layer) -> bool:
        return self._exactly(layer) is None

    def reads_capture(self, layer: Layer) -> bool:
        """Whether the layer's capture is wanted, where the method takes the layer."""
        return self._handles(layer) and self.wants_capture(layer)

    def needs(self, layer: Layer) -> dict[str, Statistic]:
        """The statistics for a layer, of its exact block where the method does not take it."""
        if (exactly := self._exactly(layer)) is not None:
            return {exactly: EXACTLY[exactly][0](layer.name)}
        method = f"statistics({layer.name!r})"
        with naming(self, method):
            named: Any = self.statistics(layer)
        values = list(named.values()) if isinstance(named, Mapping) else [named]
        for value in values:
            if not isinstance(value, Statistic):
                raise TypeError(
                    f"{type(self).__name__}.{method} must return a dictionary name -> Statistic, "
                    f"got {type(value).__name__}; fisherviz.statistics has them."
                )
        return dict(named)

    def build(self, space: ParameterSpace, values: Sequence[Values], couplings: Couplings) -> LayeredMatrix:
        """The matrix from the means of the layers' and the pairs' statistics, wherever these come from.

        Args:
            space: the probed parameters.
            values: per layer, the means of what `needs` and `refine` named.
            couplings: per pair, the means of what `pair_statistics` named.

        Returns:
            The structured matrix (of the mean Fisher).
        """
        operators = [
            self._operator(layer, v) if (exactly := self._exactly(layer)) is None else EXACTLY[exactly][1](v[exactly])
            for layer, v in zip(space.layers, values, strict=True)
        ]
        with naming(self, "assemble"):
            return self.assemble(space, operators, couplings)

    def _refined(self, layer: Layer, values: Values) -> dict[str, Statistic]:
        with located(f"layer {layer.name!r}"):
            return self.refine(layer, values) if self._handles(layer) else {}

    def _operator(self, layer: Layer, values: Values) -> Operator:
        """Authors of approximations learn here, not at a later product, that an operator does not fit."""
        with naming(self, f"operator_for({layer.name!r})"), located(f"layer {layer.name!r}"):
            operator = self.operator_for(layer, values)
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
        (error,) = fit_all(fisher, [self])
        if error is not None:
            raise error
        for remark in self.remarks(fisher):
            warn(f"{self.name}: {remark}")
        return self

    def remarks(self, fisher: Fisher) -> list[str]:
        """What a user should know about this approximation of a network, a sentence each.

        Args:
            fisher: that has looked at its network.
        """
        out = []
        layers = fisher.space.layers
        if generic := [layer.name for layer in layers if not layer.structured and not self._handles(layer)]:
            out.append(f"no structure for layers {', '.join(map(repr, generic))}; the exact diagonal is taken there.")
        out += self.fallbacks(layers)
        if self.takes_factors and (scales := [layer.name for layer in layers if layer.own_inputs]):
            part = "2 x 2 block of each" if self.per_feature == "units" else self.per_feature
            out.append(
                f"single features are scaled by {', '.join(map(repr, scales))}: the exact {part} is taken there."
            )
        if self.needs_chain and not fisher.structure.is_chain:
            coupled = self.pairs(layers, fisher.structure.neighbours)
            pairs = ", ".join(f"{layers[i].name!r}-{layers[j].name!r}" for i, j in coupled) or "none"
            out.append(
                f"the network is no chain of layers; coupled are those that are neighbours in execution: {pairs}."
            )
        return out

    def fallbacks(self, layers: Sequence[Layer]) -> list[str]:
        """What the matrix that was built last takes of weights whose uses are the transposes of one another."""
        out = []
        for handled, what in ((False, "the exact diagonal"), (True, self.of_both_uses)):
            tied = [repr(layer.name) for layer in layers if layer.both_ways and self._handles(layer) is handled]
            if tied and what:
                out.append(f"an embedding and a Linear share the weight of {', '.join(tied)}: {what} is taken there.")
        return out

    def _recipe(self, fisher: Fisher) -> Recipe:
        """The fit as `run_together` runs it."""
        self.space, self.kind, self.reduction = fisher.space, fisher.kind, fisher.reduction
        layers = fisher.space.layers
        with naming(self, "prepare"):
            self.prepare(layers, fisher.structure.positions)
        with naming(self, "pairs"):
            pairs = self.pairs(layers, fisher.structure.neighbours)
        wanted = [self.needs(layer) for layer in layers]
        with naming(self, "pair_statistics"):
            wanted += [self.pair_statistics(layers[i], layers[j]) for i, j in pairs]
        found = yield Wanted(wanted, {i: layer.name for i, layer in enumerate(layers) if self.reads_capture(layer)})
        values, couplings = found[: len(layers)], dict(zip(pairs, found[len(layers) :], strict=True))
        with naming(self, "refine"):
            further = [self._refined(layer, v) for layer, v in zip(layers, values, strict=True)]
        if any(further):
            more = yield Wanted(further)
            values = [v | refined for v, refined in zip(values, more, strict=True)]
        matrix, self.examples = self.build(fisher.space, values, couplings), fisher.examples
        self.fingerprints = {"weights": fisher.weights_fingerprint, "data": fisher.data.fingerprint}
        return matrix.scale(fisher.examples) if fisher.reduction == "sum" and self.follows_scale else matrix

    # ---- the fitted matrix -----------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether there is a matrix yet."""
        return "matrix" in self.__dict__

    @property
    def whole(self) -> Operator:
        """The matrix in unit order; RuntimeError where there is none yet."""
        if not self.fitted:
            raise RuntimeError(f"{self.name} has not been fitted; use fv.approximate(fisher, {self.name!r}).")
        return self.matrix.whole

    def sample(
        self, prior_precision: float | Tensor | FactoredTikhonov, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples of the Laplace posterior N(θ, (Λ₀ + N F̂)⁻¹) with this F̂ of the mean in the Fisher's place.

        What `fisher.sample` draws exactly, from a root of the structured inverse: nothing of size P × P where no layers
        are coupled. With "kfac" the posterior of Ritter et al. 2018 (its equation 9 is `FactoredTikhonov(√τ, pi=1)`),
        with "foof" one of the activations alone.

        Args:
            prior_precision: Λ₀, a positive number, or a `FactoredTikhonov` with γ² = Λ₀, which puts the prior into the
                Kronecker factors.
            n: number of samples.
            generator: source of the samples; None: a private one seeded from `torch.initial_seed()`.

        Returns:
            Samples (n, P) around the model's parameters as they are now, flat in torch order.

        Raises:
            ValueError: the prior precision is not positive, or n is no positive whole number.
            TypeError: the prior precision is a vector, which would destroy the structure.
            RuntimeError: it has not been fitted, or the precision is singular.
            NotImplementedError: the layers are coupled, and too many to be dense.
            MemoryError: so many samples do not fit.
        """
        count("n", n)
        whole, scaled = self.whole, self.reduction == "sum" and self.follows_scale
        prior = _prior(prior_precision, self.examples)
        require_samples(self.space.size, n, whole.device)
        noise = torch.randn(
            self.space.size, n, generator=private(generator, whole.device), dtype=torch.float64, device=whole.device
        )
        mean = self.scale(1 / self.examples) if scaled else self
        deviation = mean.inverse_root(noise, prior) / self.examples**0.5
        weights = self.space.flatten({name: p for layer in self.space.layers for name, p in layer.parameters.items()})
        return weights.detach() + deviation.T.to(weights.dtype)

    @property
    def title(self) -> str:
        """Its name."""
        return self.name

    def __repr__(self) -> str:
        if not self.fitted:
            return f"{type(self).__name__}(not fitted)"
        return (
            f"{self.name} approximation, {self.space.size:,} x {self.space.size:,} "
            f"({self.kind}, {self.reduction}, {counted(len(self.space.layers), 'layer')}, {human(self.bytes)})"
        )


def _prior(precision: float | Tensor | FactoredTikhonov, examples: int) -> Damping:
    """A prior's precision as damping of the mean Fisher: Λ₀ / N, or γ / √N in the factors."""
    if isinstance(precision, FactoredTikhonov):
        positive("prior_precision", precision.strength)
        return FactoredTikhonov(precision.gamma / examples**0.5, precision.pi)
    if not is_number(precision):
        raise TypeError(
            "prior_precision of an approximation must be one number or a fv.FactoredTikhonov, which keep its "
            f"structure, got {type(precision).__name__}; fisher.sample takes a vector."
        )
    positive("prior_precision", precision)
    return Tikhonov(float(precision) / examples)


@contextlib.contextmanager
def naming(approximation: Approximation, method: str) -> Iterator[None]:
    """What goes wrong in an author's method says which one; a bare exception becomes a RuntimeError that says so.

    Args:
        approximation: whose method runs.
        method: how the method was called, for the message.
    """
    own = type(approximation).__name__
    known = f" (method {approximation.name!r})" if approximation.name != own else ""
    where = f"{own}.{method}{known}"
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # meant for the user as they are
        if not type(approximation).__module__.startswith("fisherviz."):
            error.add_note(f"raised in {where}.")
        raise
    except Exception as error:
        raise RuntimeError(f"{where} failed with {type(error).__name__}: {error}; correct it.") from error


def fit_all(fisher: Fisher, approximations: Sequence[Approximation]) -> list[Exception | None]:
    """Fit approximations together: they share their passes over the data, and one that fails does not end the others.

    Args:
        fisher: whose data, kind and reduction are used.
        approximations: are fitted in place.

    Returns:
        For each one what ended it, or None.
    """
    fisher.look()
    while True:
        layers = fisher.space.layers
        fits = run_together(fisher, [approximation._recipe(fisher) for approximation in approximations])
        if fisher.space.layers == layers:
            break  # otherwise a pass has changed the layers' paths, and with them what is wanted
    for approximation, fit in zip(approximations, fits, strict=True):
        if fit.error is None:
            approximation.matrix, approximation.seconds = fit.result, fit.effort.seconds
            approximation.operations = fit.effort.operations if is_counting() else None
    return [fit.error for fit in fits]
