"""Which of the user's backwards leave gradients in `.grad`, and which of those gradients were dropped since.

Told by evidence alone, from what autograd is about to run and from the gradients themselves: `zero_grad()` of the
model, of any optimizer, and `p.grad = None` look alike. Reads `.grad`, never writes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fisherviz.capture.network import Network
from fisherviz.network.layers import Layer

State = tuple[Tensor, int] | None
"""A parameter's `.grad` with its version; None: there is none."""


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
    """What backwards have left in the layers' `.grad` since the last step.

    Args:
        network: the network with the layers.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._left: dict[nn.Parameter, State] = {}
        """As the last backward left them."""
        self._by_hand: set[str] = set()
        """Layers whose gradients since the last step were all returned by `torch.autograd.grad`."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, on their present paths."""
        return self.network.layers

    def states(self) -> dict[nn.Parameter, State]:
        """All gradients as they stand."""
        return {p: state_of(p) for layer in self.layers for p in layer.parameters.values()}

    def dropped(self) -> set[str]:
        """Names of the layers whose earlier gradients are gone as a backward begins that accumulates."""
        gone, self._by_hand = self._by_hand, set()  # what this backward leaves explains `.grad`
        if self._left:  # zeros are looked for in gradients only that were written since
            gone |= {layer.name for layer in self.layers if all(map(self._empty, layer.parameters.values()))}
        return gone

    def _empty(self, p: nn.Parameter) -> bool:
        now = state_of(p)
        if now is None or (p in self._left and same(now, self._left[p])):
            return now is None
        return now[0]._nnz() == 0 if now[0].is_sparse else not bool(now[0].any())

    def written(self, before: Mapping[nn.Parameter, State], ran: Collection[str]) -> set[str]:
        """Names of the layers that a backward has left a gradient in.

        Args:
            before: the states when it began.
            ran: names of the layers that its forward ran.
        """
        now = self.states()
        self._left |= {p: state for p, state in now.items() if not same(state, before[p])}
        return {
            layer.name
            for layer in self.layers
            if (layer.name in ran or not layer.structured)
            and any(not same(now[p], before[p]) for p in layer.parameters.values())
        }

    def without(self) -> set[str]:
        """Names of the layers that have no gradient at all."""
        return {layer.name for layer in self.layers if all(p.grad is None for p in layer.parameters.values())}

    def returned(self, ran: Collection[str]) -> set[str]:
        """Names of the layers whose gradients the user has in hand, and no backward has left any in `.grad`."""
        found = {
            layer.name
            for layer in self.layers
            if (layer.name in ran or not layer.structured)
            and not any(p in self._left for p in layer.parameters.values())
        }
        self._by_hand |= found
        return found

    def forget(self) -> None:
        """Start anew after a step."""
        self._left, self._by_hand = {}, set()
