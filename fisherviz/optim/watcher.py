"""What the optimizers see of the user's own training: forwards that were backpropagated, and what they show.

Hooks sit on the model's output and on its structured modules; labels are sampled and backpropagated when the user's own
backward reaches the output, to the layers' outputs only. User gradients stay bitwise what they were.

Which passes count: those whose gradient is in the step, layer by layer. A backward that leaves nothing in `.grad` of
the layers (`autograd.grad` of an input, another loss through frozen weights, another optimizer's sampling) is no pass
and costs nothing. One whose gradients are gone (None, or zeros) when the next backward or the step begins is forgotten
with them. Two backwards through one forward are one pass whose scores add up as `.grad` does. Gradients that
`autograd.grad` returned count as long as no backward leaves any in `.grad`: they are taken to be assigned by hand.
What gets into `.grad` by other ways (`Gradients.unexplained`) is listened for, so that the step can say so.

Which positions of an output count: those that the loss's gradient reaches (`Likelihood.reached`), so that padding that
the loss ignores, or the last token of a shifted loss, is in no Fisher.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherviz.capture.backward import backpropagate
from fisherviz.capture.calls import Call, counts_examples, placed
from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.capture.hooks import Recorder, beside, capture_calls
from fisherviz.capture.network import Network
from fisherviz.capture.per_example import generic_captures
from fisherviz.capture.reach import indicators, marked
from fisherviz.capture.slopes import with_slopes
from fisherviz.capture.take import shown
from fisherviz.capture.uses import NOT_EXAMPLES, refuse_reentrant
from fisherviz.network.batches import Arguments, arguments, move
from fisherviz.network.guest import as_guest, lock_of, visiting
from fisherviz.network.layers import Layer
from fisherviz.network.vectors import not_finite
from fisherviz.optim.evidence import Gradients, State, away_of, destination, keeps_graph
from fisherviz.optim.hooks import Ear, Here, ModelHook, OutputHook, exchanged, weakly
from fisherviz.optim.passes import Pass, Source, Wanted, added
from fisherviz.support import timing


class Watcher:
    """Watches one model's training.

    Args:
        network: the model with its layers; its hooks stay on the model.
        wanted: what a pass has to show.
        consume: called with each pass that counts when the user's backward has ended; a second backward through
            the same forward brings the same pass again.
        describe: called with each new pass before it is captured.
        drop: called with the names of layers whose earlier passes no longer count.

    The three are methods of the watcher's owner, which is held weakly.
    """

    def __init__(
        self,
        network: Network,
        wanted: Wanted,
        consume: Callable[[Pass], None],
        describe: Callable[[Pass], None],
        drop: Callable[[Collection[str]], None],
    ) -> None:
        self.network, self.model, self.wanted = network, network.model, wanted
        self.consume, self.describe, self.drop = weakly(consume), weakly(describe), weakly(drop)
        self.away = away_of(network)
        self.gradients = Gradients(network, self.away, self.drop)
        self._parameters = list(network.parameters.values())
        own = set(self._parameters)
        self._slots = [
            (m._parameters, key, p) for m in self.model.modules() for key, p in m._parameters.items() if p in own
        ]
        network.hold(True)
        network.recorder.stray = weakly(self._alone)
        self._here = Here()
        # backwards of several threads run in these threads on a CPU; elsewhere one thread runs all of a device's
        self._one_at_a_time = lock_of(self.model) if network.device.type == "cpu" else nullcontext()
        self.generic_diagonal = True
        """Whether per-example gradients of layers without structure are taken."""
        self._pending: dict[int, Pass] = {}
        handles = [
            network.model.register_forward_pre_hook(ModelHook(self, "enter"), with_kwargs=True),
            network.model.register_forward_hook(ModelHook(self, "leave"), with_kwargs=True, always_call=True),
        ]
        weakref.finalize(self, _detach, handles, network.recorder)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers."""
        return self.network.layers

    def captures_of(
        self, inputs: Arguments, source: Source, *, generic: bool | None = None
    ) -> tuple[dict[str, AnyCapture], int]:
        """Captures by layer name, and the number of examples, of a pass of our own that never counts as training.

        Args:
            inputs: arguments of the model, which stays in its present mode, with the weights of its output.
            source: the vectors to backpropagate.
            generic: whether layers without structure are wanted; None: as the user's passes show them.
        """
        generic = self.generic_diagonal if generic is None else generic
        weight, rows, counted, targets = inputs.weight, inputs.examples, None, inputs.targets
        inputs = inputs._replace(weight=None, targets=None)
        with self.away(), as_guest(self.model):
            z, calls = self.network.record(inputs)
            if targets is not None:
                self.network.likelihood.check_data(z.detach(), targets)
            v = source(z.detach())
            if weight is not None:
                v = self.network.likelihood.only(v, weight.to(v.dtype).sqrt())
                counted = None if bool((weight > 0).all()) else weight > 0
            captures = shown(self.network, inputs, z, calls, v, counted, generic=generic)
        if rows is None or len(rows) == len(z):
            return captures, len(z)
        return {name: capture.take(rows) for name, capture in captures.items()}, len(rows)

    def weighed(self, inputs: Any, targets: Tensor | None) -> Arguments:
        """A batch of data as arguments of the model, with weights of 0 where its targets leave positions out."""
        counted = None if targets is None else self.network.likelihood.counted(targets)
        return move(arguments(inputs)._replace(weight=counted, targets=targets), self.network.device)

    # ---- the user's forward ------------------------------------------------------------------------------------------

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start recording if this forward may count."""
        if self.away:
            return
        recorder = self.network.recorder
        self._here.depth += 1
        recorder.active, recorder.calls = self._counts(), []
        self._here.entered = Arguments(args, kwargs) if recorder.active else None

    def _counts(self) -> bool:
        return (
            not visiting()
            and self.model.training
            and torch.is_grad_enabled()
            and torch._C._functorch.peek_interpreter_stack() is None
            and any(p.requires_grad for p in self._parameters)
            and all(held.get(key) is p for held, key, p in self._slots)  # no functional_call with other weights
        )

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Stop recording, and hand out a clone of the output that calls back when it is backpropagated."""
        if self.away:
            return None
        recorder = self.network.recorder
        self._here.depth -= 1
        if not recorder.active:
            if output is not None and torch.is_grad_enabled() and not visiting():
                self._strange(output)
            return None
        inputs, self._here.entered = self._here.entered, None
        calls = recorder.by_layer()
        recorder.active, recorder.calls = False, []
        if output is None or inputs is None:
            return None
        z = self.pick(output)
        if not z.requires_grad or not z.shape[:1].numel():
            return None  # a batch of no examples shows nothing
        clone = z.clone()
        made = Pass(len(z) if z.dim() else 1, inputs, z, calls, {}, frozenset(calls))
        self._place(made, z)
        hook = OutputHook(self)
        key = id(hook)  # unique as long as the hook lives
        self._pending[key] = made
        # a forward whose graph is dropped without a backward is forgotten with it
        weakref.finalize(hook, self._pending.pop, key, None)
        clone.register_hook(hook)
        return exchanged(output, z, clone)

    def _strange(self, output: Any) -> None:
        """Listen whether a forward that does not count (evaluation mode, other weights) gets into `.grad` after all."""
        tell = weakly(self._told)
        for z in pytree.tree_leaves(output):
            if isinstance(z, Tensor) and z.requires_grad:
                z.register_hook(lambda gradient: tell(None))

    def _alone(self, layer: Layer, output: Tensor) -> None:
        """The same for a layer that was called by itself, and not by the model."""
        if not self._here.depth and not self.away and not visiting():
            tell = weakly(self._told)
            output.register_hook(lambda gradient: tell(layer))

    def _told(self, layer: Layer | None) -> None:
        mine = self._parameters if layer is None else list(layer.parameters.values())
        if not self.away and destination(mine) == "accumulated":
            self.gradients.stray([one.name for one in self.layers] if layer is None else [layer.name])

    def _place(self, made: Pass, z: Tensor) -> None:
        """Find the examples of each call, and listen to its gradients."""
        made.calls = placed(made.calls, z, self.network.structure.layouts)
        if self.wanted.local or self.wanted.scores:
            made.ears = {
                name: [[Ear.at(edge) for edge in call.edges] for call in each] for name, each in made.calls.items()
            }

    def pick(self, output: Any) -> Tensor:
        """The output tensor of what the model returned."""
        z = self.network.output(output) if self.network.output is not None else output
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model returned {type(z).__name__}, not a tensor; give the optimizer output=lambda out: ..."
            )
        return z

    # ---- the user's backward -----------------------------------------------------------------------------------------

    @timing.part("statistics")
    def fire(self, key: int, gradient: Tensor) -> None:
        """A backward has reached an output: if it goes on to the layers' gradients, backpropagate our own vectors."""
        made = self._pending.get(key)
        if made is not None and made.output is not None and not self.away:
            with self._one_at_a_time:
                self._fire(key, made, made.output, gradient)

    def _fire(self, key: int, made: Pass, z: Tensor, gradient: Tensor) -> None:
        retained = keeps_graph()
        if not retained:
            del self._pending[key]
        way, again = destination(self._parameters), made.differentiated
        made.differentiated |= torch.is_grad_enabled()  # create_graph=True: later backwards may come by its graph
        if not way and made.calls:
            return
        task = self.gradients.opens() if way == "accumulated" else -1
        if again and self.wanted.scores and task >= 0:
            self.gradients.stray(made.ran)
        made.retained = retained
        fresh: dict[str, AnyCapture] = {}
        vectors: dict[str, list[Tensor]] = {}
        shows = False
        if made.shown is None or self.wanted.scores or made.counted is not None or made.silent is not None:
            made.bad = not_finite(z.detach())
            if made.shown is None and not made.bad:
                known = self.network.structure
                self.describe(made)
                structured = {layer.name for layer in self.layers if layer.structured}
                made.calls = {name: calls for name, calls in made.calls.items() if name in structured}
                if self.network.structure is not known:
                    self._place(made, z)
            if not made.bad:
                shows, positions = made.reach(self.network.likelihood, self.wanted, z.detach(), gradient.detach())
            v = self._vectors(made, z.detach(), gradient.detach(), positions) if shows and self._needs_vectors else None
            if shows and self.wanted.captures and self.network.slopes:
                with self.away():
                    made.calls = with_slopes(made.calls)
            told = [v] if v is not None and self.wanted.structured and not self.wanted.scores else []
            if shows and self.wanted.captures and made.counted is not None:
                told.append(indicators(self.network.likelihood, z.detach(), made.counted))
            if told:
                with self.away():
                    vectors = backpropagate(z, made.calls, torch.cat(told), keep=True)
            if v is not None and self.generic_diagonal:
                fresh = self.generic_captures(made, v)
        for ear in itertools.chain.from_iterable(itertools.chain.from_iterable(made.ears.values())):
            ear.open()
        before = self.gradients.states()
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: self._finish(made, task, before, fresh, vectors, shows)
        )

    def _finish(self, *told: Any) -> None:
        """The user's backward has ended."""
        with self._one_at_a_time:
            self._end(*told)

    @property
    def _needs_vectors(self) -> bool:
        generic = self.generic_diagonal and bool(self.network.structure.generic)
        return self.wanted.captures and (self.wanted.structured or generic)

    def _vectors(self, made: Pass, z: Tensor, gradient: Tensor, positions: Tensor | None) -> Tensor | None:
        if self.wanted.scores:
            return (gradient / made.scale).unsqueeze(0)
        if self.wanted.source is None:
            return None
        return self.network.likelihood.only(self.wanted.source(z), positions)

    def generic_captures(self, made: Pass, v: Tensor) -> dict[str, AnyCapture]:
        """Per-example gradients of the layers without structure."""
        if not (layers := self.network.structure.generic):
            return {}
        refuse_reentrant(made.output)
        with self.away(), as_guest(self.model):
            v = v.unsqueeze(2) if v.dim() == 2 else v
            found = generic_captures(self.network, layers, made.inputs, v)
        return {name: capture.to(self.network.precision) for name, capture in found.items()}

    @timing.part("statistics")
    def _end(
        self,
        made: Pass,
        task: int,
        before: dict[nn.Parameter, State],
        fresh: dict[str, AnyCapture],
        vectors: dict[str, list[Tensor]],
        shows: bool,
    ) -> None:
        """Captures from what was recorded, for the layers that have the backward's gradient."""
        if not made.bad:
            for name in made.calls:
                self._show(made, name, vectors.get(name), fresh, shows)
        if task < 0:
            mine = self.gradients.returned(made.ran)
        else:
            mine = self.gradients.written(task, before, made.ran)
            self.gradients.closes(task)
            alone = [
                p for layer in self.layers if layer.name in mine for p in layer.parameters.values() if before[p] is None
            ]
            made.gradients |= {p: (p.grad, p.grad._version) for p in alone if p.grad is not None}
        if late := mine & self.gradients.idle:  # what earlier passes showed of them has no gradient in the step
            self.drop(late)
        if shows or made.shown is None:
            made.shown = {name: added(made.captures.get(name), capture) for name, capture in fresh.items()}
        if mine:
            # a layer without any gradient takes no part in the step, and its statistics go with the others'
            counted = mine | self.gradients.without((made.ran | set(made.shown)) - mine)
            self.gradients.idle = (self.gradients.idle | counted) - mine
            made.captures |= {name: capture for name, capture in made.shown.items() if name in counted}
            made.layers |= mine
        if not made.retained:
            made.calls, made.ears, made.shown, made.output = {}, {}, {}, None
            if not self.wanted.inputs:
                made.inputs = None
        if mine:
            self.consume(made)

    def _show(
        self, made: Pass, name: str, vectors: list[Tensor] | None, fresh: dict[str, AnyCapture], shows: bool
    ) -> None:
        """What this backward showed at one structured layer."""
        calls = made.calls[name]
        layer = calls[0].layer
        if not all(call.intact for call in calls):
            raise RuntimeError(
                f"the input of layer {name!r} was changed in place during the backward pass; clone it before."
            )
        if not counts_examples(calls):
            raise RuntimeError(
                f"layer {name!r} has changed since the first pass: {NOT_EXAMPLES}; put it in a group with "
                "approximation='none'."
            )
        heard = [
            call.together([ear.gradient for ear in ears], 0)
            for call, ears in zip(calls, made.ears.get(name, []), strict=False)
        ]
        scores = [gradient.unsqueeze(0) for gradient in heard if gradient is not None]
        exact = len(scores) == len(calls)
        capture = self._capture(made, calls, vectors, scores if exact else None) if shows else None
        if self.wanted.captures and capture is not None:
            fresh[name] = capture
        half = any(x.dtype in (torch.float16, torch.bfloat16) for x in [*(call.x for call in calls), *scores])
        if (
            self.wanted.local
            and exact
            and scores
            and not half
            and layer.groups == 1
            and not (layer.one_hot or layer.both_ways)
        ):
            a = capture.a if isinstance(capture, Capture) else beside([call.inputs for call in calls], 1)
            g = beside([call.output_gradients(s) for call, s in zip(calls, scores, strict=True)], 2)[0]
            made.local[name] = (a.flatten(0, -2), g.flatten(0, -2))
        else:
            made.local.pop(name, None)

    def _capture(
        self, made: Pass, calls: list[Call], vectors: list[Tensor] | None, scores: list[Tensor] | None
    ) -> AnyCapture | None:
        calls = [replace(call, x=at_least_float32(call.x)) for call in calls]
        like = next(iter(calls[0].layer.parameters.values()))
        # no vectors: inputs alone are wanted
        told = [at_least_float32(v) for v in vectors or [like.new_empty(0, *call.gradient_shape) for call in calls]]
        if self.wanted.scores:
            if scores is None:
                return None
            told = [torch.cat([at_least_float32(s) / made.scale, v]) for s, v in zip(scores, told, strict=True)]
        capture = capture_calls(calls, told)
        return capture if vectors is None or made.counted is None else marked(capture, made.counted)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32; statistics are never kept in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _detach(handles: list[Any], recorder: Recorder) -> None:
    for handle in handles:
        handle.remove()
    recorder.detach()
