"""Which of the user's backwards leave gradients in `.grad`, and which of those gradients were dropped since.

Told by evidence alone, from what autograd is about to run and from the gradients themselves: `zero_grad()` of the
model, of any optimizer, and `p.grad = None` look alike. Reads `.grad`, never writes it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fisherviz.capture.network import Network
from fisherviz.network.layers import Layer

State = tuple[Tensor, int] | None
"""A parameter's `.grad` with its version; None: there is none."""


class Away:
    """Passes of our own on one model, which no optimizer takes for training.

    A thread's are its own where backwards run in the thread that starts them; elsewhere all look away.
    """

    def __init__(self, threads: bool) -> None:
        self._threads, self._here, self._anywhere = threads, threading.local(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """For the length of a block."""
        self._here.depth = getattr(self._here, "depth", 0) + 1
        self._anywhere += 1
        try:
            yield
        finally:
            self._here.depth -= 1
            self._anywhere -= 1

    def __bool__(self) -> bool:
        return bool(getattr(self._here, "depth", 0) if self._threads else self._anywhere)


_away: weakref.WeakKeyDictionary[nn.Module, Away] = weakref.WeakKeyDictionary()


def away_of(network: Network) -> Away:
    """What all optimizers of a model share."""
    return _away.setdefault(network.model, Away(network.device.type == "cpu"))


def state_of(p: nn.Parameter) -> State:
    """The parameter's gradient as it stands."""
    return None if p.grad is None else (p.grad, p.grad._version)


def same(one: State, other: State) -> bool:
    """Whether nothing was written between two states."""
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] == other[1]


def current_backward() -> int:
    """A number for the backward that runs; the backwards that hooks start inside it have their own."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Whether the backward that runs leaves its graph for another one; True where an older torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def destination(parameters: Iterable[nn.Parameter]) -> str:
    """Where the backward that runs takes the parameters' gradients.

    Args:
        parameters: those that matter.

    Returns:
        "accumulated" in `.grad` of at least one; "returned" by `torch.autograd.grad`; "" where it asks for none.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return ""
    for p in parameters:
        if not p.requires_grad:
            continue
        try:
            if torch._C._will_engine_execute_node(get_gradient_edge(p).node):
                return "accumulated"
        except RuntimeError:  # torch's answer for a leaf whose gradient autograd.grad returns
            return "returned"
    return ""


class Gradients:
    """What backwards have left in the layers' `.grad` since the last step, and which of them a pass explains.

    Args:
        network: the network with the layers.
        away: true while passes of our own run.
        drop: called with the names of layers whose earlier gradients are gone when a backward begins to accumulate.
    """

    def __init__(self, network: Network, away: Away, drop: Callable[[Collection[str]], None]) -> None:
        self.network, self._away, self._drop = network, away, drop
        self._left: dict[nn.Parameter, State] = {}
        """As the last backward left them."""
        self._by_hand: set[str] = set()
        """Layers whose gradients since the last step were all returned by `torch.autograd.grad`."""
        self.idle: set[str] = set()
        """Layers without a gradient whose statistics went with those of the others."""
        self._running: list[int] = []
        """Backwards that have reached a pass and not ended: those that they start themselves are part of them."""
        self._begun = -1
        """The last backward that began to accumulate."""
        self._touched: dict[nn.Parameter, set[int]] = {}
        """The backwards that have accumulated in a parameter's gradient."""
        self._explained: dict[int, set[str]] = {}
        """The layers in which a pass explains what a backward left."""
        self._strange: dict[int, set[str]] = {}
        """Those in which something else has a part in it."""
        self._stepped: dict[nn.Parameter, tuple[int, int]] = {}
        """Where the gradients of the last step were, with their versions."""
        self._kept: set[str] = set()
        """Layers whose gradients hold what was there at the last step."""
        self._ears: dict[nn.Parameter, tuple[Node, RemovableHandle]] = {}
        self._listen()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, on their present paths."""
        return self.network.layers

    def _listen(self) -> None:
        """Hear of every backward that accumulates in a parameter's gradient, also where the parameter has thawed."""
        for layer in self.layers:
            for p in layer.parameters.values():
                node = get_gradient_edge(p).node if p.requires_grad else None
                known = self._ears.get(p)
                if node is None or (known is not None and known[0] is node):
                    continue
                if known is not None:
                    known[1].remove()
                self._ears[p] = node, node.register_prehook(_Listener(self, p))

    def states(self) -> dict[nn.Parameter, State]:
        """All gradients as they stand."""
        return {p: state_of(p) for layer in self.layers for p in layer.parameters.values()}

    # ---- while a backward runs ---------------------------------------------------------------------------------------

    def opens(self) -> int:
        """A backward that accumulates has reached a pass; gives its number."""
        task = current_backward()
        if task not in self._running:
            self._running.append(task)
        self._begin(task)
        return task

    def accumulates(self, p: nn.Parameter) -> None:
        """The backward that runs is about to accumulate in a parameter's gradient."""
        if not self._away:
            task = self._running[-1] if self._running else current_backward()
            self._begin(task)
            self._touched.setdefault(p, set()).add(task)

    def stray(self, names: Collection[str]) -> None:
        """The backward that runs takes to these layers what no pass shows."""
        task = self._running[-1] if self._running else current_backward()
        self._strange.setdefault(task, set()).update(names)

    def _begin(self, task: int) -> None:
        """See what is left of what earlier backwards did."""
        if task == self._begun:
            return
        self._begun = task
        gone = self._gone() | self._by_hand  # what this backward leaves explains `.grad`
        self._by_hand = set()
        if self._stepped:
            self._kept |= {layer.name for layer in self.layers if any(map(self._old, layer.parameters.values()))}
            self._stepped = {}
        if gone:
            self._drop(gone)

    def written(self, task: int, before: Mapping[nn.Parameter, State], ran: Collection[str]) -> set[str]:
        """Names of the layers that a backward has left a gradient in.

        Args:
            task: its number.
            before: the states when it began.
            ran: names of the layers that its forward ran.
        """
        now = self.states()
        self._left |= {p: state for p, state in now.items() if not same(state, before[p])}
        found = {
            layer.name
            for layer in self.layers
            if (layer.name in ran or not layer.structured)
            and any(not same(now[p], before[p]) for p in layer.parameters.values())
        }
        self._explained.setdefault(task, set()).update(found)
        return found

    def closes(self, task: int) -> None:
        """The backward has ended."""
        if task in self._running:
            self._running.remove(task)

    # ---- between backwards -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """A step begins: drop what is gone, and what was returned and not assigned."""
        unassigned = self.without(self._by_hand)
        self._by_hand -= unassigned
        if gone := self._gone() | unassigned:
            self._drop(gone)

    def _gone(self) -> set[str]:
        """Names of the layers whose earlier gradients are gone; zeros are looked for only in what was written since.

        Where those of all are, nothing is left of the passes for the layers either that were frozen meanwhile.
        """
        had = [layer for layer in self.layers if any(map(self._had, layer.parameters.values()))]
        gone = [layer for layer in had if all(map(self._empty, layer.parameters.values()))]
        for layer in gone:
            self._kept.discard(layer.name)
            for p in layer.parameters.values():
                self._left.pop(p, None)
                self._touched.pop(p, None)
        return {layer.name for layer in (self.layers if gone and len(gone) == len(had) else gone)}

    def _had(self, p: nn.Parameter) -> bool:
        return p in self._left or p in self._touched

    def _empty(self, p: nn.Parameter) -> bool:
        now = state_of(p)
        if now is None or (p in self._left and same(now, self._left[p])):
            return now is None
        return _zero(now[0])

    def _old(self, p: nn.Parameter) -> bool:
        return p.grad is not None and p in self._stepped and self._stepped[p] == _place(p.grad) and not _zero(p.grad)

    def without(self, names: Collection[str]) -> set[str]:
        """Those of the named layers that have no gradient, or zeros, which a layer that froze is left with."""
        own = {layer.name: layer.parameters.values() for layer in self.layers if layer.name in names}
        return {name for name, mine in own.items() if all(p.grad is None or _zero(p.grad) for p in mine)}

    def returned(self, ran: Collection[str]) -> set[str]:
        """Names of the layers whose gradients the user has in hand, and no backward has left any in `.grad`."""
        if gone := self._gone():
            self._drop(gone)
        found = {
            layer.name
            for layer in self.layers
            if (layer.name in ran or not layer.structured)
            and any(p.requires_grad for p in layer.parameters.values())
            and not any(p in self._left for p in layer.parameters.values())
        }
        self._by_hand |= found
        return found

    # ---- a step ------------------------------------------------------------------------------------------------------

    def unexplained(self, layer: Layer) -> bool:
        """Whether something that no pass shows has a part in the layer's gradient."""
        tasks = set[int]().union(*(self._touched.get(p, ()) for p in layer.parameters.values()))
        known, strange = self._explained, self._strange
        return any(layer.name not in known.get(task, ()) or layer.name in strange.get(task, ()) for task in tasks)

    def kept(self, layer: Layer) -> bool:
        """Whether the layer's gradient holds what was there at the last step."""
        return layer.name in self._kept

    def forget(self, stepped: bool) -> None:
        """Start anew after a step.

        Args:
            stepped: whether the gradients as they stand were in it.
        """
        self._left, self._by_hand, self._running, self._kept, self.idle = {}, set(), [], set(), set()
        self._touched, self._explained, self._strange = {}, {}, {}
        given = self._ears if stepped else ()
        self._stepped = {p: _place(p.grad) for p in given if p.grad is not None and not p.grad.is_sparse}
        self._listen()


class _Listener:
    """Hears that a backward is about to accumulate in a parameter's gradient."""

    def __init__(self, gradients: Gradients, p: nn.Parameter) -> None:
        self.gradients, self.parameter = weakref.ref(gradients), p

    def __call__(self, arriving: Any) -> None:
        """Tell the gradients, if they are there."""
        gradients = self.gradients()
        if gradients is not None:
            gradients.accumulates(self.parameter)


def _place(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _zero(gradient: Tensor) -> bool:
    return gradient._nnz() == 0 if gradient.is_sparse else not bool(gradient.any())
