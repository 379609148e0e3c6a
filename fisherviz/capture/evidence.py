"""What some examples of a batch show of a network's layers: captured gradients against autograd's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherviz.capture.agreement import TOLERANCE, close, noise, weighted_sum
from fisherviz.capture.attribution import attributed
from fisherviz.capture.backward import backpropagate
from fisherviz.capture.calls import Call, Layout, counts_examples, layouts, placed
from fisherviz.capture.captures import StructuredCapture
from fisherviz.capture.hooks import capture_calls
from fisherviz.capture.network import Network
from fisherviz.capture.per_example import densified, generic_captures
from fisherviz.capture.uses import ELSEWHERE, NOT_EXAMPLES, elsewhere
from fisherviz.network.batches import Inputs, count_examples, take_rows
from fisherviz.network.layers import Layer

ALONE, TOGETHER, SEARCHED = 2, 32, 2048
"""Examples whose gradients are compared one by one, and in their sum; among how many they are chosen."""
COUPLED = (
    "the model's output for example {} changes with the other examples of the batch, or at random; "
    "a Fisher needs independent examples: call model.eval(), or remove what couples them."
)


class Evidence:
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
            if own.shape[1:] != self.z.shape[1:]:
                raise ValueError(
                    f"the model's output for an example alone has shape {tuple(own.shape)}, among others "
                    f"{tuple(self.z.shape)}: it is as long as the longest of the batch; give it one length in the "
                    "model, such as pad_packed_sequence(..., total_length=x.shape[1])."
                )
            allowed = TOLERANCE.get(self.network.coarsest(own), 0.1) * scale
            if float((own[0] - self.z[n]).detach().abs().max()) > allowed:
                raise RuntimeError(COUPLED.format(n))
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


def check_generic(network: Network, few: Evidence, many: Evidence, truths: Sequence[Mapping[str, Tensor]]) -> None:
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


def _batches_many(network: Network, layers: Sequence[Layer], many: Evidence) -> bool:
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


def alone(network: Network, batch: Inputs, n: int) -> Tensor:
    """Output (1, ...) of one example on its own; ValueError where a model takes a whole batch, but no part of it."""
    with _cut(network, batch):
        return network.alone(batch, n)


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
