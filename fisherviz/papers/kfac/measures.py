"""What the K-FAC paper says of its figures 2, 3, 5 and 6 in words, as numbers of one trained network."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz import plotting
from fisherviz.papers.kfac.network import KFACNetwork


def relative(difference: Tensor, reference: Tensor) -> float:
    """A difference's Frobenius norm, to that of a reference."""
    return float(difference.norm() / reference.norm())


def likeness(net: KFACNetwork) -> tuple[float, float, float]:
    """Of F̃ and F: relative error, cosine, and correlation of the block means."""
    exact, tilde = net.exact, net.dense("kfac-full")
    cosine = float((exact * tilde).sum() / exact.norm() / tilde.norm())
    return relative(exact - tilde, exact), cosine, _correlation(_means(exact, net), _means(tilde, net))


def regained(net: KFACNetwork) -> tuple[float, float]:
    """Largest |difference| to the damped F̃ on the diagonal blocks of F̌, and on the tridiagonal ones of F̂."""
    apart, damped = _layers_apart(net), net.damped("kfac-full", net.gamma)
    check, hat = (torch.linalg.inv(net.inverse(name, net.gamma)) for name in ("kfac", "kfac-tridiagonal"))
    own, near = (damped - check)[apart == 0], (damped - hat)[apart <= 1]
    return float(own.abs().max() / damped.abs().max()), float(near.abs().max() / damped.abs().max())


def off_tridiagonal(net: KFACNetwork) -> tuple[float, float, float]:
    """Relative errors: of F̂ off its tridiagonal blocks, of all of F̂, of all of F̌."""
    tilde, check, hat = net.dense("kfac-full"), net.dense("kfac"), net.dense("kfac-tridiagonal")
    off = _layers_apart(net) > 1
    return relative((tilde - hat)[off], tilde[off]), relative(tilde - hat, tilde), relative(tilde - check, tilde)


def inverses(net: KFACNetwork, gamma: float) -> tuple[float, float, float, float]:
    """Relative errors of F̌⁻¹ and F̂⁻¹, and both on the diagonal blocks alone."""
    tilde, check, hat = (net.inverse(name, gamma) for name in ("kfac-full", "kfac", "kfac-tridiagonal"))
    own = _layers_apart(net) == 0
    parts = ((check, slice(None)), (hat, slice(None)), (check, own), (hat, own))
    diagonal, better, own_diagonal, own_better = (relative((tilde - m)[at], tilde[at]) for m, at in parts)
    return diagonal, better, own_diagonal, own_better


def _means(matrix: Tensor, net: KFACNetwork) -> Tensor:
    """Mean |entry| of each block, (layers, layers)."""
    return torch.as_tensor(plotting.block_means_info(matrix.cpu(), edges=net.edges).values)


def _correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def _layers_apart(net: KFACNetwork) -> Tensor:
    """How many layers lie between the two weights of each entry, (P, P)."""
    sizes = torch.tensor(net.edges, device=net.exact.device).diff()
    layer = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    return (layer[:, None] - layer[None, :]).abs()


def far_share(matrix: Tensor, net: KFACNetwork) -> float:
    """Mean |entry| of blocks two or more layers apart, to that of adjacent blocks."""
    apart = _layers_apart(net)
    return float(matrix[apart > 1].abs().mean() / matrix[apart == 1].abs().mean())


def outgoing_contrast(matrix: Tensor, net: KFACNetwork) -> float:
    """In diagonal blocks: mean |entry| among one unit's outgoing weights, to that among weights of two."""
    units = torch.cat(
        [
            offset + torch.arange(layer.num_parameters) // layer.out_features
            for offset, layer in zip(net.edges, net.fisher.layers, strict=False)
        ]
    ).to(matrix.device)
    same, own = units[:, None] == units[None, :], _layers_apart(net) == 0
    return float(matrix[same & own].abs().mean() / matrix[~same & own].abs().mean())
