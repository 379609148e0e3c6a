"""Forward hooks that note what structured modules receive, and where their outputs stand in the autograd graph.

Used by the Probe (which owns forward and backward) and by the optimizers (which watch the user's). Outputs are kept as
gradient edges, not tensors, so that in-place activations after a layer do no harm.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from fisherviz.capture.attention import Inside
from fisherviz.capture.calls import Call, given, made
from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture, StructuredCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.network.guest import eager
from fisherviz.network.kinds import attends, kind_of
from fisherviz.network.layers import Layer, goes_on, is_single, read_weights


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
    if kind_of(module) is None or _exchanged(layer, module):
        return  # the layer is then one that acts without having been seen
    x = args[0] if args else kwargs.get(_input_name(type(module).forward))
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
        return  # a forward in the place of the class's own
    if recorder.active and _dense(x, output) and _altered(module, args, kwargs, output):
        return
    recorder.note(layer, x, output, module=module)


@functools.cache
def _input_name(forward: Callable[..., Any]) -> str:
    """What a class's forward calls its input, which callers may name among other arguments in any order."""
    return list(inspect.signature(forward).parameters)[1]


def _dense(*tensors: Tensor) -> bool:
    """Whether tensors have rows: nested and sparse ones have none of examples."""
    return all(t.layout is torch.strided and not t.is_nested for t in tensors)


def _exchanged(layer: Layer, module: nn.Module) -> bool:
    """Whether a module acts with other tensors than the layer's parameters, as in `torch.func.functional_call`."""
    shared, held = layer.ties.get(module, layer.roles.values()), [id(p) for p in module._parameters.values()]
    return any(id(p) not in held for name, p in layer.parameters.items() if layer.roles[name] in shared)


def _altered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
    """Whether somebody else's hook or forward has changed an output, by as little as rounding would hide."""
    hooks = (*_global_forward_hooks.values(), *module._forward_hooks.values())
    if "forward" not in module.__dict__ and all(isinstance(hook, Hook) for hook in hooks):
        return False
    buffers = dict(module._buffers)
    try:  # running moments of the user's are not moved a second time
        module._buffers.update({key: b if b is None else b.clone() for key, b in buffers.items()})
        with torch.no_grad():
            return not torch.equal(type(module).forward(module, *args, **kwargs), output)
    finally:
        module._buffers.update(buffers)


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


class _Recording(threading.local):
    """A thread's own: others may run the model meanwhile."""

    def __init__(self) -> None:
        self.active = False
        self.calls: list[Call] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has heard nothing."""
        return (_Recording, ())


class Recorder:
    """Records the calls of structured layers while `active`; owns its hooks.

    Args:
        model: the model.
        layers: its probed layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._recording = _Recording()
        self.stray: Callable[[Layer, Tensor], None] | None = None
        """Told of layers' outputs that are not recorded, and of which derivatives can be taken."""
        self.attention = tuple(m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule) and attends(m))
        """Modules that run others as functions."""
        self.cloned: set[str] = set()
        """Layers whose input is overwritten later in the forward pass, and noted as a copy."""
        self.types: set[torch.dtype] = set()
        """Of the layers' outputs."""
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._around: list[RemovableHandle] = []
        """Of the hooks around attention."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy records for itself: it has no hooks on any model yet."""
        return {**self.__dict__, "_recording": _Recording(), "stray": None, "_handles": {}, "_around": []}

    @property
    def active(self) -> bool:
        """Whether calls are recorded in this thread."""
        return self._recording.active

    @active.setter
    def active(self, value: bool) -> None:
        self._recording.active = value

    @property
    def calls(self) -> list[Call]:
        """What this thread has recorded."""
        return self._recording.calls

    @calls.setter
    def calls(self, value: list[Call]) -> None:
        self._recording.calls = value

    def attach(self) -> None:
        """Put a forward hook on each structured layer's modules, and two around attention that has such inside."""
        if self._handles or self._around:
            return
        around = {module: inside for module in self.attention if (inside := self.inside(module))}
        hidden = {layer.name for inside in around.values() for layer in inside.values()}
        for layer in self.layers:
            if layer.structured and layer.name not in hidden:
                hook = Hook(_record, self, layer)
                self._handles[layer.name] = [m.register_forward_hook(hook, with_kwargs=True) for m in layer.modules]
        for module in around:
            self._around.append(module.register_forward_pre_hook(Hook(_open, self)))
            self._around.append(module.register_forward_hook(Hook(_close), always_call=True))

    def inside(self, module: Any) -> dict[Tensor, Layer]:
        """Structured layers inside attention, by their weights."""
        keys = {module: "in_proj_weight", module.out_proj: "weight"}
        found = [layer for layer in self.layers if layer.structured and layer.module in keys]
        return {getattr(layer.module, keys[layer.module]): layer for layer in found}

    def note(self, layer: Layer, x: Tensor, output: Tensor, attended: int = 0, module: nn.Module | None = None) -> None:
        """Note a layer's input and where its output stands in the graph.

        Args:
            layer: the layer.
            x: its input.
            output: its output.
            attended: inside attention its batch N', both being (T, N', d) or (T N', d); 0: elsewhere.
            module: one tied to the layer; None: its own.
        """
        if not output.requires_grad or any(map(is_functorch_wrapped_tensor, (x, output))):
            return  # inside the model's own vmap or grad there are no tensors of the batch
        dense = _dense(x, output)
        if dense and not output.numel():
            return  # an expert that no row of the batch is sent to has not run
        if not self.active:
            if self.stray is not None:
                self.stray(layer, output)
            return
        if not dense:
            return
        self.types.add(output.dtype)
        module = layer.module if module is None else module
        edge, shape = made(output), output.shape
        if goes_on(module):
            found = given(output, x.grad_fn, module)
            if found is None:
                return
            edge, shape = found
        if is_single(module, x):  # one row or image by itself is the only one of several
            x, shape = x.unsqueeze(0), torch.Size((1, *shape))
        origin = None if x.grad_fn is None else GradientEdge(x.grad_fn, x.output_nr)
        x = x.detach().clone() if layer.name in self.cloned else x.detach()
        self.calls.append(Call(layer, module, x, x._version, edge, shape, origin, attended=attended))

    def watch(self, layers: Sequence[Layer]) -> None:
        """Record the calls of those that are structured from now on; the others' hooks come off, the rest stay."""
        self.layers = tuple(layers)
        for layer in self.layers:
            if not layer.structured and layer.name in self._handles:
                for handle in self._handles.pop(layer.name):
                    handle.remove()

    def detach(self) -> None:
        """Take every hook off and forget what was recorded."""
        for handle in [*itertools.chain(*self._handles.values()), *self._around]:
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


def capture_calls(calls: Sequence[Call], gradients: Sequence[Tensor]) -> StructuredCapture:
    """The capture of one layer from its calls and the gradients (K, *gradient_shape) at their outputs.

    Several calls of one module, or of tied ones, are weight-sharing positions: they are put side by side along T. Those
    of a weight that acts both as it is and transposed are the two parts of a `TiedCapture`.
    """
    layer = calls[0].layer
    shown = [(call, call.output_gradients(g)) for call, g in zip(calls, gradients, strict=True)]
    if not layer.both_ways:
        return _read(shown) if layer.one_hot else _used(shown)
    nothing = absent(layer, len(gradients[0]), shown[0][1].shape[1], gradients[0])
    assert isinstance(nothing, TiedCapture)
    read, used = ([pair for pair in shown if pair[0].one_hot is one_hot] for one_hot in (True, False))
    return replace(nothing, read=_read(read) if read else nothing.read, used=_used(used) if used else nothing.used)


def _used(shown: Sequence[tuple[Call, Tensor]]) -> Capture:
    """Inputs that are multiplied."""
    a, g = beside([call.inputs for call, _ in shown], 1), beside([g for _, g in shown], 2)
    dtype = torch.promote_types(a.dtype, g.dtype)  # under autocast the output has another type than the input
    return Capture(a.to(dtype), g.to(dtype), slopes=shown[0][0].slopes if len(shown) == 1 else None)


def _read(shown: Sequence[tuple[Call, Tensor]]) -> TokenCapture:
    """Rows of a table that are read; a bag has one output gradient for all that it reads."""
    tokens = [call.inputs for call, _ in shown]
    g = [g.expand(-1, -1, x.shape[1], -1) for (_, g), x in zip(shown, tokens, strict=True)]
    layer = shown[0][0].layer
    if layer.has_bias:  # of a Linear whose weight is the table: no row has a part in it
        g = [functional.pad(gradient, (0, 1)) for gradient in g]
    weights = beside([read_weights(call.module, x) for (call, _), x in zip(shown, tokens, strict=True)], 1)
    return TokenCapture(beside(tokens, 1), weights, beside(g, 2), layer.matrix_shape[layer.one_hot])


def absent(layer: Layer, vectors: int, n: int, like: Tensor) -> AnyCapture:
    """What a batch shows of a layer that it did not run: zeros.

    Args:
        layer: the layer.
        vectors: their number K.
        n: number of examples.
        like: of the dtype and device.
    """
    rows, da = layer.matrix_shape
    if not layer.structured:
        return GenericCapture(like.new_zeros(vectors, n, layer.size))
    groups = (layer.groups,) if layer.groups > 1 else ()
    unused, unread = like.new_zeros(vectors, n, 1, *groups, rows // layer.groups), like.new_zeros(n, 1)
    if layer.both_ways:
        d, vocabulary = (rows, da) if layer.one_hot else (da, rows)
        read = TokenCapture(unread.long(), unread, like.new_zeros(vectors, n, 1, d), vocabulary)
        used = Capture(like.new_zeros(n, 1, d), like.new_zeros(vectors, n, 1, vocabulary))
        return TiedCapture(read, used, layer.one_hot)
    if layer.one_hot:
        return TokenCapture(unread.long(), unread, unused, da)
    return Capture(like.new_zeros(n, 1, *groups, da), unused, slopes=like.new_zeros(n, rows))


def beside(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Parts as one along an axis; a single one is not copied."""
    return torch.cat(list(parts), axis) if len(parts) > 1 else parts[0]
