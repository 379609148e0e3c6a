"""Which example each row of a layer is of, where examples are not its first axis: by gradients that must vanish.

Noise is backpropagated from some of the examples' outputs at a time. A row is of an example only if it has a gradient
where that example takes part, and none where it does not; so many subsets tell all examples apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
    wanted = set(names)
    asked = {name: made for name, made in calls.items() if name in wanted}  # as they ran
    if n < 2 or not asked:
        return {}
    graph = Graph(z)
    graph.known = {
        call.edge.node for name, made in calls.items() if name not in asked for call in made if call.examples
    }
    taking_part = subsets(n, z.device)
    gradients = backpropagate(z, asked, noise * taking_part.view(*taking_part.shape, *[1] * (z.dim() - 1)), keep=True)
    found = {}
    for name, made in asked.items():
        for layout in (Layout.SECOND, Layout.MERGED):
            tried = [rearranged(call, graph, layout) for call in made]
            shown = zip(tried, gradients[name], strict=True)
            if all(call.examples and _borne_out(call.output_gradients(g), taking_part) for call, g in shown):
                found[name] = tried
                graph.known |= {call.edge.node for call in tried}
                break
    return found


def subsets(n: int, device: torch.device) -> Tensor:
    """Subsets of n examples, (2 log n, n), such that each example is in one without any given other."""
    bits = torch.arange(max(1, (n - 1).bit_length()), device=device).unsqueeze(1)
    there = (torch.arange(n, device=device) >> bits) % 2 == 1
    return torch.cat([there, ~there])


def _borne_out(g: Tensor, taking_part: Tensor) -> bool:
    """Whether gradients (K, N, ...) vanish where an example does not take part, and not where two and more do."""
    there = (g != 0).flatten(2).any(2)
    return not bool((there & ~taking_part).any()) and int(there.any(0).sum()) > 1
