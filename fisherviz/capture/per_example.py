"""Per-example gradients of arbitrary parameters with `torch.func`: the path of every module without structure.

Exact for whatever the model computes, tied parameters included; costs a per-example Jacobian product per vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fisherviz.network.batches import Inputs, select


def per_example_gradients(
    model: nn.Module,
    call: Callable[[Callable[..., Any], Inputs], Tensor],
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    vectors: Tensor,
    in_dims: Any,
    one_at_a_time: bool = False,
) -> dict[str, Tensor]:
    """Gradients of each vector's product with the output, for each example.

    Args:
        model: the model.
        call: runs a model function on inputs and returns the output tensor (N, ...).
        parameters: parameters by name.
        inputs: a batch's inputs.
        vectors: (K, N, ...) like the output.
        in_dims: which leaves of the inputs carry examples (0 or None).
        one_at_a_time: loop over examples and vectors instead of batching them with `vmap`.

    Returns:
        For each name a tensor (K, N, *shape).
    """
    if one_at_a_time:
        return _one_at_a_time(model, call, parameters, inputs, vectors)
    frozen = {name: p.detach() for name, p in parameters.items()}

    def one_example(x: Inputs, v: Tensor) -> dict[str, Tensor]:
        single = torch.utils._pytree.tree_map(lambda leaf, d: leaf.unsqueeze(0) if d == 0 else leaf, x, in_dims)

        def output(p: Mapping[str, Tensor]) -> Tensor:
            return call(lambda *args, **kwargs: functional_call(model, dict(p), args, kwargs), single)[0]

        pullback = vjp(output, frozen)[1]
        return vmap(lambda u: pullback(u)[0])(v)

    try:
        with _without_fallback_warnings():
            return vmap(one_example, in_dims=(in_dims, 1), out_dims=1, randomness="error")(inputs, vectors)
    except (RuntimeError, ValueError, NotImplementedError):
        # an operation that vmap cannot batch: one example and vector at a time, the same numbers
        return _one_at_a_time(model, call, parameters, inputs, vectors)


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
    model: nn.Module,
    call: Callable[[Callable[..., Any], Inputs], Tensor],
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    vectors: Tensor,
) -> dict[str, Tensor]:
    out = {name: p.new_zeros(*vectors.shape[:2], *p.shape) for name, p in parameters.items()}
    leaves = list(parameters.values())
    for n in range(vectors.shape[1]):
        z = call(model, select(inputs, n, n + 1))
        for k in range(vectors.shape[0]):
            gradients = torch.autograd.grad(z, leaves, vectors[k, n : n + 1], retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    out[name][k, n] = densified(gradient)
    return out


def densified(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor; `nn.Embedding(sparse=True)` gives sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
