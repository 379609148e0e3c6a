"""KFRA: A ⊗ H with an output side that is not measured but passed down from the outputs, layer by layer.

Botev, Ritter & Barber 2017: of the recursion of pre-activation Hessians (their equation 8) the Gauss-Newton part, with
products of expectations for expectations of products at every step down, where K-FAC measures E[ggᵀ].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from fisherviz.approximations.base import Couplings, PerFeature
from fisherviz.approximations.kfac_full import in_chain
from fisherviz.approximations.kronecker import KFAC
from fisherviz.matrices.layered import LayeredMatrix, block_diagonal
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import Kronecker, Operator
from fisherviz.operators.factorise import symmetric
from fisherviz.statistics import Misfit, NextWeight, Setting, SlopeMoment, Statistic

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


class KFRA(KFAC):
    """A ⊗ H with H = E[f′f′ᵀ] ∘ (W₊ᵀ H₊ W₊) by recursion from the outputs, + for the next layer (Botev et al. 2017).

    The recursion goes through Linear layers of one position with an element-wise function f between them, told by
    evidence in each pass. Where no such layer follows, at the outputs first of all, H is K-FAC's G; elsewhere G is
    collected beside it, which makes this a method to compare with rather than a cheaper one.

    Args:
        setting: as for "kfac", of layers that the recursion does not reach.
        per_feature: as for "kfac".
    """

    def __init__(self, setting: Setting = "expand", per_feature: PerFeature = "units") -> None:
        super().__init__(setting, per_feature)
        self.positions: Mapping[str, int] = {}
        """Positions of the layers in the order of execution, as far as they are known, set by `prepare`."""
        self.reached: frozenset[str] = frozenset()
        """Layers whose H came from the next one, set by `assemble`."""

    def prepare(self, layers: Sequence[Layer], positions: Mapping[str, int]) -> None:
        """Note the positions."""
        self.positions = positions

    def pairs(self, layers: Sequence[Layer], adjacent: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Linear layers of one position that follow one another; whether by an element-wise function, passes tell."""
        fit = {
            layer.name: i
            for i, layer in enumerate(layers)
            if self.positions.get(layer.name) == 1 and layer.factors and isinstance(layer.module, nn.Linear)
        }
        return [(fit[row], fit[col]) for row, col in adjacent if row in fit and col in fit]

    def pair_statistics(self, row: Layer, col: Layer) -> dict[str, Statistic]:
        """The slopes' second moment, the next layer's weight, and whether the gradients are what these make of them."""
        weight = col.module.weight
        assert isinstance(weight, nn.Parameter)
        return {
            "B": SlopeMoment(row.name, col.name),
            "W": NextWeight(row.name, col.name, weight),
            "misfit": Misfit(row.name, col.name, weight),
        }

    def assemble(self, space: ParameterSpace, operators: Sequence[Operator], couplings: Couplings) -> LayeredMatrix:
        """A ⊗ H of each layer, the last in execution first."""
        # where no pass of both layers counts, there is no weight between them
        fit = {
            row: (col, v)
            for (row, col), v in couplings.items()
            if not bool(v["misfit"].any()) and bool(v["W"][-1] != 0)
        }
        made = list(operators)
        for row in reversed(in_chain(list(range(len(made))), [(row, col) for row, (col, _) in fit.items()])):
            if row in fit:
                col, v = fit[row]
                own, after = made[row], made[col]
                assert isinstance(own, Kronecker)
                assert isinstance(after, Kronecker)
                W = (v["W"][:-1] / v["W"][-1]).view(len(after.G), -1)
                made[row] = Kronecker(own.A, v["B"] * symmetric(W.T @ after.G @ W))
        self.reached = frozenset(space.layers[row].name for row in fit)
        return block_diagonal(space, made)

    @property
    def _last(self) -> str | None:
        """The probed layer that runs last."""
        return next(reversed(list(self.positions)), None)

    def remarks(self, fisher: Fisher) -> list[str]:
        """Where the recursion begins, if not at the outputs of the whole network."""
        probed = {id(p) for layer in fisher.space.layers for p in layer.parameters.values()}
        modules = [{id(p) for p in m.parameters(recurse=False)} for m in fisher.probe.model.modules()]
        partly = any(own and not own & probed for own in modules)
        said = f"the recursion begins at {self._last!r}, the last of the probed layers: kfac's G is taken there."
        return [*super().remarks(fisher), *([said] if partly and self._last is not None else [])]

    def fallbacks(self, layers: Sequence[Layer]) -> list[str]:
        """Where the recursion stops too, but for the layer that runs last."""
        stops = [
            repr(layer.name)
            for layer in layers
            if layer.factors and layer.name not in self.reached and layer.name != self._last
        ]
        said = (
            f"the recursion does not reach {', '.join(stops)}, which no Linear layer follows through an element-wise "
            "function alone: kfac's G is taken there."
        )
        return super().fallbacks(layers) + ([said] if stops else [])
