"""Forward hooks that note what structured modules receive, and where their outputs stand in the autograd graph.

Used by the Probe (which owns forward and backward) and by the optimizers (which watch the user's). Outputs are kept as
gradient edges, not tensors, so that in-place activations after a layer do no harm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fisherviz.capture.attention import Inside
from fisherviz.capture.captures import Capture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.network.guest import eager
from fisherviz.network.layers import Layer


@dataclass(eq=False)
class Call:
    """One forward call of a structured module."""

    layer: Layer
    x: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size
    source: Node | None = None
    """Where the input stands in the graph; None for data."""
    examples: int = 0
    """N where examples came second, as inside attention: x and shape have them first, gradients at the edge do not."""

    @property
    def intact(self) -> bool:
        """Whether the input still holds what the layer saw."""
        return self.x._version == self.version

    @property
    def inputs(self) -> Tensor:
        """What the layer's matrix multiplies."""
        return self.layer.inputs(self.x, self.shape)

    def by_example(self, g: Tensor, leading: int) -> Tensor:
        """A gradient at the edge with examples first, behind so many dimensions of vectors."""
        return by_example(g, self.examples, leading) if self.examples else g


def by_example(x: Tensor, examples: int, leading: int = 0) -> Tensor:
    """(..., N, T, d) from (..., T, N, d) or (..., T N, d)."""
    return x.reshape(*x.shape[:leading], -1, examples, x.shape[-1]).transpose(-3, -2)


def no_hook(module: nn.Module, *rest: Any) -> None:
    """What a hook of ours becomes in a copied or unpickled model: nothing, and gone once the module has run."""
    if torch.compiler.is_compiling():
        return
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is no_hook]:
            del hooks[key]
            for marks in (
                module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):  # fmt: skip
                marks.pop(key, None)


def _dropped() -> Callable[..., None]:
    return no_hook


class Hook:
    """A hook on a module; a copy or a pickle of the model carries `no_hook` in its place.

    Args:
        function: what is called; a function, not a method: no cycle keeps the model alive.
        first: its first arguments, before those of the hook.
    """

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self._call, self._first = eager(function), first

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return (_dropped, ())

    def __call__(self, module: nn.Module, *rest: Any) -> Any:
        """Call the function."""
        return self._call(*self._first, module, *rest)


def _record(
    recorder: Recorder, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Note what a layer was given, and where what it gave stands in the graph."""
    recorder.note(layer, args[0] if args else next(iter(kwargs.values())), output)


def _open(recorder: Recorder, module: nn.Module, *given: Any) -> None:
    """Note the layers inside attention as long as it runs."""
    if recorder.active and (layers := recorder.inside(module)):
        inside = Inside(layers, recorder.note)
        inside.__enter__()
        _opened.modes[module] = inside


def _close(module: nn.Module, *given: Any) -> None:
    if (inside := _opened.modes.pop(module, None)) is not None:
        inside.__exit__(None, None, None)


class _Opened(threading.local):
    """What each thread has opened: modes are the thread's own."""

    def __init__(self) -> None:
        self.modes: dict[nn.Module, Inside] = {}


_opened = _Opened()


class Recorder:
    """Records the calls of structured layers while `active`; owns its hooks.

    Args:
        model: the model.
        layers: its probed layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.attention = tuple(m for m in model.modules() if type(m).forward is nn.MultiheadAttention.forward)
        """Modules that run others as functions."""
        self.calls: list[Call] = []
        self.active = False
        self.cloned: set[str] = set()
        """Layers whose input is overwritten later in the forward pass, and noted as a copy."""
        self._handles: dict[str, RemovableHandle] = {}
        self._around: list[RemovableHandle] = []
        """Of the hooks around attention."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy records for itself: it has no hooks on any model yet."""
        return {**self.__dict__, "calls": [], "active": False, "_handles": {}, "_around": []}

    def attach(self) -> None:
        """Put one forward hook on each structured module, and two around attention that has such modules inside."""
        if self._handles or self._around:
            return
        around = {module: inside for module in self.attention if (inside := self.inside(module))}
        hidden = {layer.name for inside in around.values() for layer in inside.values()}
        for layer in self.layers:
            if layer.structured and layer.name not in hidden:
                hook = Hook(_record, self, layer)
                self._handles[layer.name] = layer.module.register_forward_hook(hook, with_kwargs=True)
        for module in around:
            self._around.append(module.register_forward_pre_hook(Hook(_open, self)))
            self._around.append(module.register_forward_hook(Hook(_close), always_call=True))

    def inside(self, module: Any) -> dict[Tensor, Layer]:
        """Structured layers inside attention, by their weights."""
        keys = {module: "in_proj_weight", module.out_proj: "weight"}
        found = [layer for layer in self.layers if layer.structured and layer.module in keys]
        return {getattr(layer.module, keys[layer.module]): layer for layer in found}

    def note(self, layer: Layer, x: Tensor, output: Tensor, examples: int = 0) -> None:
        """Note a layer's input and where its output stands in the graph.

        Args:
            layer: the layer.
            x: its input.
            output: its output.
            examples: N where both are (T, N, d) or (T N, d); 0: examples come first.
        """
        if not self.active or not output.requires_grad:
            return
        source, edge = x.grad_fn, get_gradient_edge(output)
        x = x.detach().clone() if layer.name in self.cloned else x.detach()
        if examples:
            x, output = by_example(x, examples), by_example(output.detach(), examples)
        self.calls.append(Call(layer, x, x._version, edge, output.shape, source, examples))

    def watch(self, layers: Sequence[Layer]) -> None:
        """Record the calls of those that are structured from now on; the others' hooks come off, the rest stay."""
        self.layers = tuple(layers)
        for layer in self.layers:
            if not layer.structured and layer.name in self._handles:
                self._handles.pop(layer.name).remove()

    def detach(self) -> None:
        """Take every hook off and forget what was recorded."""
        for handle in [*self._handles.values(), *self._around]:
            handle.remove()
        self._handles.clear()
        self._around.clear()
        self.calls.clear()

    def by_layer(self) -> dict[str, list[Call]]:
        """Recorded calls of each layer, in execution order; layers that did not run are absent."""
        grouped: dict[str, list[Call]] = {}
        for call in self.calls:
            grouped.setdefault(call.layer.name, []).append(call)
        return grouped


def capture_calls(calls: Sequence[Call], gradients: Sequence[Tensor]) -> Capture | TokenCapture:
    """The capture of one layer from its calls and the gradients (K, N, ...) at their outputs.

    Several calls of one module are weight-sharing positions: they are put side by side along T.
    """
    layer = calls[0].layer
    a = [call.inputs for call in calls]
    g = [layer.output_gradients(gradient) for gradient in gradients]
    if layer.one_hot:
        # a bag has one output gradient for all that it reads
        g = [gradient.expand(-1, -1, tokens.shape[1], -1) for gradient, tokens in zip(g, a, strict=True)]
        weights = beside([layer.weights(tokens) for tokens in a], 1)
        return TokenCapture(beside(a, 1), weights, beside(g, 2), layer.fan_in)
    return Capture(beside(a, 1), beside(g, 2))


def beside(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Parts as one along an axis; a single one is not copied."""
    return torch.cat(list(parts), axis) if len(parts) > 1 else parts[0]


def feeders(source: Node | None, calls: Sequence[Call]) -> set[str]:
    """Names of the layers whose outputs a place in the graph depends on directly, through no other layer."""
    names = {call.edge.node: call.layer.name for call in calls}
    return {names[node] for node in behind(source, names) if node in names}


def behind(source: Node | None, until: Container[Node] = ()) -> Iterator[Node]:
    """A place in the graph and what it depends on.

    Args:
        source: the place; None: data.
        until: where to stop: what lies behind these is left out.

    Yields:
        Each node once.
    """
    pending, seen = [source], set[Node]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in until:
            pending += [following for following, _ in node.next_functions]
