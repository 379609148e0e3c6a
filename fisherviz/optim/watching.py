"""An optimizer that watches its model train: what the passes since the last step show, and which of them count."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from fisherviz.approximations import Approximation
from fisherviz.capture.calls import counts_examples
from fisherviz.capture.look import glance, late, look, neighbours
from fisherviz.capture.network import Network
from fisherviz.capture.uses import acts_unseen
from fisherviz.capture.ways import FIRST, is_due, ways_of
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import NOT_FINITE, FreshVectors
from fisherviz.operators.finite import first_not_finite
from fisherviz.optim import settings
from fisherviz.optim.averages import Moments
from fisherviz.optim.passes import Pass, Wanted
from fisherviz.optim.preconditioner import INVERT_FROM
from fisherviz.optim.selection import choose_layers, precision_of, refuse_thawed, settle
from fisherviz.optim.watcher import Watcher
from fisherviz.statistics import needs_slopes
from fisherviz.support import timing
from fisherviz.support.processes import grouped, summed
from fisherviz.support.warning import warn


class Watching(torch.optim.Optimizer):
    """What `NaturalGradient` knows of the passes between two steps."""

    approximation: Approximation
    likelihood: Likelihood
    kind: str
    samples: int
    T: int
    k: int

    def _watch(self, model: nn.Module, output: Callable[[Any], Any] | None) -> None:
        """Find the layers of the groups that are preconditioned."""
        self.network = Network(model, self.likelihood, choose_layers(model, self.param_groups), output)
        self._known = {p for layer in self.layers for p in layer.parameters.values()}
        device = next(iter(self._known)).device if self._known else torch.device("cpu")
        self.generator = torch.Generator(device=device).manual_seed(torch.initial_seed())
        self.moments: Moments | None = None
        self._passes: list[Pass] = []
        self._watcher: Watcher | None = None
        self._precision = ""
        """That of the matrices at the last step, since when averages are in it."""
        self._looks = 0
        """Passes that were looked at for evidence."""
        self._captures = True
        """Whether the user's own passes are what the statistics come from."""
        self._guesses_scale = False

    def _listen(self, wanted: Wanted) -> None:
        """Watch the model's passes from now on."""
        self._captures = wanted.captures
        self._guesses_scale = wanted.scores and wanted.loss_scale is None
        self._watcher = Watcher(self.network, wanted, self._collect, self._describe, self._drop)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.network.model

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the groups that are preconditioned."""
        return self.network.layers

    def _reads_labels(self) -> bool:
        structured = [layer for layer in self.layers if layer.structured]
        return not structured or any(
            self.approximation.reads_capture(layer)
            or any(s.needs_gradients for s in self.approximation.needs(layer).values())
            for layer in structured
        )

    def _source(self) -> FreshVectors:
        me = weakref.proxy(self)  # the watcher keeps the source: no cycle keeps the optimizer
        return FreshVectors(self.likelihood, self.kind, self.samples, self.generator, lambda: me.k + 1)

    @property
    def _defers(self) -> bool:
        return self.T >= INVERT_FROM

    def _describe(self, made: Pass) -> None:
        """Settle which layers have structure, at the first passes; those that they leave out when they first run."""
        assert made.output is not None
        if self._is_doubtful(made):
            self._look(made)
        if self.moments is None:
            kept = self._settle(list(self.network.structure.generic))
            structure = self.network.structure
            self.moments = Moments(self.approximation, kept, structure.positions, structure.neighbours, self._defers)
        else:
            new = late(self.moments.positions, made.calls, made.output)
            if new:
                self.moments.positions |= new
                self.moments.follow(neighbours(made.calls, {layer.name for layer in self.network.structure.generic}))
        self.network.slopes = any(needs_slopes(named.values()) for named in self.moments.fresh)

    def _is_doubtful(self, made: Pass) -> bool:
        """Whether a pass is looked at: one of the first, of a step that is due, or one that goes another way."""
        if self._looks < FIRST:
            return made.examples > 1 or not self._looks
        assert made.output is not None
        structure, late = self.network.structure, self.k >= FIRST and is_due(self.k)
        if grouped():
            return False
        new = not ways_of(made.output) <= structure.ways
        lost = not all(map(counts_examples, made.calls.values()))
        return late or new or lost or acts_unseen(structure.layers, made.calls, made.output)

    def _look(self, made: Pass) -> None:
        """Look for evidence as the analysis does, where there are gradients of single examples, and at the pass.

        One example shows little, and a fault may show in later passes alone. Where several processes train together,
        the first pass decides: all keep the same statistics.
        """
        assert self._watcher is not None
        assert made.output is not None
        self._looks = FIRST if grouped() else self._looks + 1
        before = self.network.structure.generic
        with self._watcher.away():
            with contextlib.suppress(ValueError, RuntimeError):
                look(self.network, made.inputs)
            glance(self.network, made.calls, made.output)
        found = [layer for layer in self.network.structure.generic if layer.name not in {x.name for x in before}]
        if self.moments is not None and found:
            if self._passes:
                raise RuntimeError(settings.LATE.format(", ".join(repr(x.name) for x in found), found[0].note))
            self.moments = None  # their averages, and with them those of the others, begin anew
            if self.k:
                warn(settings.ANEW.format(self.k + 1, ", ".join(repr(x.name) for x in found), found[0].note))

    def _settle(self, generic: list[Layer]) -> list[Layer]:
        """Layers that are preconditioned; what happens to those without structure is said once."""
        assert self._watcher is not None
        kept = settle(self.model, self.layers, generic, self.approximation)
        self._watcher.generic_diagonal = any(not layer.structured for layer in kept)
        return kept

    @timing.part("statistics")
    def _collect(self, made: Pass) -> None:
        if all(made is not other for other in self._passes):
            self._passes.append(made)
        if not made.retained:
            self._merge(made)
            made.captures = {}

    def _merge(self, made: Pass) -> None:
        """Add a pass to the fresh sums, once no other backward can change what it showed."""
        made.retained = False
        made.leave_out()
        if self.moments is not None and self._captures and (made.examples or grouped()):
            self.moments.collect(made.captures, made.examples)

    def _drop(self, names: Collection[str]) -> None:
        """Forget earlier passes for layers from whose `.grad` they are gone."""
        for made in self._passes:
            made.drop(names)
        gone = sum(made.examples for made in self._passes if not made.layers and not made.retained)
        self._passes[:] = [made for made in self._passes if made.layers]
        if self.moments is not None and self._captures:
            self.moments.drop(names, gone)

    def _active(self) -> list[Layer]:
        """Preconditioned layers with a gradient; zeros do not count where no pass left them."""
        layers = self.layers if self.moments is None else self.moments.space.layers
        return [layer for layer in layers if self._has_gradient(layer)]

    def _has_gradient(self, layer: Layer) -> bool:
        there = [p.grad for p in layer.parameters.values() if p.grad is not None]
        # `zero_grad(set_to_none=False)` leaves zeros at layers that the batch then skips
        counts = self._seen(layer) and any(layer.name in made.layers for made in self._passes)
        return bool(there) and (counts or any(g.is_sparse or bool(g.any()) for g in there))

    def _forget(self, stepped: bool = False) -> None:
        for made in self._passes:
            made.drop(set(made.layers | set(made.captures)))
        self._passes = []
        if self._watcher is not None:
            self._watcher.gradients.forget(stepped)
        if self.moments is not None:
            self.moments.forget()

    def _check_type(self, kept: bool) -> None:
        """Refuse a model that was converted since the last step, where something is kept from step to step."""
        now = precision_of(self.layers)
        if kept and self._precision not in ("", now):
            self._forget()
            raise RuntimeError(settings.CONVERTED.format(now, self._precision))

    def _check_passes(self) -> None:
        if self._watcher is not None:
            self._watcher.gradients.settle()
        there = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        broken = first_not_finite([p.grad for p in there if p.grad is not None])
        seen = [sum(made.bad for made in self._passes), sum(made.examples for made in self._passes), broken is not None]
        bad, examples, wrong = summed(
            seen, self.generator.device
        )  # all processes raise, or none: none waits for another
        if bad:
            self._forget()
            raise ValueError(NOT_FINITE.format(self.k + 1, int(bad), int(examples)))
        if wrong:
            self._forget()
            whose = "of another process" if broken is None else self._named(there[broken])
            raise ValueError(settings.NOT_FINITE_GRADIENT.format(whose, self.k + 1))
        if len(self._passes) > 1 and self._guesses_scale and any(made.guessed for made in self._passes):
            warn(settings.ACCUMULATED.format(len(self._passes)))
            self._guesses_scale = False
        for made in self._passes:
            if made.retained:
                self._merge(made)
        refuse_thawed(self.param_groups, self._known)
        for layer in self._active():
            if not self._seen(layer):
                raise RuntimeError(settings.UNSEEN.format(layer.name))
        self._say_mixed()

    def _named(self, parameter: nn.Parameter) -> str:
        """A parameter in words."""
        for layer in self.layers:
            for name, own in layer.parameters.items():
                if own is parameter:
                    return f"of {name!r}"
        return f"of a parameter of shape {tuple(parameter.shape)}"

    def _say_mixed(self) -> None:
        """Warn where a part of a gradient is in no Fisher."""
        if self._watcher is None:
            return
        for sentence, found in (
            (settings.MIXED, self._watcher.gradients.unexplained),
            (settings.KEPT, self._watcher.gradients.kept),
        ):
            if names := [layer.name for layer in self._active() if found(layer)]:
                warn(sentence.format(", ".join(map(repr, names))))
        silent = sum(int(made.silent.sum()) for made in self._passes if made.silent is not None)
        if silent:
            warn(settings.SILENT.format(silent, sum(made.examples for made in self._passes), self.likelihood))

    def _seen(self, layer: Layer) -> bool:
        return self.moments is not None and self.moments.saw(layer)
