"""The hooks of a watcher: on its model, on outputs, and at nodes of their graphs.

All hold the watcher weakly, so that a replaced optimizer is gone at once; none survives in a copy of the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Self

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from fisherviz.capture.hooks import Hook
from fisherviz.network.batches import Arguments
from fisherviz.network.guest import eager
from fisherviz.optim.evidence import current_backward


class ModelHook(Hook):
    """A hook on the root module that holds its watcher weakly."""

    def __init__(self, watcher: Any, verb: str) -> None:
        super().__init__(_tell, verb)
        self.watcher = weakref.ref(watcher)

    def __call__(self, module: nn.Module, *rest: Any) -> Any:
        """Tell the watcher, if it is there and the module is the one it watches."""
        return self._call(self.watcher(), *self._first, module, *rest)  # torch.compile takes no weak references


def _tell(watcher: Any, verb: str, module: nn.Module, *rest: Any) -> Any:
    if watcher is None or module is not watcher.model:
        return None
    return getattr(watcher, verb)(*rest)


class OutputHook:
    """The hook on one output; the pass lives as long as this hook, that is, as the output's graph."""

    def __init__(self, watcher: Any) -> None:
        self.watcher = weakref.ref(watcher)
        self._call_back = eager(_call_back)

    def __call__(self, gradient: Tensor) -> None:
        """Tell the watcher, if it is there."""
        self._call_back(self.watcher(), id(self), gradient)


def _call_back(watcher: Any, key: int, gradient: Tensor) -> None:
    if watcher is not None:
        watcher.fire(key, gradient)


def exchanged(output: Any, z: Tensor, clone: Tensor) -> Any:
    """What the model returned with the clone in z's place, also in dataclasses."""

    def exchange(leaf: Any) -> Any:
        if leaf is z:
            return clone
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        found = {entry.name: clone for entry in fields(leaf) if getattr(leaf, entry.name, None) is z}
        return replace(leaf, **found) if found else leaf

    return pytree.tree_map(exchange, output)


class Ear:
    """Hears the gradient at one node's output in the backward it is opened for, and in no other."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.backward = -1
        self.gradient: Tensor | None = None

    @classmethod
    def at(cls, edge: GradientEdge) -> Self:
        """One at an edge of the graph."""
        made = cls(edge.output_nr)
        edge.node.register_prehook(made)
        return made

    def open(self) -> None:
        """Listen to the backward that runs."""
        self.backward, self.gradient = current_backward(), None

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Keep the gradient, if it is that backward's."""
        gradient = gradients[self.index]
        if gradient is not None and self.backward == current_backward():
            self.gradient = gradient.detach()


class Here(threading.local):
    """What is under way in a thread."""

    depth = 0
    """Forwards of the model."""
    entered: Arguments | None = None
    """What the one that counts was given."""


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A bound method that does nothing once its object is gone, and does not keep it."""
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        found = held()
        if found is not None:
            found(*args)

    return call
