"""The damped matrix as what a step applies: one solve per layer, by factors on g and a where that costs less.

Built from the snapshot's matrix by the same operators as in the analysis; factorisations live until the next
snapshot
or the next damping. The low-rank product is the trick at the end of the K-FAC paper's section 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.network.layers import Layer
from fisherviz.operators import DirectSum, Kronecker, Operator
from fisherviz.operators.damping import Damping, damp, told_in_factors
from fisherviz.operators.factorise import located
from fisherviz.support.processes import ALONE, Processes

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
        owners: the rank of the process whose each layer is, by name; None: every process has all of them.

    Raises:
        ValueError: layers that the matrix couples have different dampings, or are to have owners.
    """

    def __init__(
        self,
        matrix: LayeredMatrix,
        damping: Mapping[str, Damping | None],
        invert: bool,
        owners: Mapping[str, int] | None = None,
    ) -> None:
        self.layers, self.owners, self._rules = matrix.space.layers, owners, damping
        self.processes = ALONE if owners is None else Processes.training()
        self._covered = {id(layer) for layer in self.layers}
        self.joint: Operator | None = None
        self._operators: dict[str, tuple[Operator, bool]] = {}
        if isinstance(matrix.whole, DirectSum):
            with self.processes.agreeing("the inverses of layers"):
                for layer, operator in zip(self.layers, matrix.operators, strict=True):
                    if owners is None or owners[layer.name] == self.processes.rank:
                        self._operators[layer.name] = _damped(layer, operator, damping[layer.name], invert)
            return
        if owners is not None:
            raise ValueError(
                f"{matrix!r} couples layers, whose inverse is one; leave ownership='all', or take a method whose "
                "layers stand alone."
            )
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
    def bytes(self) -> int:
        """Of what is kept of layers here: inverses, or the factors to solve with."""
        return sum(operator.bytes for operator, _ in self._operators.values())

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
        with told_in_factors(self._rules[layer.name]), located(f"layer {layer.name!r}"):
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
            with self.processes.agreeing("directions of layers"):
                for name, v in gradients.items():
                    if name in self._operators:
                        operator, inverted = self._operators[name]
                        with told_in_factors(self._rules[name]), located(f"layer {name!r}"):
                            out[name] = operator @ v if inverted else operator.solve(v)
            return out if self.owners is None else self._sent(gradients, out, self.owners)
        like = next(iter(gradients.values()))
        pieces = [gradients.get(layer.name, like.new_zeros(layer.size)) for layer in self.layers]
        with told_in_factors(self._rules[self.layers[0].name]):
            solved = self.joint.solve(torch.cat(pieces)).split([layer.size for layer in self.layers])
        return {layer.name: piece for layer, piece in zip(self.layers, solved, strict=True) if layer.name in gradients}

    def _sent(
        self, gradients: Mapping[str, Tensor], mine: Mapping[str, Tensor], owners: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """The directions of all layers in all processes, those of each owner at once."""
        out: dict[str, Tensor] = {}
        for rank in range(self.processes.count):
            if not (names := [name for name in gradients if owners[name] == rank]):
                continue
            sizes = [gradients[name].numel() for name in names]
            here = rank == self.processes.rank
            like = gradients[names[0]]
            flat = torch.cat([mine[name].reshape(-1) for name in names]) if here else like.new_empty(sum(sizes))
            parts = self.processes.broadcast(flat, rank).split(sizes)
            out |= {name: part.view_as(gradients[name]) for name, part in zip(names, parts, strict=True)}
        return out


def owners_of(layers: Sequence[Layer], count: int) -> dict[str, int]:
    """Which of so many processes each layer is, so that all have about as much to invert.

    The most costly layers go first, each to the process that has least to do so far.

    Args:
        layers: the preconditioned layers.
        count: of the processes.
    """
    load, owners = [0] * count, dict[str, int]()
    costs = {layer.name: sum(n**3 for n in layer.matrix_shape) if layer.structured else layer.size for layer in layers}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = load.index(min(load))
        owners[name] = rank
        load[rank] += costs[name]
    return owners


def _damped(layer: Layer, operator: Operator, rule: Damping | None, invert: bool) -> tuple[Operator, bool]:
    """A layer's damped operator, or its inverse and that it is one."""
    damped = damp(operator, rule)
    if rule is not None:
        damped.trust()
    inverted = invert and _kronecker(damped)
    if inverted:
        with told_in_factors(rule), located(f"layer {layer.name!r}"):
            damped = damped.inverse()
    return damped, inverted


def _kronecker(operator: Operator) -> bool:
    if isinstance(operator, DirectSum):
        return all(_kronecker(part) for part in operator.operators)
    return isinstance(operator, Kronecker)
