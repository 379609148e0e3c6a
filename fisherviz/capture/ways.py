"""Which ways a model's forward goes: evidence about one of them says nothing of another.

A way is which operation's output goes into which, whatever the shapes and however often: a later batch that sorts its
rows, skips a layer or takes another branch differs in it, one that is longer does not.
"""

from __future__ import annotations

from torch import Tensor

from fisherviz.capture.calls import behind

Ways = frozenset[tuple[str, str]]
"""Pairs of names of nodes that follow one another in a graph."""

FIRST = 4
"""Batches that are looked at in any case; then those at the powers of two."""


def ways_of(z: Tensor) -> Ways:
    """What follows what in an output's graph."""
    found = set[tuple[str, str]]()
    for node in behind(z.grad_fn):
        name = node.name()
        found.update((name, before.name()) for before, _ in node.next_functions if before is not None)
    return frozenset(found)


def is_due(batch: int) -> bool:
    """Whether a batch is looked at without any doubt, by its number from zero."""
    return batch < FIRST or (batch + 1).bit_count() == 1
