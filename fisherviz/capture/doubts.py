"""Whether a piece of the data runs as the evidence of earlier ones promised; what does not is looked at as a whole.

Each piece runs once more the other way round, forward only: every example must have the output that it had, and give
each layer what it gave. Layers whose rows are sorted, packed or exchanged, or are positions and no examples, differ
there whatever their graph, as do models that couple examples by their order. A new way is doubted, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherviz.capture.calls import Call
from fisherviz.capture.evidence import COUPLED, alone
from fisherviz.capture.network import Network
from fisherviz.capture.ways import ways_of
from fisherviz.capture.witness import ROUNDING, SMALL, largest_of
from fisherviz.network.batches import Inputs, take_rows
from fisherviz.support.counting import counted_as


def doubtful(
    network: Network, inputs: Inputs, z: Tensor, calls: Mapping[str, Sequence[Call]], first: int, *, seen: bool = False
) -> bool:
    """Whether the evidence about a network's layers may not hold for some examples, which have just run.

    Args:
        network: the network, as a guest and with its hooks.
        inputs: the examples.
        z: the output (N, ...).
        calls: of the structured layers that ran.
        first: position of the first of the examples in the data.
        seen: whether the witness has run some examples of their batch alone; otherwise one is.

    Raises:
        RuntimeError: an example's output depends on the other examples.
    """
    with counted_as(0):
        turned = require_independent(network, inputs, z, first, seen=seen)
    moved = turned is not None and (
        calls.keys() != turned.keys() or not all(_same(made, turned[name]) for name, made in calls.items())
    )
    return moved or not ways_of(z) <= network.structure.ways


def require_independent(
    network: Network, inputs: Inputs, z: Tensor, first: int, *, seen: bool = False
) -> dict[str, list[Call]] | None:
    """Refuse examples whose outputs depend on the others or on their order; see `doubtful`.

    Returns:
        The calls of the structured layers, the examples the other way round; None where there is one example.
    """
    count = len(z)
    if count < 2:
        return None
    again, turned = network.record(take_rows(inputs, torch.arange(count - 1, -1, -1, device="cpu")))
    _require_same(network, z, again.detach().flip(0), first)
    if not seen:
        n = (first // count * 7 + count // 3) % count  # another in every piece
        _require_same(network, z[n : n + 1], alone(network, inputs, n), first + n, largest_of(z))
    return turned


def _require_same(network: Network, z: Tensor, again: Tensor, first: int, largest: float = 0.0) -> None:
    """Refuse an example that has another output among other examples, or in another order."""
    z, again = z.detach(), again.detach()
    if z.shape != again.shape:
        raise RuntimeError(COUPLED.format(first))
    allowed = ROUNDING.get(network.coarsest(z), 0.1) * max(SMALL, largest or largest_of(z))
    wrong = ~((again.flatten(1) - z.flatten(1)).abs_().amax(1) <= allowed)
    if bool(wrong.any()):
        raise RuntimeError(COUPLED.format(first + int(wrong.nonzero()[0])))


def _same(made: Sequence[Call], turned: Sequence[Call]) -> bool:
    """Whether calls were given of each example what they were given when the examples ran the other way round."""
    if len(made) != len(turned):
        return False
    for call, other in zip(made, turned, strict=True):
        rows, again = call.given, other.given
        if rows is None or again is None or rows.shape != again.shape:
            if rows is not again:
                return False
        elif not _alike(rows, again.flip(0)):
            return False
    return True


def _alike(rows: Tensor, again: Tensor) -> bool:
    """Whether inputs are the same up to rounding; the second may be written into."""
    if not rows.is_floating_point() or not rows.numel():
        return torch.equal(rows, again)
    allowed = ROUNDING.get(rows.dtype, 0.1) * largest_of(rows)
    return largest_of(again.sub_(rows), 0.0) <= allowed
