"""The damped matrix as what a step applies: one solve per layer, by factors on g and a where that costs less.

Built from the snapshot's matrix by the same operators as in the analysis; factorisations live until the next
snapshot
or the next damping. The low-rank product is the trick at the end of the K-FAC paper's section 8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.network.layers import Layer
from fisherviz.operators import DirectSum, Kronecker, Operator
from fisherviz.operators.damping import Damping, damp
from fisherviz.operators.factorise import located

INVERT_FROM = 10
"""Steps between factorisations from which explicit inverses of Kronecker factors pay for themselves."""

Rows = tuple[Tensor, Tensor]
"""a (R, da) and g (R, dg) whose product gᵀ a is a layer's gradient."""


class Preconditioner:
    """(matrix + damping)⁻¹, layer by layer or jointly.

    Args:
        matrix: the undamped matrix.
        damping: the rule of each layer, by name.
        invert: whether Kronecker factors are inverted rather than solved with.

    Raises:
        ValueError: layers that the matrix couples have different dampings.
    """

    def __init__(self, matrix: LayeredMatrix, damping: Mapping[str, Damping | None], invert: bool) -> None:
        self.layers = matrix.space.layers
        self._covered = {id(layer) for layer in self.layers}
        self.joint: Operator | None = None
        self._operators: dict[str, tuple[Operator, bool]] = {}
        if isinstance(matrix.whole, DirectSum):
            for layer, operator in zip(self.layers, matrix.operators, strict=True):
                damped = damp(operator, damping[layer.name])
                if damping[layer.name] is not None:
                    damped.trust()
                inverted = invert and _kronecker(damped)
                if inverted:
                    with located(f"layer {layer.name!r}"):
                        damped = damped.inverse()
                self._operators[layer.name] = damped, inverted
            return
        rules = {damping[layer.name] for layer in self.layers}
        if len(rules) > 1:
            raise ValueError(
                f"{matrix!r} couples layers, which then need one damping; the groups give {', '.join(map(str, rules))}."
            )
        rule = next(iter(rules))
        damped = matrix.damped(rule).whole
        self.joint = damped if rule is None else damped.trust()

    def has(self, layer: Layer) -> bool:
        """Whether the matrix covers a layer."""
        return id(layer) in self._covered

    @property
    def has_rows(self) -> bool:
        """Whether some layer's factors can act on the rows behind its gradient."""
        return any(isinstance(operator, Kronecker) for operator, _ in self._operators.values())

    def low_rank_pays(self, layer: Layer, rows: int) -> bool:
        """Whether factors on R rows cost less than on the (dg, da) gradient, counted in multiplications."""
        if self.joint is not None or not isinstance(self._operators[layer.name][0], Kronecker):
            return False
        dg, da = layer.matrix_shape
        outputs = 0 if len(self._operators[layer.name][0].tensors) == 1 else dg
        return rows * (da * da + outputs * dg + da * dg) < dg * da * (da + outputs)

    def solve_rows(self, layer: Layer, rows: Rows) -> Rows:
        """Rows of the layer's direction from those of its gradient, where `low_rank_pays`."""
        operator, inverted = self._operators[layer.name]
        assert isinstance(operator, Kronecker)
        action = operator.act_rows if inverted else operator.solve_rows
        with located(f"layer {layer.name!r}"):
            return action(*rows)

    def solve(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Directions from unit-order gradients (P,), by layer name.

        Args:
            gradients: of some layers; the others' count as zero where the matrix couples layers.

        Returns:
            Directions for the same layers.
        """
        if self.joint is None:
            out = {}
            for name, v in gradients.items():
                operator, inverted = self._operators[name]
                with located(f"layer {name!r}"):
                    out[name] = operator @ v if inverted else operator.solve(v)
            return out
        like = next(iter(gradients.values()))
        pieces = [gradients.get(layer.name, like.new_zeros(layer.size)) for layer in self.layers]
        solved = self.joint.solve(torch.cat(pieces)).split([layer.size for layer in self.layers])
        return {layer.name: piece for layer, piece in zip(self.layers, solved, strict=True) if layer.name in gradients}


def _kronecker(operator: Operator) -> bool:
    if isinstance(operator, DirectSum):
        return all(_kronecker(part) for part in operator.operators)
    return isinstance(operator, Kronecker)
