"""Directions: what an optimizer makes of the gradients, before a step rule gives it a length; and what both see.

A `Step` is made anew by the optimizer each time; directions and step rules are given it instead of the optimizer.
`Preconditioned` applies the damped inverse of an approximation; a mini-batch's Fisher, conjugate gradients and K-BFGS
are in the files of their optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.matrices.layered import LayeredMatrix, block_diagonal
from fisherviz.network.batches import Arguments
from fisherviz.network.guest import as_guest
from fisherviz.network.layers import Layer
from fisherviz.operators import DirectSum
from fisherviz.operators.damping import Damping, as_damping
from fisherviz.optim.averages import Moments
from fisherviz.optim.gradients import Moves, gradient_matrix, rows_explain, split_matrix, split_rows
from fisherviz.optim.passes import Pass, Source
from fisherviz.optim.preconditioner import INVERT_FROM, Preconditioner, Rows, owners_of
from fisherviz.optim.watcher import Watcher
from fisherviz.support import timing
from fisherviz.support.processes import Processes, grouped, summed

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
        """Arguments of the passes' forwards of which anything counts, where they are kept."""
        return [made.inputs for made in self.passes if made.inputs is not None and made.examples]

    @cached_property
    def any_inputs(self) -> bool:
        """Whether any process has `inputs`: then all take part in the step."""
        return summed([len(self.inputs)], self.moments.device)[0] > 0

    @cached_property
    def group_of(self) -> dict[nn.Parameter, Group]:
        """Each parameter's group."""
        return {p: group for group in self.groups for p in group["params"]}

    @cached_property
    def decays(self) -> dict[nn.Parameter, float]:
        """Each parameter's weight decay."""
        return {p: group["weight_decay"] for p, group in self.group_of.items()}

    def damping(self, layer: Layer) -> float | Damping:
        """The damping that a layer's parameters agree on; ValueError where they do not."""
        mine = [self.group_of[p]["damping"] for p in layer.parameters.values()]
        if any(value != mine[0] for value in mine):
            raise ValueError(
                f"the parameters of layer {layer.name!r} are in groups with different dampings; give them one."
            )
        return mine[0]

    def rows(self, layer: Layer, pays: Callable[[int], bool]) -> Rows | None:
        """The rows behind the layer's gradient, if their number pays and they are one unmodified local backward."""
        if len(self.passes) != 1 or grouped() or any(self.decays[p] for p in layer.parameters.values()):
            return None
        rows = self.passes[0].rows_behind(layer)
        if rows is None or not pays(len(rows[0])):
            return None
        return rows if rows_explain(layer, *rows) else None

    def evaluate(self) -> Any:
        """The closure's loss at the present weights: not a training pass, and what it does to the model is undone."""
        with self.again() as closure:
            return closure()

    @contextmanager
    def again(self) -> Iterator[Callable[[], Any]]:
        """The closure, to be called at other weights; the gradients that it leaves are there until the end alone."""
        assert self.closure is not None
        gradients = {p: p.grad for p in self.group_of}
        # by value where the next backward of DistributedDataParallel may overwrite the memory of those that it gave
        values = {p: g.clone() for p, g in gradients.items() if g is not None and grouped()}
        for p in gradients:
            p.grad = None
        try:
            with self.watcher.away(), as_guest(self.watcher.model, hooks=True):
                yield self.closure
        finally:
            for p, g in gradients.items():
                p.grad = g.copy_(values[p]) if g is not None and p in values else g


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

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of other options, before anything of it is taken. Nothing by default."""

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
        owned: whether each layer's inverse is one process's, where several train together.
    """

    reads_rows = True

    def __init__(self, read: Callable[[Any], Damping | None] = as_damping, owned: bool = False) -> None:
        self.read, self.owned = read, owned
        self._made: tuple[tuple[Any, ...], Preconditioner] | None = None
        self._over: frozenset[str] | None = None

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
        rules = {layer.name: self.read(step.damping(layer)) for layer in layers}
        made = self.damped(step, rules)
        self.keep(rules, made)
        return made

    @timing.part("inversion")
    def damped(self, step: Step, rules: Mapping[str, Damping | None]) -> Preconditioner:
        """The damped matrix, factorised anew after a snapshot or with another damping than that which is kept.

        One that couples layers leaves out those that are frozen, or were when the passes ran: no coordinates of
        the step; a layer that the batch only skipped stays.
        """
        over = frozenset(self._free(step)) if step.moments.pairs else None
        if self._made is not None and self._made[0] == tuple(rules.values()) and self._over == over:
            return self._made[1]
        self._over = over
        matrix = step.moments.build(over)
        if step.reduction == "sum" and step.moments.approximation.follows_scale:
            matrix = _over_examples(matrix, step.moments)
        owners = owners_of(matrix.space.layers, Processes.training().count) if self.owned and grouped() else None
        return Preconditioner(matrix, rules, step.T >= INVERT_FROM, owners)

    def _free(self, step: Step) -> list[str]:
        skipped = [x for x in step.moments.space.layers if not step.moments.saw(x)]
        free = [x for x in skipped if any(p.requires_grad for p in x.parameters.values())]
        return [layer.name for layer in (*step.active, *free)]

    def keep(self, rules: Mapping[str, Damping | None], made: Preconditioner) -> None:
        """Keep a factorisation for the steps until the next snapshot."""
        self._made = (tuple(rules.values()), made)
        self.reads_rows = made.has_rows

    @timing.part("inversion")
    def solve(self, step: Step, preconditioner: Preconditioner) -> Moves:
        """Directions of the active layers, by factors on rows where that costs less."""
        out: Moves = {}
        whole: dict[str, Tensor] = {}
        if absent := [layer.name for layer in step.active if not preconditioner.has(layer)]:
            raise RuntimeError(
                f"layer {absent[0]!r} has a gradient, but no forward on the step's inputs showed it (was it "
                "frozen since the backward?); freeze layers after a step and its zero_grad()."
            )
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


def _over_examples(matrix: LayeredMatrix, moments: Moments) -> LayeredMatrix:
    """The sum over examples from their mean, for each layer over the examples of the passes that count for it."""
    assert moments.values is not None
    kept = {layer.name: values for layer, values in zip(moments.space.layers, moments.values, strict=False)}
    whole = moments.snapshot_examples
    counts = [kept[x.name]["capture"].examples if "capture" in kept[x.name] else whole for x in matrix.space.layers]
    if isinstance(matrix.whole, DirectSum) and len(set(counts)) > 1:
        return block_diagonal(matrix.space, [op.scale(n) for op, n in zip(matrix.operators, counts, strict=True)])
    return matrix.scale(counts[0] if len(set(counts)) == 1 else whole)
