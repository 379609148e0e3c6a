"""Whether a piece of the data runs as the evidence of earlier ones promised; what does not is looked at as a whole.

Each piece is asked cheaply: does its forward go a new way, and do examples that run alone give each layer what they
give it among the others? A layer whose rows are sorted, flipped or packed differs there, whatever its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherviz.capture.calls import Call
from fisherviz.capture.evidence import alone
from fisherviz.capture.network import Network
from fisherviz.capture.ways import ways_of
from fisherviz.capture.witness import COUPLED, Given, asked, differs
from fisherviz.network.batches import Inputs
from fisherviz.support.counting import counted_as


def doubtful(
    network: Network,
    inputs: Inputs,
    z: Tensor,
    calls: Mapping[str, Sequence[Call]],
    first: int,
    given: Mapping[int, Given],
) -> bool:
    """Whether the evidence about a network's layers may not hold for some examples, which have just run.

    Args:
        network: the network, as a guest and with its hooks.
        inputs: the examples.
        z: the output with its graph, (N, ...).
        calls: of the structured layers that ran.
        first: position of the first of them in the data.
        given: what some of them gave the layers alone, by their places; none: two are run.

    Raises:
        RuntimeError: an example's output depends on the other examples.
    """
    with counted_as(0):
        moved = any(
            not _same(made, own.get(name, ()), n)
            for n, own in (given or _alone(network, inputs, z, first)).items()
            for name, made in calls.items()
            if own
        )
    return moved or not ways_of(z) <= network.structure.ways


def _alone(network: Network, inputs: Inputs, z: Tensor, first: int) -> dict[int, Given]:
    """What two examples give the layers on their own; their outputs must be those that they have among the others."""
    found: dict[int, Given] = {}
    for n in asked(len(z), first) if len(z) > 1 else ():
        own, calls = alone(network, inputs, n)
        found[n] = {name: [call.x for call in made] for name, made in calls.items()}
        seen, row = z[n].detach(), own[0].detach()
        if bool(row.isfinite().all()) and bool(seen.isfinite().all()) and differs(seen, row, network.coarsest(z)):
            raise RuntimeError(COUPLED.format(first + n))
    return found


def _same(made: Sequence[Call], alone: Sequence[Tensor], n: int) -> bool:
    """Whether calls were given of an example what the calls of its own were given."""
    if len(made) != len(alone):
        return False
    for call, x in zip(made, alone, strict=True):
        row = call.given_by(n)
        if row is None or row.numel() != x.numel():
            continue  # shared by all, or padded to another length
        exact = x.dtype if x.is_floating_point() else torch.float64
        if differs(row.double(), x.reshape(-1).double(), exact):
            return False
    return True
