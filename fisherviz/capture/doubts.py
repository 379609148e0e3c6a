"""Whether a piece of the data runs as the evidence of earlier ones promised; what does not is looked at as a whole.

Each piece is asked cheaply: does its forward go a new way, and do examples that run alone give each layer what they
give it among the others? A layer whose rows are sorted, flipped or packed differs there, whatever its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherviz.capture.calls import Call
from fisherviz.capture.network import Network
from fisherviz.capture.ways import ways_of
from fisherviz.capture.witness import COUPLED, asked, differs
from fisherviz.network.batches import Inputs, count_examples, take_rows
from fisherviz.support.counting import counted_as


def doubtful(network: Network, inputs: Inputs, z: Tensor, calls: Mapping[str, Sequence[Call]], first: int) -> bool:
    """Whether the evidence about a network's layers may not hold for some examples, which have just run.

    Args:
        network: the network, as a guest and with its hooks.
        inputs: the examples.
        z: the output with its graph, (N, ...).
        calls: of the structured layers that ran.
        first: position of the first of them in the data.

    Raises:
        RuntimeError: an example's output depends on the other examples.
    """
    with counted_as(0):
        return _moved(network, inputs, z, calls, first) or not ways_of(z) <= network.structure.ways


def _moved(network: Network, inputs: Inputs, z: Tensor, calls: Mapping[str, Sequence[Call]], first: int) -> bool:
    """Whether an example gives some layer other inputs alone than among the others."""
    count = count_examples(inputs)
    if count < 2:
        return False
    for n in asked(count, first):
        try:
            own, alone = network.record(take_rows(inputs, torch.tensor([n], device="cpu")))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # a model that cannot take a batch of one: the witness has asked it otherwise
        if (
            bool(own.isfinite().all())
            and bool(z[n].isfinite().all())
            and differs(z[n].detach(), own[0].detach(), network.coarsest(z))
        ):
            raise RuntimeError(COUPLED.format(first + n))
        if any(not _same(made, alone.get(name, ()), n) for name, made in calls.items()):
            return True
    return False


def _same(made: Sequence[Call], alone: Sequence[Call], n: int) -> bool:
    """Whether calls were given of an example what the calls of its own were given."""
    if len(made) != len(alone):
        return False
    for call, own in zip(made, alone, strict=True):
        row = call.given_by(n)
        if row is None or row.numel() != own.x.numel():
            continue  # shared by all, or padded to another length
        exact = own.x.dtype if own.x.is_floating_point() else torch.float64
        if differs(row.double(), own.x.reshape(-1).double(), exact):
            return False
    return True
