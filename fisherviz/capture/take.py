"""Captures of a batch, in pieces that fit the memory meant for them; the only way from inputs to captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fisherviz.capture.agreement import noise
from fisherviz.capture.backward import backpropagate
from fisherviz.capture.batch import Batch
from fisherviz.capture.calls import Call, counts_examples
from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.doubts import doubtful
from fisherviz.capture.hooks import absent, capture_calls
from fisherviz.capture.look import look, look_again, look_at
from fisherviz.capture.network import Network
from fisherviz.capture.per_example import confirmed_captures, densified, generic_captures
from fisherviz.capture.reach import indicators, marked
from fisherviz.capture.slopes import with_slopes
from fisherviz.capture.structure import PathChanged, Structure
from fisherviz.capture.uses import PARTLY, elsewhere
from fisherviz.capture.ways import FIRST, is_due
from fisherviz.capture.witness import Witness
from fisherviz.network.batches import Inputs, count_examples, move, select
from fisherviz.network.guest import as_guest, check_modes, lock_of
from fisherviz.network.vectors import checked_counts
from fisherviz.support.counting import counted_as
from fisherviz.support.memory import at_once

TOGETHER = 8
"""Vectors of an example that are taken together, at least, before examples are taken alone."""


class VectorSource(Protocol):
    """The vectors that are backpropagated from an output: what the kind of a Fisher comes down to."""

    def start(self, first: int, examples: int) -> None:
        """Announce a batch that may come in pieces."""

    def count(self, z: Tensor) -> int:
        """Number K of vectors per example."""

    def part(self, z: Tensor, targets: Tensor | None, first: int, start: int, stop: int) -> Tensor:
        """Some of the vectors (K, N, ...), scaled so that the sum of their outer products is the output Fisher."""


def take(
    network: Network,
    inputs: Inputs,
    targets: Tensor | None,
    vectors: VectorSource,
    consume: Callable[[Batch], None],
    witness: Witness,
    first: int = 0,
    share: tuple[int, int] | None = None,
) -> int:
    """Hand a batch's captures to a consumer, piece by piece.

    Args:
        network: the network.
        inputs: the batch's inputs.
        targets: its targets, if `vectors` needs them.
        vectors: the vectors to backpropagate.
        consume: called with each `Batch`.
        witness: of the data's outputs.
        first: position of the batch's first example in the data.
        share: the range of the examples that are taken, where other processes take the others; None: all.

    Returns:
        The number of examples of the whole batch, all of which evidence and labels are drawn from.

    Raises:
        ValueError: the model is in a mode without a Fisher, or an activation is not finite.
        RuntimeError: examples are coupled or the model is random, or a parameter was frozen.
        PathChanged: a layer has no structure after all.
    """
    check_modes(network.model)
    network.check_trainable()
    inputs = move(inputs, network.device)
    n = count_examples(inputs)
    low, high = share or (0, n)
    with lock_of(network.model), as_guest(network.model, weights=not network.structure.looked):
        with counted_as(0):  # evidence
            _look(network, inputs, witness, witness.number(first + low))
        with network.hooked():
            step, most = _piece(network, vectors)
            vectors.start(first, n)
            if low < high:
                witness.see(network, select(inputs, low, high), first + low)
            for start in range(low, high, step):
                stop = min(start + step, high)
                part = None if targets is None else targets[start:stop]
                some = select(inputs, start, stop)
                z, calls = network.record(some)
                witness.confirm(network, z, first + start)
                for batch in _captured(network, some, part, z, calls, vectors, first + start, most):
                    consume(batch)
                # last: a forward that rewrites its weights makes graphs of earlier ones worthless
                seen = first + low in witness.alone
                if witness.turns(first + start, len(z)) and doubtful(network, some, z, calls, first + start, seen=seen):
                    _look_closer(network, some)
    return n


def _look(network: Network, inputs: Inputs, witness: Witness, number: int) -> None:
    """Look at a network that has not run yet, and again at some more batches of the data."""
    before, new = network.structure, witness.looks(number)
    if not before.looked:
        look(network, inputs)
    elif not new:
        return
    elif (before.looks < FIRST and (number > 0 or before.undecided)) or (number >= FIRST and is_due(number)):
        look_again(network, inputs)
    _settled(network, before)


def _look_closer(network: Network, inputs: Inputs) -> None:
    """Look at all examples of a piece of which the evidence may not hold."""
    before = network.structure
    with counted_as(0):
        look_at(network, inputs)
    _settled(network, before)


def _settled(network: Network, before: Structure) -> None:
    if network.structure.generic != before.generic:
        raise PathChanged(network.structure)


def _piece(network: Network, vectors: VectorSource) -> tuple[int, int]:
    """Examples and vectors per piece, so that the captures of a piece stay below the network's limit.

    All vectors, as long as those of one example fit; otherwise a few, of as many examples as fit.
    """
    fixed, per_vector = network.structure.example_bytes
    fixed += per_vector * network.slopes  # no more of them than of gradients
    k = vectors_of_one(network, vectors)
    limit = at_once(network.capture_bytes, torch.empty(0, dtype=torch.uint8, device=network.device))
    if fixed + per_vector * k <= limit:
        return limit // (fixed + per_vector * k), max(1, k)
    examples = max(1, limit // (fixed + TOGETHER * per_vector))
    return examples, max(1, (limit // examples - fixed) // per_vector)


def vectors_of_one(network: Network, vectors: VectorSource) -> int:
    """Number K of vectors of an example, of a network that has been looked at."""
    z = network.structure.example_output
    assert z is not None
    return vectors.count(z)


def _captured(
    network: Network,
    inputs: Inputs,
    targets: Tensor | None,
    z: Tensor,
    calls: Mapping[str, Sequence[Call]],
    vectors: VectorSource,
    first: int,
    most: int,
) -> Iterator[Batch]:
    """Captures of some examples, of at most so many vectors at a time."""
    n = len(z)
    network.likelihood.check_output(z)
    if not z.requires_grad:
        raise RuntimeError(
            "the model's output does not depend on the probed parameters; "
            "is its forward under torch.no_grad(), or detached?"
        )
    _check_paths(network, z, calls)
    network.check_finite(z, calls, first)
    counted, k = checked_counts(network.likelihood, z, targets), vectors.count(z)
    forming = network.structure.forming(vectors_of_one(network, vectors))
    for start in range(0, max(1, k), most):
        stop = min(start + most, k)
        v = vectors.part(z.detach(), targets, first, start, stop)
        layers = network.structure.generic
        found = confirmed_captures(network, layers, inputs, z, v) if layers and len(v) else {}
        captures = shown(network, inputs, z, calls, v, counted, generic=False, keep=stop < k)
        captures |= {name: capture.to(network.precision) for name, capture in found.items()}
        for layer in network.layers:
            if layer.name not in captures:
                captures[layer.name] = absent(layer, len(v), n, z).to(network.precision)
        yield Batch({layer.name: captures[layer.name] for layer in network.layers}, n, first, start > 0, forming)


def shown(
    network: Network,
    inputs: Inputs,
    z: Tensor,
    calls: Mapping[str, Sequence[Call]],
    v: Tensor,
    counted: Tensor | None = None,
    *,
    generic: bool = True,
    keep: bool = False,
) -> dict[str, AnyCapture]:
    """What a forward pass shows of the layers that it ran, and of those without structure.

    Args:
        network: the network.
        inputs: the batch's inputs.
        z: the output with its graph, (N, ...).
        calls: of the structured layers.
        v: vectors to backpropagate, (K, N, ...), zero at positions that do not count.
        counted: positions (N, ...) of the output that count; None: all.
        generic: whether layers without structure are wanted.
        keep: whether the graph is needed afterwards.
    """
    calls = with_slopes(calls) if network.slopes else calls
    u = v if counted is None else torch.cat([v, indicators(network.likelihood, z.detach(), counted)])
    found_at = backpropagate(z, calls, u, keep=keep)
    made = {name: capture_calls(calls[name], gradients) for name, gradients in found_at.items()}
    found: dict[str, AnyCapture] = {name: c if counted is None else marked(c, counted) for name, c in made.items()}
    layers = network.structure.generic
    if generic and layers and len(v):
        found |= generic_captures(network, layers, inputs, v)
    return {name: capture.to(network.precision) for name, capture in found.items()}


def _check_paths(network: Network, z: Tensor, calls: Mapping[str, Sequence[Call]]) -> None:
    """Layers that see only some of the examples (a mixture of experts), or act without having run, are generic."""
    whys = elsewhere(calls, z) | {name: PARTLY for name, made in calls.items() if not counts_examples(made)}
    for layer in network.layers:
        if layer.structured and layer.name not in calls:
            own = list(layer.parameters.values())
            found = torch.autograd.grad(z, own, noise(z, 0), retain_graph=True, allow_unused=True)
            if any(g is not None and bool(densified(g).any()) for g in found):
                whys[layer.name] = layer.unseen
    if whys:
        raise PathChanged(network.structure.without(whys))


def loss_gradient(network: Network, inputs: Inputs, targets: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of a batch's mean loss by one forward+backward pass; without targets, of the output's mean."""
    check_modes(network.model)
    network.check_trainable()
    inputs = move(inputs, network.device)
    with as_guest(network.model):
        z = network.forward(inputs)
        network.likelihood.check_output(z)
        loss = z.mean() if targets is None else network.likelihood.nll(z, targets).mean()
        return torch.autograd.grad(loss, list(network.parameters.values()), allow_unused=True)
