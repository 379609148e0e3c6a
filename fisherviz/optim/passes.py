"""One forward of the user's and what its backward shows: which outputs it counts, on which scale, at which layers.

The watcher makes passes and fills them; directions and step rules read them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fisherviz.capture.calls import Call
from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.network.batches import Arguments, counted_examples
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim.evidence import same, state_of
from fisherviz.optim.hooks import Ear

Source = Callable[[Tensor], Tensor]
"""From an output (N, ...) to the vectors (K, N, ...) that are backpropagated from it."""


@dataclass(frozen=True)
class Wanted:
    """What a pass has to show.

    Attributes:
        source: gives the vectors to backpropagate; None: no backward pass of our own.
        scores: whether the vectors are the scores of the user's own backward (kind "empirical").
        structured: whether layers with structure need vectors too; False: inputs alone.
        loss_scale: c where the loss is c times the sum of the examples' nll; None: as `Likelihood.loss_scale` tells it,
            otherwise 1/N, the mean.
        curvature: whether the inputs' weights make of the Fisher the curvature of the loss.
        local: whether the user's gradients at the layers' outputs are kept, for products of low rank.
        inputs: whether the model's inputs are kept until the step.
        captures: whether captures are made at all.
    """

    source: Source | None = None
    scores: bool = False
    structured: bool = True
    loss_scale: float | None = None
    curvature: bool = False
    local: bool = False
    inputs: bool = False
    captures: bool = True


@dataclass(eq=False)
class Pass:
    """One forward of the attached model in training mode, and what its backward showed.

    Attributes:
        examples: number N of examples; in the end those with a position that counts.
        inputs: arguments of the forward with the weights of its output, where wanted.
        ran: names of the structured layers that the forward ran.
        layers: names of those that the pass counts for.
        captures: of the layers that it counts for, complete once the user's backward has ended.
        retained: whether the graph is there for another backward, which may add to the captures.
        local: rows a (R, da) and g (R, dg) with a gradient gᵀ a, by layer name, of the last backward.
        bad: examples whose output is NaN or infinite; with any, nothing else is kept, and the step says so.
        gradients: `.grad` of each parameter and its version when the backward ended, if it began without one.
        counted: positions (N, ...) of the output that a backward has reached; None: all.
        scale: c of the last backward's loss.
        guessed: whether it is taken for the mean over the examples.
        differentiated: whether a backward has made a graph of its own, by which others may come through again.
        silent: examples whose outputs no backward has reached, where the likelihood cannot tell what that means.
    """

    examples: int
    inputs: Arguments | None
    output: Tensor | None
    calls: dict[str, list[Call]]
    ears: dict[str, list[list[Ear]]]
    ran: frozenset[str] = frozenset()
    layers: set[str] = field(default_factory=set)
    shown: dict[str, AnyCapture] | None = None
    captures: dict[str, AnyCapture] = field(default_factory=dict)
    retained: bool = False
    local: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gradients: dict[nn.Parameter, tuple[Tensor, int]] = field(default_factory=dict)
    bad: int = 0
    counted: Tensor | None = None
    scale: float = 0.0
    guessed: bool = True
    differentiated: bool = False
    silent: Tensor | None = None

    def reach(self, likelihood: Likelihood, wanted: Wanted, z: Tensor, gradient: Tensor) -> tuple[bool, Tensor | None]:
        """Note which positions a backward of the loss reaches at the output, and the loss's scale.

        Scores are new in every backward, vectors only at positions that no earlier one has reached.

        Returns:
            Whether it shows anything new of the pass, and at which positions, None for all.
        """
        new = here = likelihood.reached(z, gradient)
        if type(likelihood).reached is Likelihood.reached and z.dim():
            zero = (gradient == 0).reshape(len(z), -1).all(1)
            self.silent = zero if self.silent is None else zero & self.silent
        if self.shown is None:
            self.counted = here
        elif self.counted is not None:
            new = ~self.counted if here is None else here & ~self.counted
            self.counted = None if here is None else here | self.counted
        if wanted.scores or wanted.curvature:
            told = wanted.loss_scale or likelihood.loss_scale(z, gradient, here)
            self.scale, self.guessed = told or 1 / len(z), told is None
        if self.inputs is not None:
            self.inputs = self.inputs._replace(weight=self._weight(z) if wanted.curvature else self.counted)
        return wanted.scores or self.shown is None or (new is not None and bool(new.any())), new

    def _weight(self, z: Tensor) -> Tensor | None:
        """What the positions weigh in the curvature of a loss c Σ nll, which is a mean over N examples: c N."""
        if self.guessed or (z.dim() <= 2 and self.counted is None):
            return self.counted
        whole = z.new_ones(len(z), *[1] * (z.dim() - 2)) if self.counted is None else self.counted.to(z.dtype)
        return whole * (self.scale * len(counted_examples(whole)))

    def leave_out(self) -> None:
        """Leave out the examples of which no position counts, once no other backward can reach one.

        Where that are all, the captures keep one, of zeros: other processes may wait for their sums.
        """
        if self.counted is not None:
            rows = counted_examples(self.counted)
            if len(rows) < self.examples:
                kept = rows if len(rows) else rows.new_zeros(1)
                self.captures = {name: capture.take(kept) for name, capture in self.captures.items()}
                self.examples = len(rows)

    def drop(self, names: Collection[str]) -> None:
        """Count no longer for these layers."""
        self.layers.difference_update(names)
        self.silent = self.silent if self.layers else None
        self.captures = {name: capture for name, capture in self.captures.items() if name not in names}

    def rows_behind(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """The layer's rows, if `.grad` still is what this pass's backward left, untouched (version counter)."""
        untouched = all(p in self.gradients and same(self.gradients[p], state_of(p)) for p in layer.parameters.values())
        return self.local.get(layer.name) if untouched else None


def added(one: AnyCapture | None, other: AnyCapture) -> AnyCapture:
    """The capture of two backwards through one forward: their gradients add up."""
    if isinstance(one, Capture | TokenCapture) and isinstance(other, Capture | TokenCapture):
        return replace(other, g=one.g + other.g)
    if isinstance(one, TiedCapture) and isinstance(other, TiedCapture):
        read, used = replace(other.read, g=one.read.g + other.read.g), replace(other.used, g=one.used.g + other.used.g)
        return TiedCapture(read, used, other.transposed)
    if isinstance(one, GenericCapture) and isinstance(other, GenericCapture):
        return GenericCapture(one.gradients + other.gradients)
    return other
