"""KFAC across layers: F̃ with a Kronecker product for every pair, and F̂ with a block-tridiagonal inverse.

Martens & Grosse 2015, sections 3 and 4.3, appendix B. All factors come from the same examples with the same weights.
Grouped convolutions stand alone, with the block that KFAC gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fisherviz.approximations.base import Approximation, Couplings, PerFeature, Values, check_per_feature
from fisherviz.approximations.kronecker import SUM_OF_USES, check_kfac_setting, product
from fisherviz.approximations.tied import tied_product, tied_statistics
from fisherviz.matrices.layered import LayeredMatrix, block_diagonal
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import BlockMatrix, BlockTridiagonal, DirectSum, Kronecker, Operator, Permuted
from fisherviz.operators.khatri_rao import LeadingPairs
from fisherviz.statistics import (
    CrossInputFactor,
    CrossOutputFactor,
    InputFactor,
    OutputFactor,
    Setting,
    Statistic,
)

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


def has_cross_factors(layer: Layer) -> bool:
    """Whether a layer can be coupled with others; grouped convolutions, one pair of factors per group, break chains."""
    return layer.factors and layer.groups == 1


class KFACFull(Approximation):
    """Khatri-Rao: F̃_ij = A_{i-1,j-1} ⊗ G_ij for every pair of layers.

    Args:
        setting: "expand", "reduce", or None: "expand" where all layers share equally many positions, "reduce" for the
            whole matrix otherwise.
        per_feature: as for "kfac".
    """

    takes_factors = True
    of_both_uses = SUM_OF_USES

    def __init__(self, setting: Setting | None = None, per_feature: PerFeature = "units") -> None:
        super().__init__()
        self.per_feature = check_per_feature(per_feature)
        self.setting = None if setting is None else check_kfac_setting(setting)
        self.used_setting: Setting = self.setting or "expand"

    def prepare(self, layers: Sequence[Layer], positions: Mapping[str, int]) -> None:
        """Choose one setting for all layers that are coupled."""
        coupled = [layer.name for layer in layers if has_cross_factors(layer)]
        equal = len({positions.get(name, 1) for name in coupled}) <= 1
        if self.setting is None:
            self.used_setting = "expand" if equal else "reduce"
        elif self.setting == "expand" and not equal:
            raise ValueError(
                f"{self.name} with setting='expand' needs equally many positions in all coupled layers, got "
                f"{ {name: positions.get(name, 1) for name in coupled} }; use setting='reduce'."
            )

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """A and G, of each group, or of each use of a table that is a head."""
        if layer.both_ways:
            return tied_statistics(layer)
        setting = self.used_setting if has_cross_factors(layer) else self.setting or "expand"
        return {"A": InputFactor(layer.name, setting), "G": OutputFactor(layer.name, setting)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """A ⊗ G, of each group; as kfac's of a table that is a head."""
        return tied_product(values) if layer.both_ways else product(values["A"], values["G"])

    def pairs(self, layers: Sequence[Layer], adjacent: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Every pair of layers with cross factors."""
        return list(itertools.combinations([i for i, layer in enumerate(layers) if has_cross_factors(layer)], 2))

    def pair_statistics(self, row: Layer, col: Layer) -> dict[str, Statistic]:
        """Cross factors."""
        return {
            "A": CrossInputFactor(row.name, col.name, self.used_setting),
            "G": CrossOutputFactor(row.name, col.name, self.used_setting),
        }

    def remarks(self, fisher: Fisher) -> list[str]:
        """Grouped convolutions stand alone."""
        alone = [layer.name for layer in fisher.space.layers if layer.factors and not has_cross_factors(layer)]
        said = f"grouped convolutions have no cross factors: {', '.join(map(repr, alone))} take kfac's block alone."
        return [*super().remarks(fisher), *([said] if alone else [])]

    def assemble(self, space: ParameterSpace, operators: Sequence[Operator], couplings: Couplings) -> LayeredMatrix:
        """F̃ over all pairs."""
        blocks = {(i, i): op for i, op in enumerate(operators)}
        blocks |= {pair: Kronecker(v["A"], v["G"]) for pair, v in couplings.items()}
        return LayeredMatrix(space, BlockMatrix(blocks, LeadingPairs(blocks)))


class KFACTridiagonal(KFACFull):
    """F̂: equal to F̃ on the tridiagonal blocks, with a block-tridiagonal inverse.

    Args:
        setting: as for "kfac-full".
        per_feature: as for "kfac".
    """

    needs_chain = True

    def pairs(self, layers: Sequence[Layer], adjacent: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Layers that are neighbours in execution."""
        coupled = {layer.name: i for i, layer in enumerate(layers) if has_cross_factors(layer)}
        return [(coupled[row], coupled[col]) for row, col in adjacent if row in coupled and col in coupled]

    def assemble(self, space: ParameterSpace, operators: Sequence[Operator], couplings: Couplings) -> LayeredMatrix:
        """F̂ over the chain of layers; layers without structure keep their own operator."""
        chain = in_chain([i for i, op in enumerate(operators) if isinstance(op, Kronecker)], list(couplings))
        if not chain:
            return block_diagonal(space, operators)
        kroneckers = [op for op in (operators[i] for i in chain) if isinstance(op, Kronecker)]
        crosses = [couplings.get(pair) for pair in itertools.pairwise(chain)]
        tridiagonal = BlockTridiagonal(
            [op.A for op in kroneckers],
            [op.G for op in kroneckers],
            [None if v is None else v["A"] for v in crosses],
            [None if v is None else v["G"] for v in crosses],
        )
        rest = [i for i in range(len(operators)) if i not in chain]
        places = [f"the chain of layers {', '.join(repr(space.names[i]) for i in chain)}"]
        parts = DirectSum(
            [tridiagonal, *(operators[i] for i in rest)], places + [f"layer {space.names[i]!r}" for i in rest]
        )
        return LayeredMatrix(space, Permuted(parts, [chain, *([i] for i in rest)]))


def in_chain(positions: list[int], pairs: list[tuple[int, int]]) -> list[int]:
    """All positions, ordered so that coupled ones stand side by side."""
    following = dict(pairs)
    starts = [i for i in positions if i not in following.values()]
    order: list[int] = []
    for start in starts:
        current: int | None = start
        while current is not None and current not in order:
            order.append(current)
            current = following.get(current)
    return order
