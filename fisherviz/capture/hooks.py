"""Forward hooks that note what structured modules receive, and where their outputs stand in the autograd graph.

Used by the Probe (which owns forward and backward) and by the optimizers (which watch the user's). Outputs are kept as
gradient edges, not tensors, so that in-place activations after a layer do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

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

    @property
    def intact(self) -> bool:
        """Whether the input still holds what the layer saw."""
        return self.x._version == self.version


def no_hook(module: torch.nn.Module, *rest: Any) -> None:
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


class RecordHook:
    """The forward hook of one layer; a copy or a pickle of the model carries `no_hook` in its place."""

    def __init__(self, recorder: Recorder, layer: Layer) -> None:
        self.recorder, self.layer = recorder, layer
        self._note = eager(_note)  # a function, not a method: no cycle keeps the model alive

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return (_dropped, ())

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Note the input and where the output stands in the graph."""
        self._note(self.recorder, self.layer, args, kwargs, output)


def _note(recorder: Recorder, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    if not recorder.active or not output.requires_grad:
        return
    x = args[0] if args else next(iter(kwargs.values()))
    source = x.grad_fn
    x = x.detach().clone() if layer.name in recorder.cloned else x.detach()
    recorder.calls.append(Call(layer, x, x._version, get_gradient_edge(output), output.shape, source))


class Recorder:
    """Records the calls of structured layers while `active`; owns its hooks."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.calls: list[Call] = []
        self.active = False
        self.cloned: set[str] = set()
        """Layers whose input is overwritten later in the forward pass, and noted as a copy."""
        self._handles: dict[str, RemovableHandle] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy records for itself: it has no hooks on any model yet."""
        return {**self.__dict__, "calls": [], "active": False, "_handles": {}}

    def attach(self) -> None:
        """Put one forward hook on each structured module."""
        if self._handles:
            return
        for layer in self.layers:
            if layer.structured:
                hook = RecordHook(self, layer)
                self._handles[layer.name] = layer.module.register_forward_hook(hook, with_kwargs=True)

    def watch(self, layers: Sequence[Layer]) -> None:
        """Record the calls of those that are structured from now on; the others' hooks come off, the rest stay."""
        self.layers = tuple(layers)
        for layer in self.layers:
            if not layer.structured and layer.name in self._handles:
                self._handles.pop(layer.name).remove()

    def detach(self) -> None:
        """Take every hook off and forget what was recorded."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
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
    a = [layer.inputs(call.x) for call in calls]
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
