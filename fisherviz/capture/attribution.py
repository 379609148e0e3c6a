"""Which example each row of a layer is of, where examples are not its first axis: by gradients that must vanish.

Noise is backpropagated from some of the examples' outputs at a time. A row is of an example only if it has a gradient
where that example takes part, and none where it does not; so many subsets tell all examples apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherviz.capture.backward import backpropagate
from fisherviz.capture.calls import Call, Graph, Layout, rearranged


def attributed(
    calls: Mapping[str, Sequence[Call]], names: Iterable[str], z: Tensor, noise: Tensor
) -> dict[str, list[Call]]:
    """The calls of some layers in the layout that their gradients bear out; layers without one are left out.

    Args:
        calls: by layer name, all that ran.
        names: of the layers that do not have their examples first.
        z: the output with its graph, (N, ...), which is kept.
        noise: like the output.
    """
    n = len(z) if z.dim() else 1
    wanted = {name for name in names if name in calls and all(call.stacked for call in calls[name])}
    asked = {name: [_unplaced(call) for call in made] for name, made in calls.items() if name in wanted}
    if n < 2 or not asked:
        return {}
    graph = Graph(z)
    graph.known = {
        call.edge.node for name, made in calls.items() if name not in asked for call in made if call.examples
    }
    taking_part = subsets(n, z.device)
    rows = _with_gradient(asked, z, noise, taking_part)
    found = {}
    for name, made in asked.items():  # as they ran
        for layout in (Layout.SECOND, Layout.MERGED):
            tried = [rearranged(call, graph, layout) for call in made]
            shown = zip(tried, rows[name], strict=True)
            if all(call.examples and _borne_out(call.by_example(there, 1), taking_part) for call, there in shown):
                found[name] = tried
                graph.known |= {call.edge.node for call in tried}
                break
    return found


def _unplaced(call: Call) -> Call:
    return replace(call, layout=Layout.FIRST, examples=0, joins=())


def _with_gradient(
    calls: Mapping[str, Sequence[Call]], z: Tensor, noise: Tensor, taking_part: Tensor
) -> dict[str, list[Tensor]]:
    """Which rows (K, L, T) of each call have a gradient, for each subset; outputs may be large: one after another."""
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in made] for name, made in calls.items()}
    for some in taking_part:
        v = noise * some.view(-1, *[1] * (z.dim() - 1))
        for name, gradients in backpropagate(z, calls, v.unsqueeze(0), keep=True).items():
            for call, g, there in zip(calls[name], gradients, found[name], strict=True):
                there.append((call.output_gradients(g) != 0).flatten(3).any(3))
    return {name: [torch.cat(there) for there in made] for name, made in found.items()}


def subsets(n: int, device: torch.device) -> Tensor:
    """Subsets of n examples, (2 log n, n), such that each example is in one without any given other."""
    bits = torch.arange(max(1, (n - 1).bit_length()), device=device).unsqueeze(1)
    there = (torch.arange(n, device=device) >> bits) % 2 == 1
    return torch.cat([there, ~there])


def _borne_out(there: Tensor, taking_part: Tensor) -> bool:
    """Whether rows (K, N, T) have a gradient only where their example takes part, and some of two examples do."""
    there = there.any(2)
    return not bool((there & ~taking_part).any()) and int(there.any(0).sum()) > 1
