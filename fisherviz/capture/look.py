"""Which path each layer takes, by evidence: captured gradients against autograd's own, on examples that can tell.

A layer whose weights also act outside its forward, or whose rows are of no known example, goes the generic way.
Outputs that differ between the batch and the single example are an error: there is no Fisher of coupled examples.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherviz.capture.agreement import noise
from fisherviz.capture.attribution import attributed
from fisherviz.capture.calls import Call, counts_examples, feeders, layouts, placed
from fisherviz.capture.evidence import ALONE, TOGETHER, Evidence, check_generic, telling_examples
from fisherviz.capture.network import Network
from fisherviz.capture.structure import Structure
from fisherviz.capture.uses import NOT_EXAMPLES, REENTRANT, elsewhere, used_behind
from fisherviz.capture.ways import Ways, ways_of
from fisherviz.network.batches import Inputs, count_examples, move, take_rows
from fisherviz.network.guest import as_guest, check_modes, lock_of
from fisherviz.network.layers import Layer


def look(network: Network, inputs: Inputs) -> None:
    """Decide each layer's path on a few examples of a batch, as a guest.

    Args:
        network: gets the verdict.
        inputs: a batch's inputs.

    Raises:
        RuntimeError: an example's output depends on the other examples, or on chance; or a parameter was frozen.
        ValueError: the model is in a mode without a Fisher of single examples, or the output is not finite.
    """
    check_modes(network.model)
    network.check_trainable()
    inputs = move(inputs, network.device)
    order = telling_examples(inputs)
    with lock_of(network.model), as_guest(network.model, weights=True), network.hooked():
        # many as they stand in the batch, few the other way round: layers that sort the examples differ in one of them
        few = Evidence(network, inputs, order[:ALONE].sort(descending=True).values)
        truths = few.alone()
        # last: a forward that rewrites its weights makes graphs of earlier ones worthless
        many = Evidence(network, inputs, order[:TOGETHER].sort().values)
        whys, void = many.refuted_by_sums()
        whys |= few.refuted_by(truths)
        if found := many.rearranged(whys):
            few.take(found)
            again = many.refuted_by_sums()[0] | few.refuted_by(truths)
            whys = {name: why for name, why in whys.items() if name not in found or name in again}
        network.settle(_verdict(network.structure, few, whys, void, ways_of(many.z)))
        check_generic(network, few, many, truths)


def look_again(network: Network, inputs: Inputs) -> None:
    """Look for more evidence in another batch: a layer may act elsewhere for some examples only."""
    inputs = move(inputs, network.device)
    with lock_of(network.model), as_guest(network.model), network.hooked():
        look_at(network, take_rows(inputs, telling_examples(inputs)[:TOGETHER].sort().values))
        network.note(looks=network.structure.looks + 1)


def look_at(network: Network, inputs: Inputs) -> None:
    """Look for more evidence in some examples, all of them.

    Args:
        network: gets the verdict; as a guest and with its hooks.
        inputs: the examples.
    """
    before = network.structure
    evidence = Evidence(network, inputs, torch.arange(count_examples(inputs), device="cpu"))
    whys, void = evidence.refuted_by_sums()
    found = replace(before.without(whys), undecided=(before.undecided & void) - set(whys))
    network.settle(replace(found, ways=before.ways | ways_of(evidence.z)))


def _verdict(before: Structure, few: Evidence, whys: Mapping[str, str], void: frozenset[str], ways: Ways) -> Structure:
    """The structure after a first look; layers without evidence stay undecided until a later look has some."""
    calls = {name: made for name, made in few.calls.items() if name not in whys}
    return replace(
        before.without(whys),
        looked=True,
        looks=1,
        undecided=void - set(whys),
        layouts=layouts(calls),
        positions=positions(calls),
        neighbours=neighbours(few.calls, whys),
        is_chain=_is_chain(few.z, few.calls),
        ways=before.ways | ways_of(few.z) | ways,
        example_output=few.z[:1].detach(),
        example_bytes=_bytes(before.without(whys).generic, calls, few.z.element_size()),
    )


def glance(network: Network, calls: Mapping[str, Sequence[Call]], z: Tensor) -> None:
    """Decide by what a pass of somebody else's shows, beside the evidence or where there is none.

    Args:
        network: gets the verdict.
        calls: of the layers that ran.
        z: the output, with its graph.
    """
    waiting = [layer for layer in network.structure.layers if layer.structured and layer.name not in calls]
    acting, reentrant = used_behind(z) if waiting else (Counter(), False)
    calls = placed(calls, z, network.structure.layouts)
    if not network.structure.looked:
        unknown = [name for name, made in calls.items() if not counts_examples(made)]
        calls |= attributed(calls, unknown, z, noise(z, 0))
    whys = elsewhere(calls, z) | {name: NOT_EXAMPLES for name, made in calls.items() if not counts_examples(made)}
    for layer in waiting:
        if any(p in acting for p in layer.parameters.values()):
            whys[layer.name] = layer.unseen
        elif reentrant:
            whys[layer.name] = REENTRANT
    structure = network.structure.without(whys)
    gone = {layer.name for layer in structure.generic}
    kept = {name: made for name, made in calls.items() if name not in gone}
    ways = structure.ways | ways_of(z)
    found = replace(structure, looked=True, layouts=layouts(kept), positions=positions(kept), ways=ways)
    network.settle(replace(found, neighbours=neighbours(kept), is_chain=_is_chain(z, calls)))


def late(known: Container[str], calls: Mapping[str, Sequence[Call]], z: Tensor) -> dict[str, int]:
    """Weight-sharing positions of layers that run for the first time in a later pass.

    Args:
        known: names of the layers that have run.
        calls: of the structured layers that ran now.
        z: the output.

    Raises:
        RuntimeError: such a layer has no structure, which can only be told at the first pass.
    """
    new = {name: made for name, made in calls.items() if made[0].layer.structured and name not in known}
    for name, made in new.items():
        if not counts_examples(made):
            raise RuntimeError(
                f"layer {name!r} ran for the first time after the first pass, and {NOT_EXAMPLES}; put it in a group "
                "with approximation='none', or make it run in the first pass."
            )
    return positions(new)


def positions(calls: Mapping[str, Sequence[Call]]) -> dict[str, int]:
    """Weight-sharing positions of each structured layer that ran."""
    return {name: sum(call.positions for call in made) for name, made in calls.items()}


def neighbours(calls: Mapping[str, Sequence[Call]], gone: Container[str] = ()) -> tuple[tuple[str, str], ...]:
    """Layers with factors that follow one another in execution; a module called twice, or gone, breaks the chain."""
    single = {name for name, made in calls.items() if len(made) == 1 and name not in gone}
    coupled = [name for name, made in calls.items() if made[0].layer.factors]
    return tuple((a, b) for a, b in itertools.pairwise(coupled) if a in single and b in single)


def _is_chain(z: Tensor, calls: Mapping[str, Sequence[Call]]) -> bool:
    """Whether every layer with factors is fed by the one before it alone, and the output by the last."""
    calls = {name: made for name, made in calls.items() if made[0].layer.factors}
    flat = [call for made in calls.values() for call in made]
    if not flat or any(len(made) > 1 for made in calls.values()):
        return False
    expected: list[set[str]] = [set(), *({call.layer.name} for call in flat)]
    sources = [*(call.source for call in flat), z.grad_fn]
    return all(feeders(source, flat) == names for source, names in zip(sources, expected, strict=True))


def _bytes(generic: Sequence[Layer], calls: Mapping[str, Sequence[Call]], item: int) -> tuple[int, int]:
    """Memory of one example's captures: inputs unfolded, and gradients per vector."""
    inputs, outputs = 1, 1 + sum(layer.size for layer in generic)
    for made in calls.values():
        layer = made[0].layer
        width = layer.groups * (layer.d_out if layer.one_hot else layer.da)  # of what is multiplied
        inputs += sum(2 * call.of_one(call.x.shape) if call.one_hot else call.positions * width for call in made)
        outputs += sum(call.of_one(call.shape) for call in made)
    return item * inputs, item * outputs
