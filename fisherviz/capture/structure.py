"""Which path each layer takes, decided by evidence: captured gradients of two examples against autograd's own.

A layer whose weights also act outside its forward, or whose first dimension is not the batch, goes the generic way.
Outputs that differ between the batch and the single example are an error: there is no Fisher of coupled examples.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherviz.capture.hooks import Call, capture_calls, feeders
from fisherviz.capture.per_example import densified
from fisherviz.network.batches import Inputs, select
from fisherviz.network.layers import Layer

if TYPE_CHECKING:
    from fisherviz.probe import Probe

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
"""Relative differences that rounding explains, by type; 0.1 for the half precisions."""


class PathChanged(Exception):
    """A layer left the structured path in the middle of a pass: what was summed so far must be summed again."""


def restarting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method again when a layer's path changed under it; each time, one layer fewer is structured."""

    @functools.wraps(method)
    def again(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return method(*args, **kwargs)
            except PathChanged:
                continue

    return again


@dataclass(frozen=True, eq=False)
class Findings:
    """What a first look at two examples shows.

    Attributes:
        output: output of one example, (1, ...).
        bytes: memory of one example's captures: fixed, and per backpropagated vector.
        positions: weight-sharing positions of each structured layer.
        chain_pairs: names of structured layers that are neighbours in execution.
        is_chain: whether each layer is fed by its predecessor alone.
    """

    output: Tensor
    bytes: tuple[int, int]
    positions: dict[str, int]
    chain_pairs: tuple[tuple[str, str], ...]
    is_chain: bool


def check_paths(probe: Probe, inputs: Inputs) -> Findings:
    """Look at two examples; layers that do not keep what their structure promises become generic.

    Args:
        probe: the probe, its recorder attached.
        inputs: a batch's inputs.

    Returns:
        The findings.

    Raises:
        RuntimeError: an example's output depends on the other examples, or on chance.
        ValueError: the output is not finite.
    """
    layers = probe.space.layers
    few = select(inputs, 0, 2)
    z, calls = probe.record(few)
    probe.likelihood.check_output(z)
    probe.check_finite(z, calls, 0)
    is_chain = _is_chain(z, calls)
    for layer in layers:
        if layer.structured and layer.name not in calls:
            layer.make_generic("its forward did not run")
        elif layer.structured and any(
            call.x.shape[:1] != z.shape[:1] or call.shape[:1] != z.shape[:1] for call in calls[layer.name]
        ):
            layer.make_generic("the first dimension of its input does not count examples")
    private = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape, generator=private, dtype=torch.float64).to(device=z.device, dtype=z.dtype)
    structured = {name: made for name, made in calls.items() if made[0].layer.structured}
    gradients = probe.backward(z, structured, v.unsqueeze(0))
    captures = {name: capture_calls(structured[name], g) for name, g in gradients.items()}
    truths = [_alone(probe, inputs, n, z, v) for n in range(len(z))]
    for layer in layers:
        if layer.structured:
            found = captures[layer.name].gradients[0]
            if not all(_close(found[n], truth[layer.name]) for n, truth in enumerate(truths)):
                layer.make_generic(
                    "its parameters also act outside its forward, or its batch is not the first dimension"
                )
    _check_generic(probe, few, v, truths)
    captures = {name: capture for name, capture in captures.items() if structured[name][0].layer.structured}
    return Findings(
        output=z[:1].detach(),
        bytes=_bytes(layers, structured, z.element_size()),
        positions={name: capture.positions for name, capture in captures.items()},
        chain_pairs=_neighbours(calls),
        is_chain=is_chain,
    )


def _alone(probe: Probe, inputs: Inputs, n: int, z: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Gradient of v_n's product with one example's own output, by layer in unit order."""
    own = _forward_alone(probe, inputs, n)[0]
    tolerance = _TOLERANCE.get(z.dtype, 0.1)
    scale = 1 + float(z.detach().abs().max())
    if float((own - z[n]).detach().abs().max()) > tolerance * scale:
        raise RuntimeError(
            f"the model's output for example {n} changes with the other examples of the batch, or at random; "
            "a Fisher needs independent examples: call model.eval(), or remove what couples them."
        )
    out = {}
    for i, layer in enumerate(probe.space.layers):
        parameters = list(layer.parameters.values())
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if own.requires_grad:
            gradients = torch.autograd.grad(own, parameters, v[n], retain_graph=True, allow_unused=True)
        parts = {
            name: p.new_zeros(p.numel()) if g is None else densified(g).reshape(-1)
            for g, (name, p) in zip(gradients, layer.parameters.items(), strict=True)
        }
        out[layer.name] = probe.space.gather(i, parts).detach()
    return out


def _forward_alone(probe: Probe, inputs: Inputs, n: int) -> Tensor:
    """Output of one example on its own; twice the example for models that cannot take a batch of one."""
    single = select(inputs, n, n + 1)
    try:
        return probe.forward(single)
    except (RuntimeError, ValueError, TypeError, IndexError):
        double = pytree.tree_map(
            lambda leaf: (
                torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == 1 else leaf
            ),
            single,
        )
        return probe.forward(double)


def _check_generic(probe: Probe, few: Inputs, v: Tensor, truths: list[dict[str, Tensor]]) -> None:
    """Batching rules of `vmap` have been found wrong (PReLU, one vector): believe them only where they are right."""
    generic = [layer for layer in probe.space.layers if not layer.structured]
    if not generic:
        return
    for count in (1, 2):
        captures = probe.generic_captures(generic, few, v.expand(count, *v.shape))
        for layer in generic:
            found = captures[layer.name].gradients
            expected = torch.stack([truth[layer.name] for truth in truths]).expand(count, -1, -1)
            if found.shape != expected.shape or not _close(found, expected):
                probe.one_at_a_time = True
                return


def _close(found: Tensor, expected: Tensor) -> bool:
    gap = torch.linalg.vector_norm((found - expected).double())
    size = torch.linalg.vector_norm(expected.double())
    return bool(gap <= _TOLERANCE.get(found.dtype, 0.1) * size + 1e-30)


def _neighbours(calls: Mapping[str, list[Call]]) -> tuple[tuple[str, str], ...]:
    """Structured layers that follow one another in execution; a module called twice breaks the chain."""
    single = {name for name, made in calls.items() if len(made) == 1 and made[0].layer.structured}
    names = list(calls)
    return tuple((a, b) for a, b in itertools.pairwise(names) if a in single and b in single)


def _is_chain(z: Tensor, calls: Mapping[str, list[Call]]) -> bool:
    """Whether every layer is fed by the one before it alone, and the output by the last."""
    flat = [call for made in calls.values() for call in made]
    if not flat or any(len(made) > 1 for made in calls.values()):
        return False
    expected: list[set[str]] = [set(), *({call.layer.name} for call in flat)]
    sources = [*(call.source for call in flat), z.grad_fn]
    return all(feeders(source, flat) == names for source, names in zip(sources, expected, strict=True))


def _bytes(layers: tuple[Layer, ...], calls: Mapping[str, list[Call]], item: int) -> tuple[int, int]:
    """Memory of one example's captures: inputs unfolded, and gradients per vector."""
    inputs, outputs = 1, 1 + sum(layer.size for layer in layers if not layer.structured)
    for made in calls.values():
        kernel = math.prod(getattr(made[0].layer.module, "kernel_size", (1,)))
        inputs += sum(kernel * call.x[:1].numel() for call in made)
        outputs += sum(call.shape[1:].numel() for call in made)
    return item * inputs, item * outputs
