"""Per-example gradients of arbitrary parameters with `torch.func`: the path of every module without structure.

Exact for whatever the model computes, tied parameters included; costs a per-example Jacobian product per vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fisherviz.capture.agreement import close, noise
from fisherviz.capture.captures import AnyCapture, GenericCapture
from fisherviz.capture.network import Network
from fisherviz.network.batches import Inputs, count_examples
from fisherviz.network.layers import Layer
from fisherviz.support.counting import counted_as


def generic_captures(
    network: Network, layers: Sequence[Layer], inputs: Inputs, vectors: Tensor, *, one_at_a_time: bool | None = None
) -> dict[str, AnyCapture]:
    """Captures of layers without structure, by layer name.

    Args:
        network: the network.
        layers: the layers.
        inputs: a batch's inputs.
        vectors: (K, N, ...) like the output.
        one_at_a_time: loop over examples and vectors instead of batching them; None: as the structure says.
    """
    slowly = network.structure.one_at_a_time if one_at_a_time is None else one_at_a_time
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    gradients = (_one_at_a_time if slowly else _batched)(network, parameters, inputs, vectors)
    return {
        layer.name: GenericCapture(
            torch.cat([gradients[name].detach().reshape(*vectors.shape[:2], -1) for name in layer.parameters], 2)
        )
        for layer in layers
    }


def confirmed_captures(
    network: Network, layers: Sequence[Layer], inputs: Inputs, z: Tensor, vectors: Tensor
) -> dict[str, AnyCapture]:
    """The same, held against autograd's: a batching rule may be wrong for some examples alone.

    Args:
        network: the network; it is noted where batching is given up.
        layers: the layers.
        inputs: a batch's inputs.
        z: the network's output with its graph, which is kept.
        vectors: (K, N, ...) like the output.
    """
    found = generic_captures(network, layers, inputs, vectors)
    if network.structure.one_at_a_time or not z.requires_grad:
        return found
    k, n = vectors.shape[:2]
    of_vectors, of_examples = noise(vectors.new_empty(k), 2), noise(vectors.new_empty(n), 3)
    combined = torch.tensordot(of_vectors, vectors, 1) * of_examples.view(-1, *[1] * (z.dim() - 1))
    own = [p for layer in layers for p in layer.parameters.values()]
    with counted_as(0):  # evidence
        truth = torch.autograd.grad(z, own, combined, retain_graph=True, allow_unused=True)
    sums = [torch.zeros_like(p) if g is None else densified(g).detach() for p, g in zip(own, truth, strict=True)]
    gradients = torch.cat([found[layer.name].gradients for layer in layers], 2)
    if close(of_examples @ torch.tensordot(of_vectors, gradients, 1), torch.cat([g.reshape(-1) for g in sums])):
        return found
    network.note(one_at_a_time=True)
    return generic_captures(network, layers, inputs, vectors)


def _batched(network: Network, parameters: Mapping[str, Tensor], inputs: Inputs, vectors: Tensor) -> dict[str, Tensor]:
    """Gradients of each vector's product with the output, for each example: (K, N, *shape) by name."""
    frozen = {name: p.detach() for name, p in parameters.items()}
    n = count_examples(inputs)
    in_dims = pytree.tree_map(
        lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n else None, inputs
    )

    def one_example(x: Inputs, v: Tensor) -> dict[str, Tensor]:
        single = pytree.tree_map(lambda leaf, d: leaf.unsqueeze(0) if d == 0 else leaf, x, in_dims)
        pullback: Any = vjp(lambda p: network.functional(p, single)[0], frozen)[1]
        return vmap(lambda u: pullback(u)[0])(v)

    try:
        with _without_fallback_warnings(), _Recurrent():
            return vmap(one_example, in_dims=(in_dims, 1), out_dims=1, randomness="error")(inputs, vectors)
    except (RuntimeError, ValueError, TypeError, IndexError):
        # an operation that vmap cannot batch, or a model that takes no batch of one, each of which it runs alone: one
        # example and vector at a time, the same numbers
        return _one_at_a_time(network, parameters, inputs, vectors)


class _Recurrent(TorchFunctionMode):
    """States that recurrent layers begin with are of each example: torch adds to them in place, which vmap refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECURRENT:
            x, state, *rest = args
            own = pytree.tree_map(lambda h: x.new_zeros(h.shape) + h if h.is_floating_point() else h, state)
            args = (x, own, *rest)
        return func(*args, **kwargs or {})


_RECURRENT = {
    torch.rnn_tanh, torch.rnn_relu, torch.gru, torch.lstm,
    torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell, torch.lstm_cell,
}  # fmt: skip


@contextlib.contextmanager
def _without_fallback_warnings() -> Iterator[None]:
    """Operations without a batching rule are looped over: torch warns for its developers, users cannot do anything.

    Its own switch rather than a filter: a change of filters would show the model's own warnings again in each pass.
    """
    shown = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    shown(False)
    try:
        yield
    finally:
        shown(True)


def _one_at_a_time(
    network: Network, parameters: Mapping[str, Tensor], inputs: Inputs, vectors: Tensor
) -> dict[str, Tensor]:
    """The same without batching rules."""
    out = {name: p.new_zeros(*vectors.shape[:2], *p.shape) for name, p in parameters.items()}
    leaves = list(parameters.values())
    for n in range(vectors.shape[1]):
        z = network.alone(inputs, n)
        for k in range(vectors.shape[0]):
            gradients = torch.autograd.grad(z, leaves, vectors[k, n : n + 1], retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    out[name][k, n] = densified(gradient)
    return out


def densified(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor; `nn.Embedding(sparse=True)` gives sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
