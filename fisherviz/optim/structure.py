"""Which layers have structure: decided at the first pass for those that it shows, for the others when they first run.

A layer whose parameters act without a call of its module is generic; one that took no part at all stays undecided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from torch.autograd.graph import Node

from fisherviz.capture.hooks import Call
from fisherviz.network.layers import Layer
from fisherviz.optim.averages import positions_and_neighbours

NOT_EXAMPLES = "the first dimension of its input does not count examples"
REENTRANT = "its forward ran inside checkpoint(use_reentrant=True), where nothing sees it; pass use_reentrant=False"
ACTS = "its forward did not run in the first pass, but its parameters act"


def decide(layers: Sequence[Layer], calls: Mapping[str, Sequence[Call]], z: Tensor) -> None:
    """Make generic what the first pass shows to have no structure.

    Args:
        layers: all layers.
        calls: of the layers that ran.
        z: the output, with its graph.
    """
    waiting = [layer for layer in layers if layer.structured and layer.name not in calls]
    acting, reentrant = _behind(z) if waiting else (set(), False)
    for layer in waiting:
        if any(p in acting for p in layer.parameters.values()):
            layer.make_generic(ACTS)
        elif reentrant:
            layer.make_generic(REENTRANT)
    for made in calls.values():
        if made[0].layer.structured and not _counts(made, z):
            made[0].layer.make_generic(NOT_EXAMPLES)


def later(known: Collection[str], calls: Mapping[str, Sequence[Call]], z: Tensor) -> dict[str, int]:
    """Weight-sharing positions of layers that run for the first time.

    Args:
        known: names of the layers that have run.
        calls: of the layers that ran now.
        z: the output.

    Raises:
        RuntimeError: such a layer has no structure, which can only be told at the first pass.
    """
    new = {name: made for name, made in calls.items() if made[0].layer.structured and name not in known}
    for name, made in new.items():
        if not _counts(made, z):
            raise RuntimeError(
                f"layer {name!r} ran for the first time after the first pass, and {NOT_EXAMPLES}; put it in a group "
                "with approximation='none', or make it run in the first pass."
            )
    return positions_and_neighbours(new)[0]


def _counts(calls: Sequence[Call], z: Tensor) -> bool:
    """Whether the first dimension of every input and output counts the examples."""
    examples = len(z) if z.dim() else 1
    return all(call.x.shape[:1] == (examples,) and call.shape[0] == examples for call in calls)


def _behind(z: Tensor) -> tuple[set[nn.Parameter], bool]:
    """The parameters in an output's graph, and whether reentrant checkpoints hide others."""
    found: set[nn.Parameter] = set()
    hidden = False
    pending: list[Node | None] = [z.grad_fn]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        hidden = hidden or node.name().startswith("CheckpointFunction")
        if hasattr(node, "variable"):
            found.add(node.variable)
        pending += [following for following, _ in node.next_functions]
    return found, hidden
