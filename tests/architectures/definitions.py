"""The approximations of a network's layers by their definitions, from F and from what hooks on its modules see.

A layer's inputs and output gradients are read from one pass for each example; what convolutions see is found index by
index (`tests/oracles/patches.py`). None where a definition is left to the tests of that kind of layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracles import kronecker, order, positions
from tests.oracles.patches import patches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
UNIT_AXIS = {nn.Embedding: 1, nn.ConvTranspose2d: 1}
"""Dimension of a weight that counts output units, where it is not the first."""


def places(model: nn.Module, names: Sequence[str]) -> np.ndarray:
    """Where parameters stand in torch order."""
    starts, at = {}, 0
    for name, p in model.named_parameters():
        starts[name], at = np.arange(at, at + p.numel()), at + p.numel()
    return np.concatenate([starts[name] for name in names])


def units(model: nn.Module, layer) -> np.ndarray:
    """The output unit of each parameter of a layer, in torch order."""
    axis = UNIT_AXIS.get(type(model.get_submodule(layer.name)), 0)
    found = []
    for name in layer.parameters:
        p = model.get_parameter(name)
        along = axis if p.dim() > axis else 0
        shape = [1] * p.dim()
        shape[along] = -1
        found.append(torch.arange(p.shape[along]).view(shape).expand(p.shape).reshape(-1))
    return torch.cat(found).numpy()


def same_unit(F: np.ndarray, model: nn.Module, layer) -> np.ndarray:
    """A layer's block without what couples two output units."""
    unit = units(model, layer)
    return np.where(unit[:, None] == unit, F, 0.0)


def seen(model: nn.Module, module: nn.Module, given: tuple[Tensor, ...], counted: Tensor, axis: int):
    """One example's inputs (T, da), and gradients (K, T, dg) of all columns, at a layer."""
    held = {}
    handle = module.register_forward_hook(lambda _, args, out: held.update(x=args[0].detach(), out=out))
    z = model(*given).movedim(axis, -1)[0][counted]
    handle.remove()
    x, out = held["x"], held["out"]
    if isinstance(module, CONVOLUTIONS):
        a = patches(module, x)[0].flatten(2)
    elif isinstance(module, nn.Embedding):
        a = nn.functional.one_hot(x.reshape(1, -1), module.num_embeddings).to(out)
        a[x.reshape(1, -1) == module.padding_idx] = 0
    else:
        a = x.reshape(1, -1, x.shape[-1])
    g = torch.stack([torch.autograd.grad(z, out, v, retain_graph=True)[0] for v in positions.columns(z)])
    g = g[:, 0].flatten(2).mT if isinstance(module, CONVOLUTIONS) else g.reshape(len(g), -1, g.shape[-1])
    if getattr(module, "bias", None) is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return a[0], g


def moments(model: nn.Module, module: nn.Module, inputs: Sequence[tuple[Tensor, ...]], counted: Tensor, axis: int):
    """Each example's inputs (T, da) and gradients (K, T, dg), where an output that counts depends on them."""
    found = []
    for n, given in enumerate(inputs):
        a, g = seen(model, module, given, counted[n], axis)
        there = torch.ones(len(a), dtype=torch.bool) if counted.all() else (g != 0).any(2).any(0)
        found.append((a[there].numpy(), g[:, there].numpy()))
    return found


def of_a_table(method: str, F: np.ndarray, *pairs) -> np.ndarray:
    """The block of a table (V, d) from its inputs and gradients, and from those of a head that has its weight."""
    pairs = ([(a, g * a.any(1, keepdims=True)) for a, g in pairs[0]], *pairs[1:])  # none of padding
    (C, S), *others = (
        (sum(a.T @ a / len(a) for a, _ in p) / len(p), sum(np.einsum("kto,ktp->op", g, g) for _, g in p) / len(p))
        for p in pairs
    )
    if method == "foof":
        summed = [sum(a.T @ a for a, _ in p) / len(p) for p in pairs]
        return np.kron(summed[0], np.eye(len(S))) + sum(np.kron(np.eye(len(C)), A) for A in summed[1:])
    total, width = np.kron(C, S), np.trace(C) * S
    for A, G in others:
        total, width = total + np.kron(np.diag(np.diag(G)), A), width + np.trace(G) * A
    if not others and method == "kfac":
        return total
    kronecker.assert_basis_is_unique(width)
    Q = np.kron(np.eye(len(C)), np.linalg.eigh(width)[1])
    return Q @ np.diag(np.diag(Q.T @ (F if method == "ekfac" else total) @ Q)) @ Q.T


def block(method: str, setting: str, F: np.ndarray, model: nn.Module, layer, inputs, counted: Tensor, axis: int):
    """The block of a layer, in torch order, or None.

    Args:
        method: its name.
        setting: of K-FAC's factors.
        F: the exact block.
        model: the network.
        layer: its `LayerInfo`.
        inputs: single examples.
        counted: which outputs count, by example.
        axis: of the classes.
    """
    if method == "identity":
        return np.eye(len(F))
    if method == "layer":
        return F
    if method == "diagonal" or layer.path == "generic":
        return np.diag(np.diag(F))
    module = model.get_submodule(layer.name)
    heads = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    if isinstance(module, nn.Embedding) and method in ("kfac", "ekfac", "foof"):
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is module.weight]
        return of_a_table(method, F, *(moments(model, m, inputs, counted, axis) for m in (module, *heads)))
    if isinstance(module, nn.Embedding) and method == "centred":
        return None
    if isinstance(module, nn.Embedding) and method == "nearest-kronecker":
        return np.diag(np.diag(F)) if any(module.weight is weight for weight in heads) else None
    if method == "cw-ngd" or (isinstance(module, NORMS) and method != "foof"):
        return same_unit(F, model, layer)
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)) or getattr(module, "groups", 1) > 1:
        return None
    if layer.name.endswith("out_proj"):  # torch calls it as a function, which no hook sees
        return None
    d_out, fan_in = len(module.weight), module.weight[0].numel()
    da = fan_in + (module.bias is not None)
    rows = order.matrix_positions(d_out, fan_in, module.bias is not None).reshape(-1)
    back = np.argsort(rows)
    if method == "nearest-kronecker":
        return kronecker.nearest_kronecker(F[np.ix_(rows, rows)], d_out, da)[np.ix_(back, back)]
    pairs = moments(model, module, inputs, counted, axis)
    if setting == "reduce":
        pairs = [(a.mean(0, keepdims=True), g.sum(1, keepdims=True)) for a, g in pairs]
    A = sum(a.T @ a / len(a) for a, _ in pairs) / len(pairs)
    G = sum(np.einsum("kto,ktp->op", g, g) for _, g in pairs) / len(pairs)
    if method == "foof":
        dense = np.kron(np.eye(d_out), sum(a.T @ a for a, _ in pairs) / len(pairs))
    elif method == "ekfac":
        kronecker.assert_basis_is_unique(A)
        kronecker.assert_basis_is_unique(G)
        Q = np.kron(np.linalg.eigh(G)[1], np.linalg.eigh(A)[1])
        dense = Q @ np.diag(np.diag(Q.T @ F[np.ix_(rows, rows)] @ Q)) @ Q.T
    elif method == "centred":
        mean = sum(a.mean(0) for a, _ in pairs) / len(pairs)
        by_means = np.outer(mean, mean)
        np.fill_diagonal(by_means, np.diag(A))
        dense = np.kron(np.diag(np.diag(G)), by_means)
    else:
        dense = np.kron(G, A)
    return dense[np.ix_(back, back)]
