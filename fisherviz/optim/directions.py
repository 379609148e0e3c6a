"""Directions: what an optimizer makes of the gradients, before a step rule gives it a length.

`Preconditioned` applies the damped inverse of an approximation; a mini-batch's Fisher, conjugate gradients and K-BFGS
are in the files of their optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fisherviz.operators.damping import Damping, as_damping
from fisherviz.optim.low_rank import Moves, split_rows
from fisherviz.optim.preconditioner import INVERT_FROM, Preconditioner
from fisherviz.optim.selection import gradient_matrix, one_damping, split_matrix
from fisherviz.optim.step import Step
from fisherviz.support import timing


class Part:
    """What directions and step rules have in common: what they need to see, and what is saved of them."""

    inputs = False
    """Whether the passes' inputs are needed."""
    captures = True
    """Whether the user's own passes are what the statistics come from."""
    needs_closure = ""
    """What is said where `step` needs a closure and gets none."""

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """What is saved under "fisherviz", tensors by the parameters' names. Nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave. Nothing by default."""


class Directions(Part, ABC):
    """From the gradients of the layers to directions."""

    reads_rows = False
    """Whether a gradient's rows can be of use."""

    @abstractmethod
    def of(self, step: Step) -> Moves:
        """Directions of the layers' parameters that have a gradient."""


class Preconditioned(Directions):
    """(approximation + damping)⁻¹ times the gradients.

    Args:
        read: what a group's damping means.
    """

    reads_rows = True

    def __init__(self, read: Callable[[Any], Damping | None] = as_damping) -> None:
        self.read = read
        self._made: tuple[tuple[Any, ...], Preconditioner] | None = None

    def of(self, step: Step) -> Moves:
        """Preconditioned gradients of all layers with a gradient."""
        if not step.active:
            return {}
        self.update_moments(step)
        return self.solve(step, self.preconditioner_now(step))

    @timing.part("statistics")
    def update_moments(self, step: Step) -> None:
        """The step's statistics into the averages; a snapshot where one is due, or a layer runs for the first time."""
        step.moments.advance(step.decay, step.due, keep=step.T > 1)
        missing = step.moments.lacks(step.active)
        if missing:
            step.moments.snapshot(keep=step.T > 1, missing=True)
        if step.due or missing or step.moments.refines:
            self._made = None

    @timing.part("inversion")
    def preconditioner_now(self, step: Step) -> Preconditioner:
        """The damped matrix of the groups' dampings."""
        layers = step.moments.space.layers
        rules = {layer.name: self.read(one_damping(layer, step.dampings)) for layer in layers}
        made = self.damped(step, rules)
        self.keep(rules, made)
        return made

    @timing.part("inversion")
    def damped(self, step: Step, rules: Mapping[str, Damping | None]) -> Preconditioner:
        """The damped matrix, factorised anew after a snapshot or with another damping than that which is kept."""
        if self._made is not None and self._made[0] == tuple(rules.values()):
            return self._made[1]
        matrix = step.moments.build()
        if step.reduction == "sum" and step.moments.approximation.follows_scale:
            matrix = matrix.scale(step.moments.snapshot_examples)
        return Preconditioner(matrix, rules, step.T >= INVERT_FROM)

    def keep(self, rules: Mapping[str, Damping | None], made: Preconditioner) -> None:
        """Keep a factorisation for the steps until the next snapshot."""
        self._made = (tuple(rules.values()), made)
        self.reads_rows = made.has_rows

    @timing.part("inversion")
    def solve(self, step: Step, preconditioner: Preconditioner) -> Moves:
        """Directions of the active layers, by factors on rows where that costs less."""
        out: Moves = {}
        whole: dict[str, Tensor] = {}
        for layer in step.active:
            rows = step.rows(layer, partial(preconditioner.low_rank_pays, layer))
            if rows is not None:
                out |= split_rows(layer, *preconditioner.solve_rows(layer, rows))
            else:
                whole[layer.name] = gradient_matrix(layer, step.decays).reshape(-1)
        solved = preconditioner.solve(whole) if whole else {}
        for layer in step.active:
            if layer.name in solved:
                out |= split_matrix(layer, solved[layer.name])
        return out

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Factorise anew."""
        self._made = None
