"""Which path each layer takes, by evidence: captured gradients against autograd's own, on examples that can tell.

A layer whose weights also act outside its forward, or whose rows are of no known example, goes the generic way.
Outputs that differ between the batch and the single example are an error: there is no Fisher of coupled examples.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from fisherviz.capture.agreement import TOLERANCE, close, noise, weighted_sum
from fisherviz.capture.attribution import attributed
from fisherviz.capture.backward import HIDDEN, backpropagate
from fisherviz.capture.calls import Call, Layout, behind, empty, feeders, placed
from fisherviz.capture.captures import StructuredCapture
from fisherviz.capture.hooks import capture_calls
from fisherviz.capture.network import Network
from fisherviz.capture.per_example import densified, generic_captures
from fisherviz.capture.structure import Structure
from fisherviz.network.batches import Inputs, count_examples, move, take_rows
from fisherviz.network.guest import as_guest, check_modes, lock_of
from fisherviz.network.layers import Layer

ALONE, TOGETHER, SEARCHED = 2, 32, 2048
"""Examples whose gradients are compared one by one, and in their sum; among how many they are chosen."""
LOOKS = 4
"""Batches that are looked at for evidence: a fault may show in later ones alone."""
NOT_EXAMPLES = "it is not known which rows of its input are whose"
PARTLY = "it sees only some of the examples"
ELSEWHERE = "its parameters also act outside its forward, or it mixes the examples"
REENTRANT = "its forward ran inside checkpoint(use_reentrant=True), where nothing sees it; pass use_reentrant=False"


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
        few = _Evidence(network, inputs, order[:ALONE].sort(descending=True).values)
        truths = few.alone()
        # last: a forward that rewrites its weights makes graphs of earlier ones worthless
        many = _Evidence(network, inputs, order[:TOGETHER].sort().values)
        whys, void = many.refuted_by_sums()
        whys |= few.refuted_by(truths)
        if found := many.rearranged(whys):
            few.take(found)
            again = many.refuted_by_sums()[0] | few.refuted_by(truths)
            whys = {name: why for name, why in whys.items() if name not in found or name in again}
        network.settle(_verdict(network.structure, few, whys, void))
        _check_generic(network, few, many, truths)


def look_again(network: Network, inputs: Inputs) -> None:
    """Look for more evidence in another batch: a layer may act elsewhere for some examples only."""
    inputs = move(inputs, network.device)
    with lock_of(network.model), as_guest(network.model), network.hooked():
        before = network.structure
        whys, void = _Evidence(network, inputs, telling_examples(inputs)[:TOGETHER].sort().values).refuted_by_sums()
        undecided = (before.undecided & void) - set(whys)
        network.settle(replace(before.without(whys), looks=before.looks + 1, undecided=undecided))


def _verdict(before: Structure, few: _Evidence, whys: Mapping[str, str], void: frozenset[str]) -> Structure:
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
        example_output=few.z[:1].detach(),
        example_bytes=_bytes(before.without(whys).generic, calls, few.z.element_size()),
    )


class _Evidence:
    """What some examples show in one batch: output, calls, and captures of one random vector."""

    def __init__(self, network: Network, batch: Inputs, rows: Tensor) -> None:
        self.network, self.inputs = network, take_rows(batch, rows)
        with _cut(network, batch):
            self.z, self.calls = network.record(self.inputs)
        network.likelihood.check_output(self.z)
        network.check_finite(self.z, self.calls, 0)
        self.v = noise(self.z, 0)
        self.shares = noise(self.z.new_empty(len(self.z)), 1)
        """Of each example in sums: what is captured as another example's does not pass."""
        self.captures = self._captured(self.calls)

    def _captured(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, StructuredCapture]:
        sound = {name: made for name, made in calls.items() if counts_examples(made)}
        gradients = backpropagate(self.z, sound, self.v.unsqueeze(0), keep=True)
        return {name: capture_calls(sound[name], g) for name, g in gradients.items()}

    def rearranged(self, whys: Mapping[str, str]) -> dict[str, Layout]:
        """Layers whose examples stand elsewhere than first, among those that are refuted if they have them there."""
        names = [name for name, why in whys.items() if why in (NOT_EXAMPLES, ELSEWHERE)]
        found = attributed(self.calls, names, self.z, self.v)
        self.take(layouts(found))
        return layouts(found)

    def take(self, found: Mapping[str, Layout]) -> None:
        """Place the calls of layers anew."""
        calls = placed(self.calls, self.z, layouts(self.calls) | dict(found))
        self.calls |= {name: calls[name] for name in found}
        self.captures |= self._captured({name: calls[name] for name in found})

    def refuted_by_sums(self) -> tuple[dict[str, str], frozenset[str]]:
        """Layers whose captured gradients do not add up to autograd's, with the reason; and those without gradient."""
        whys, void = elsewhere(self.calls, self.z), set()
        truth = self.sums
        for layer in self.network.layers:
            name, capture = layer.name, self.captures.get(layer.name)
            acts = bool(truth[name].any())
            if not layer.structured:
                continue
            if name in self.calls and capture is None:
                whys[name] = NOT_EXAMPLES
            elif capture is None and acts:
                whys[name] = layer.unseen
            elif capture is not None and not close(weighted_sum(capture, self.shares), truth[name]):
                whys[name] = ELSEWHERE
            elif not acts:
                void.add(name)
        return whys, frozenset(void)

    @cached_property
    def sums(self) -> dict[str, Tensor]:
        """Autograd's Σ_n s_n ∇(v_nᵀ z_n) by layer, in unit order, s_n being the examples' shares."""
        v = self.v * self.shares.view(-1, *[1] * (self.v.dim() - 1))
        return _by_layer(self.network, _gradients(self.network, self.z, v))

    def alone(self) -> list[dict[str, Tensor]]:
        """Gradient of v_n's product with each example's own output, by parameter."""
        truths = []
        for n, v in enumerate(self.v):
            own = alone(self.network, self.inputs, n)
            scale = 1 + float(self.z.detach().abs().max())
            allowed = TOLERANCE.get(self.network.coarsest(own), 0.1) * scale
            if float((own[0] - self.z[n]).detach().abs().max()) > allowed:
                raise RuntimeError(
                    f"the model's output for example {n} changes with the other examples of the batch, or at random; "
                    "a Fisher needs independent examples: call model.eval(), or remove what couples them."
                )
            truths.append(_gradients(self.network, own, v.unsqueeze(0)))
        return truths

    def refuted_by(self, truths: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
        """Layers whose captured gradients are not those of the examples alone, with the reason."""
        whys = {name: NOT_EXAMPLES for name in self.calls if name not in self.captures}
        for i, layer in enumerate(self.network.layers):
            if (capture := self.captures.get(layer.name)) is not None:
                own = (self.network.space.gather(i, truth) for truth in truths)
                if not all(close(g, truth) for g, truth in zip(capture.gradients[0], own, strict=True)):
                    whys[layer.name] = ELSEWHERE
        return whys


def glance(network: Network, calls: Mapping[str, Sequence[Call]], z: Tensor) -> None:
    """Decide by what a pass of somebody else's shows, beside the evidence or where there is none.

    Args:
        network: gets the verdict.
        calls: of the layers that ran.
        z: the output, with its graph.
    """
    waiting = [layer for layer in network.structure.layers if layer.structured and layer.name not in calls]
    acting, reentrant = _behind(z) if waiting else (Counter(), False)
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
    found = replace(structure, looked=True, layouts=layouts(kept), positions=positions(kept))
    network.settle(replace(found, neighbours=neighbours(kept), is_chain=_is_chain(z, calls)))


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


def refuse_reentrant(z: Tensor | None) -> None:
    """Raise NotImplementedError where a reentrant checkpoint hides layers behind an output."""
    if z is not None and _behind(z)[1]:
        raise NotImplementedError(HIDDEN)


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


def telling_examples(inputs: Inputs) -> Tensor:
    """Positions of examples, those first on which a fault can show: varied ones, and unlike one another.

    The first is the most varied example, the second the least varied one that is unlike it (padding); then every so
    often one of the rest.
    """
    n = count_examples(inputs)
    among = torch.linspace(0, n - 1, min(n, SEARCHED), device="cpu").round().long()
    variety = torch.zeros(len(among), dtype=torch.float64, device="cpu")
    for leaf in pytree.tree_leaves(take_rows(inputs, among)):
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(among) and leaf.numel():
            rows = leaf.detach().reshape(len(among), -1).cpu()
            variety += torch.nan_to_num((rows[:, 1:] != rows[:, :-1]).sum(1) + (rows != 0).sum(1) / (1 + rows.shape[1]))
    order = among[torch.argsort(variety, descending=True, stable=True)]
    spread = order[torch.linspace(0, len(among) - 1, min(len(among), TOGETHER), device="cpu").round().long()]
    ends = order[[0, -1]] if n > 1 else order
    return torch.cat([ends, spread[~torch.isin(spread, ends)]])


def _gradients(network: Network, z: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Autograd's gradient of vᵀz by parameter, flat."""
    parameters = network.parameters
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if z.requires_grad:
        found = torch.autograd.grad(z, list(parameters.values()), v, retain_graph=True, allow_unused=True)
    return {
        name: p.new_zeros(p.numel()) if g is None else densified(g).detach().reshape(-1)
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def _by_layer(network: Network, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by layer, in unit order."""
    return {layer.name: network.space.gather(i, parts) for i, layer in enumerate(network.layers)}


def alone(network: Network, batch: Inputs, n: int) -> Tensor:
    """Output (1, ...) of one example on its own; of twice the example for models that cannot take a batch of one."""
    with _cut(network, batch):
        try:
            return network.forward(take_rows(batch, torch.tensor([n], device="cpu")))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return network.forward(take_rows(batch, torch.tensor([n, n], device="cpu")))[:1]


@contextlib.contextmanager
def _cut(network: Network, batch: Inputs) -> Iterator[None]:
    """Say where a model takes a whole batch but not some of its examples; what ails the whole batch says it itself."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        network.likelihood.check_output(network.forward(batch))
        raise ValueError(
            f"the model takes the batch of {count_examples(batch)} examples, but not some of them alone ({error}); an "
            "input that belongs to no example, such as a mask (T, T), must not be as long as the batch: keep it in the "
            "model, or use batches of another size."
        ) from error


def _check_generic(network: Network, few: _Evidence, many: _Evidence, truths: Sequence[Mapping[str, Tensor]]) -> None:
    """Batching rules of `vmap` have been found wrong (PReLU, one vector): believe them only where they are right."""
    layers = network.structure.generic
    # a single example is taken twice: later batches may have more
    rows = torch.arange(ALONE, device="cpu") % len(truths)
    inputs, v = take_rows(few.inputs, rows), few.v[rows.to(few.v.device)]
    for count in (1, 2) if layers else ():
        captures = generic_captures(network, layers, inputs, v.expand(count, *v.shape), one_at_a_time=False)
        for layer in layers:
            found = captures[layer.name].gradients
            expected = torch.stack([_by_layer(network, truths[n])[layer.name] for n in rows]).expand(count, -1, -1)
            if found.shape != expected.shape or not close(found, expected):
                network.note(one_at_a_time=True)
                return
    if not _batches_many(network, layers, many):
        network.note(one_at_a_time=True)


def _batches_many(network: Network, layers: Sequence[Layer], many: _Evidence) -> bool:
    """Whether batched derivatives of more examples, some at a time, add up to autograd's."""
    if not layers:
        return True
    totals = {layer.name: many.v.new_zeros(layer.size) for layer in layers}
    n, size = len(many.z), sum(layer.size for layer in layers) * many.z.element_size()
    step = min(n, max(2, network.capture_bytes // size))
    for start in range(0, n, step):
        some = torch.arange(start, min(start + step, n), device=many.v.device)
        v = many.v[some].unsqueeze(0)
        found = generic_captures(network, layers, take_rows(many.inputs, some), v, one_at_a_time=False)
        totals = {name: total + weighted_sum(found[name], many.shares[some]) for name, total in totals.items()}
    return all(close(total, many.sums[name]) for name, total in totals.items())


def counts_examples(calls: Sequence[Call]) -> bool:
    """Whether it is known of every call which rows are whose."""
    return all(call.examples for call in calls)


def layouts(calls: Mapping[str, Sequence[Call]]) -> dict[str, Layout]:
    """Where the examples of each layer stand whose calls all have them in the same place; one example tells nothing."""
    found = {name: {call.layout for call in made} for name, made in calls.items() if made[0].examples > 1}
    return {name: several.pop() for name, several in found.items() if len(several) == 1}


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


def _behind(z: Tensor) -> tuple[Counter[nn.Parameter], bool]:
    """How often an output's graph uses each parameter, and whether reentrant checkpoints hide others."""
    nodes = list(behind(z.grad_fn))
    return _uses(nodes), any(node.name().startswith("CheckpointFunction") for node in nodes)


def _uses(nodes: Iterable[Node]) -> Counter[nn.Parameter]:
    """How often the nodes of a graph use each parameter."""
    there = [node for node in nodes if not empty(node)]
    used = (getattr(following, "variable", None) for node in there for following, _ in node.next_functions)
    return Counter(p for p in used if p is not None)


def _bytes(generic: Sequence[Layer], calls: Mapping[str, Sequence[Call]], item: int) -> tuple[int, int]:
    """Memory of one example's captures: inputs unfolded, and gradients per vector."""
    inputs, outputs = 1, 1 + sum(layer.size for layer in generic)
    for made in calls.values():
        layer = made[0].layer
        width = layer.groups * (layer.d_out if layer.one_hot else layer.da)  # of what is multiplied
        inputs += sum(2 * call.of_one(call.x.shape) if call.one_hot else call.positions * width for call in made)
        outputs += sum(call.of_one(call.shape) for call in made)
    return item * inputs, item * outputs
