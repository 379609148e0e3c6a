"""What the optimizers see of the user's own training: forwards that were backpropagated, and what they show.

Hooks sit on the model's output and on its structured modules; labels are sampled and backpropagated when the
user's own
backward reaches the output, to the layers' outputs only (DESIGN section 7). User gradients stay bitwise what
they were.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture
from fisherviz.capture.hooks import Call, Recorder, no_hook
from fisherviz.capture.per_example import per_example_gradients
from fisherviz.network.batches import count_examples
from fisherviz.network.guest import as_guest, eager, visiting
from fisherviz.network.layers import Layer
from fisherviz.optim.passes import Source, backpropagate, not_finite
from fisherviz.support import timing

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """What a pass has to show.

    Attributes:
        source: gives the vectors to backpropagate; None: no backward pass of our own.
        scores: whether the vectors are the scores of the user's own backward (kind "empirical").
        loss_scale: c where the loss is c times the sum of the examples' nll; None: 1/N, the mean.
        local: whether the user's gradients at the layers' outputs are kept, for products of low rank.
        inputs: whether the model's inputs are kept until the step.
        captures: whether captures are made at all.
    """

    source: Source | None = None
    scores: bool = False
    loss_scale: float | None = None
    local: bool = False
    inputs: bool = False
    captures: bool = True


class _Ear:
    """Hears the gradient at one node's output in the user's backward, not in ours."""

    def __init__(self, watcher: Watcher, index: int) -> None:
        self.watcher, self.index = weakref.ref(watcher), index
        self.gradient: Tensor | None = None
        self.times = 0

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        watcher, gradient = self.watcher(), gradients[self.index]
        if watcher is None or watcher.sampling or gradient is None:
            return
        self.times += 1
        self.gradient = gradient.detach()


@dataclass(eq=False)
class Pass:
    """One forward of the attached model in training mode, and what its backward showed.

    Attributes:
        examples: number N of examples.
        inputs: arguments of the forward, where wanted.
        captures: by layer name, complete once the user's backward has ended.
        local: rows a (R, da) and g (R, dg) with a gradient gᵀ a, by layer name, where heard exactly once.
        bad: examples whose output is NaN or infinite; with any, nothing else is kept, and the step says so.
        gradients: `.grad` of each parameter and its version when the backward ended, if it began without one.
    """

    examples: int
    inputs: Inputs | None
    output: Tensor | None
    calls: dict[str, list[Call]]
    ears: dict[str, list[_Ear]]
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)
    captures: dict[str, AnyCapture] = field(default_factory=dict)
    local: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gradients: dict[nn.Parameter, tuple[Tensor, int]] = field(default_factory=dict)
    fresh: list[nn.Parameter] = field(default_factory=list)
    bad: int = 0

    def rows_behind(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """The layer's rows, if `.grad` still is what this pass's backward left, untouched (version counter)."""
        for p in layer.parameters.values():
            seen = self.gradients.get(p)
            if seen is None or p.grad is not seen[0] or p.grad._version != seen[1]:
                return None
        return self.local.get(layer.name)


class _ModelHook:
    """A hook on the root module that holds its watcher weakly; copies and pickles of the model carry `no_hook`."""

    def __init__(self, watcher: Watcher, verb: str) -> None:
        self.watcher, self.verb = weakref.ref(watcher), verb
        self._tell = eager(_tell)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return (_dropped, ())

    def __call__(self, module: nn.Module, *rest: Any) -> Any:
        return self._tell(self.watcher(), self.verb, module, *rest)


def _tell(watcher: Watcher | None, verb: str, module: nn.Module, *rest: Any) -> Any:
    if watcher is None or module is not watcher.model:
        return None
    return getattr(watcher, verb)(*rest)


def _dropped() -> Callable[..., None]:
    return no_hook


class _Fire:
    """The hook on one output; the pass lives as long as this hook, that is, as the output's graph."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = weakref.ref(watcher)
        self._call_back = eager(_call_back)

    def __call__(self, gradient: Tensor) -> None:
        self._call_back(self.watcher(), id(self), gradient)


def _call_back(watcher: Watcher | None, key: int, gradient: Tensor) -> None:
    if watcher is not None:
        watcher.fire(key, gradient)


class Watcher:
    """Watches one model's training.

    Args:
        model: the model.
        layers: its layers; those that turn out to have no structure are made generic at the first pass.
        output: picks the output tensor from what the model returns.
        wanted: what a pass has to show.
        consume: called with each pass when the user's backward has ended.
        describe: called before a pass is captured, with the calls of each layer and the output.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        output: Callable[[Any], Tensor] | None,
        wanted: Wanted,
        consume: Callable[[Pass], None],
        describe: Callable[[dict[str, list[Call]], Tensor], None],
    ) -> None:
        self.model, self.layers, self.output, self.wanted = model, tuple(layers), output, wanted
        self.consume, self.describe = consume, describe
        self.recorder = Recorder(self.layers)
        self.recorder.attach()
        self.sampling = False
        self.paused = False
        self.generic_diagonal = True
        """Whether per-example gradients of layers without structure are taken."""
        self._entered: Inputs | None = None
        self._pending: dict[int, Pass] = {}
        handles = [
            model.register_forward_pre_hook(_ModelHook(self, "enter"), with_kwargs=True),
            model.register_forward_hook(_ModelHook(self, "leave"), with_kwargs=True, always_call=True),
        ]
        weakref.finalize(self, _detach, handles, self.recorder)

    # ---- the user's forward
    # ----------------------------------------------------------------------------------------

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start recording if this forward may count."""
        self.recorder.active = self._counts()
        self.recorder.calls = []
        self._entered = (args, kwargs) if self.recorder.active else None

    def _counts(self) -> bool:
        return (
            not self.paused
            and not visiting()
            and not self.sampling
            and self.model.training
            and torch.is_grad_enabled()
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Stop recording, and hand out a clone of the output that calls back when it is backpropagated."""
        if self.paused or not self.recorder.active:
            return None
        inputs, self._entered = self._entered, None
        calls = self.recorder.by_layer()
        self.recorder.active, self.recorder.calls = False, []
        if output is None or inputs is None:
            return None
        z = self.pick(output)
        if not z.requires_grad:
            return None
        clone = z.clone()
        made = Pass(len(z) if z.dim() else 1, inputs, z, calls, {})
        if self.wanted.local or self.wanted.scores:
            made.ears = {name: [self._listen(call) for call in each] for name, each in calls.items()}
        hook = _Fire(self)
        key = id(hook)
        self._pending[key] = made
        # a forward whose graph is dropped without a backward is forgotten with it
        weakref.finalize(hook, self._pending.pop, key, None)
        clone.register_hook(hook)
        if output is z:
            return clone
        return pytree.tree_map(lambda leaf: clone if leaf is z else leaf, output)

    def _listen(self, call: Call) -> _Ear:
        ear = _Ear(self, call.edge.output_nr)
        call.edge.node.register_prehook(ear)
        return ear

    def pick(self, output: Any) -> Tensor:
        """The output tensor of what the model returned."""
        z = self.output(output) if self.output is not None else output
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model returned {type(z).__name__}, not a tensor; give the optimizer output=lambda out: ..."
            )
        return z

    # ---- the user's backward
    # ---------------------------------------------------------------------------------------

    @timing.part("statistics")
    def fire(self, key: int, gradient: Tensor) -> None:
        """The user's backward has reached an output: backpropagate our own vectors, once."""
        made = self._pending.pop(key, None)  # once: a second backward through the same graph finds nothing
        if made is None:
            return
        z = made.output
        assert z is not None
        self.describe(made.calls, z)
        made.bad = not_finite(z.detach())
        if made.bad:
            made.calls = {}
        elif self.wanted.captures:
            v = self._vectors(z.detach(), gradient.detach())
            if v is not None and not self.wanted.scores:
                made.vectors = self._backward(z, made.calls, v)
            if v is not None and self.generic_diagonal:
                made.captures |= self.generic_captures(made, v)
        made.fresh = [p for layer in self.layers for p in layer.parameters.values() if p.grad is None]
        made.output = None
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(made))

    def _vectors(self, z: Tensor, gradient: Tensor) -> Tensor | None:
        if self.wanted.scores:
            return (gradient / self._scale(len(z))).unsqueeze(0)
        if self.wanted.source is None:
            return None
        shaped = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        shaped = shaped.unsqueeze(1) if z.dim() == 1 else shaped
        return self.wanted.source(shaped).to(z.dtype).reshape(-1, *z.shape)

    def _scale(self, n: int) -> float:
        return 1 / n if self.wanted.loss_scale is None else self.wanted.loss_scale

    def _backward(self, z: Tensor, calls: dict[str, list[Call]], v: Tensor) -> dict[str, list[Tensor]]:
        """Gradients (K, N, ...) of each vector's product with z at each call's output."""
        self.sampling = True
        try:
            return backpropagate(z, calls, v)
        finally:
            self.sampling = False

    def generic_captures(self, made: Pass, v: Tensor) -> dict[str, AnyCapture]:
        """Per-example gradients of the layers without structure."""
        layers = [layer for layer in self.layers if not layer.structured]
        if not layers:
            return {}
        assert made.inputs is not None
        n = count_examples(made.inputs)
        in_dims = pytree.tree_map(
            lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n else None,
            made.inputs,
        )
        parameters: dict[str, Tensor] = {name: p for layer in layers for name, p in layer.parameters.items()}
        self.paused = True
        try:
            with as_guest(self.model):
                found = per_example_gradients(self.model, self.call, parameters, made.inputs, v, in_dims)
        finally:
            self.paused = False
        return {
            layer.name: GenericCapture(
                torch.cat([at_least_float32(found[name].detach()).flatten(2) for name in layer.parameters], 2)
            )
            for layer in layers
        }

    def call(self, function: Callable[..., Any], inputs: Inputs) -> Tensor:
        """The output of a function with the model's signature."""
        return self.pick(function(*inputs[0], **inputs[1]))

    @timing.part("statistics")
    def _finish(self, made: Pass) -> None:
        """The user's backward has ended: captures from what was recorded."""
        for name, calls in made.calls.items():
            layer = calls[0].layer
            if not layer.structured:
                continue
            if not all(call.intact for call in calls):
                raise RuntimeError(
                    f"the input of layer {name!r} was changed in place during the backward pass; clone it before."
                )
            ears = made.ears.get(name, [])
            heard = [ear.gradient.unsqueeze(0) for ear in ears if ear.times == 1 and ear.gradient is not None]
            exact = len(heard) == len(calls)
            capture = self._capture(calls, made.vectors.get(name), heard if exact else None, made.examples)
            if self.wanted.captures and capture is not None:
                made.captures[name] = capture
            half = any(call.x.dtype in (torch.float16, torch.bfloat16) for call in calls) or any(
                g.dtype in (torch.float16, torch.bfloat16) for g in heard
            )
            if self.wanted.local and exact and heard and not half and layer.groups == 1:
                a = capture.a if capture is not None else _inputs(calls)
                g = capture_outputs(calls, heard)[0]
                made.local[name] = (a.flatten(0, -2), g.flatten(0, -2))
        for p in made.fresh:
            if p.grad is not None:
                made.gradients[p] = (p.grad, p.grad._version)
        made.calls, made.ears, made.vectors, made.fresh = {}, {}, {}, []
        if not self.wanted.inputs:
            made.inputs = None
        self.consume(made)

    def _capture(
        self, calls: list[Call], vectors: list[Tensor] | None, heard: list[Tensor] | None, n: int
    ) -> Capture | None:
        a = _inputs(calls)
        if self.wanted.scores:
            if heard is None:
                return None
            return Capture(a, at_least_float32(capture_outputs(calls, heard)) / self._scale(n))
        if vectors is None:
            return Capture(a, a.new_empty(0, *a.shape[:-1], calls[0].layer.d_out // calls[0].layer.groups))
        return Capture(a, at_least_float32(capture_outputs(calls, vectors)))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32; statistics are never kept in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _inputs(calls: Sequence[Call]) -> Tensor:
    a = [calls[0].layer.inputs(at_least_float32(call.x)) for call in calls]
    return torch.cat(a, 1) if len(a) > 1 else a[0]


def capture_outputs(calls: Sequence[Call], gradients: Sequence[Tensor]) -> Tensor:
    """Gradients (K, N, ...) at several calls' outputs as (K, N, T, dg)."""
    g = [calls[0].layer.output_gradients(gradient) for gradient in gradients]
    return torch.cat(g, 2) if len(g) > 1 else g[0]


def _detach(handles: list[Any], recorder: Recorder) -> None:
    for handle in handles:
        handle.remove()
    recorder.detach()
