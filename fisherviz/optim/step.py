"""What one step sees, made anew by the optimizer each time: the groups, the passes since the last step, statistics.

Directions and step rules are given it instead of the optimizer, which they don't know.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fisherviz.network.batches import Arguments
from fisherviz.network.layers import Layer
from fisherviz.optim.averages import Moments
from fisherviz.optim.preconditioner import Rows
from fisherviz.optim.processes import distributed
from fisherviz.optim.revisit import evaluate
from fisherviz.optim.selection import rows_explain
from fisherviz.optim.watcher import Pass, Source, Watcher

Group = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        k: its number, from 1.
        T: steps between factorisations.
        due: whether this one factorises anew.
        decay: weight of the past in the averages.
        reduction: whether the Fisher is the "mean" or the "sum" over the step's examples.
        groups: the parameter groups.
        state: per parameter, what is kept from step to step (momentum buffers).
        active: those that are preconditioned and have a gradient.
        passes: those since the last step.
        moments: the statistics.
        watcher: the watcher of the model.
        source: the vectors to backpropagate in a pass of one's own.
        generator: where random choices come from.
        loss: what the closure returned.
        closure: evaluates the loss once more.
    """

    k: int
    T: int
    due: bool
    decay: float
    reduction: str
    groups: Sequence[Group]
    state: MutableMapping[Any, Any]
    active: Sequence[Layer]
    passes: list[Pass]
    moments: Moments
    watcher: Watcher
    source: Source
    generator: torch.Generator
    loss: Any
    closure: Callable[[], Any] | None

    @property
    def inputs(self) -> list[Arguments]:
        """Arguments of the passes' forwards, where they are kept."""
        return [made.inputs for made in self.passes if made.inputs is not None]

    @cached_property
    def decays(self) -> dict[nn.Parameter, float]:
        """Each parameter's weight decay."""
        return {p: group["weight_decay"] for group in self.groups for p in group["params"]}

    @cached_property
    def dampings(self) -> dict[nn.Parameter, Any]:
        """Each parameter's damping."""
        return {p: group["damping"] for group in self.groups for p in group["params"]}

    def rows(self, layer: Layer, pays: Callable[[int], bool]) -> Rows | None:
        """The rows behind the layer's gradient, if their number pays and they are one unmodified local backward."""
        if len(self.passes) != 1 or distributed() or any(self.decays[p] for p in layer.parameters.values()):
            return None
        rows = self.passes[0].rows_behind(layer)
        if rows is None or not pays(len(rows[0])):
            return None
        return rows if rows_explain(layer, *rows) else None

    def evaluate(self) -> Any:
        """The closure's loss at the present weights: not a training pass, and the gradients are put back."""
        assert self.closure is not None
        return evaluate(self.watcher, self.closure, [p for group in self.groups for p in group["params"]])
