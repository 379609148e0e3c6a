"""Which uses of parameters an output's graph holds, beside those that the calls of their layers explain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.autograd.graph import Node

from fisherviz.capture.backward import HIDDEN
from fisherviz.capture.calls import Call, behind, empty
from fisherviz.network.layers import Layer

NOT_EXAMPLES = "it is not known which rows of its input are whose"
PARTLY = "it sees only some of the examples"
ELSEWHERE = "its parameters also act outside its forward, or it mixes the examples"
REENTRANT = "its forward ran inside checkpoint(use_reentrant=True), where nothing sees it; pass use_reentrant=False"


def elsewhere(calls: Mapping[str, Sequence[Call]], z: Tensor) -> dict[str, str]:
    """Layers whose parameters an output's graph uses more often than it has calls of them, whatever examples show."""
    nodes = set(behind(z.grad_fn))
    uses = _uses(nodes)
    seen = {name: sum(call.edge.node in nodes for call in made) for name, made in calls.items()}
    return {
        name: ELSEWHERE
        for name, made in calls.items()
        if any(uses[p] > seen[name] for p in made[0].layer.parameters.values())
    }


def acts_unseen(layers: Iterable[Layer], calls: Mapping[str, Sequence[Call]], z: Tensor) -> bool:
    """Whether an output depends on a structured layer's parameters in a way that no call of the layer shows.

    Args:
        layers: all.
        calls: of the structured layers that ran.
        z: the output, with its graph.
    """
    waiting = [layer for layer in layers if layer.structured and layer.name not in calls]
    acting = used_behind(z)[0] if waiting else Counter[nn.Parameter]()
    return bool(elsewhere(calls, z)) or any(p in acting for layer in waiting for p in layer.parameters.values())


def refuse_reentrant(z: Tensor | None) -> None:
    """Raise NotImplementedError where a reentrant checkpoint hides layers behind an output."""
    if z is not None and used_behind(z)[1]:
        raise NotImplementedError(HIDDEN)


def used_behind(z: Tensor) -> tuple[Counter[nn.Parameter], bool]:
    """How often an output's graph uses each parameter, and whether reentrant checkpoints hide others."""
    nodes = list(behind(z.grad_fn))
    return _uses(nodes), any(node.name().startswith("CheckpointFunction") for node in nodes)


def _uses(nodes: Iterable[Node]) -> Counter[nn.Parameter]:
    """How often the nodes of a graph use each parameter."""
    there = [node for node in nodes if not empty(node)]
    used = (getattr(following, "variable", None) for node in there for following, _ in node.next_functions)
    return Counter(p for p in used if p is not None)
