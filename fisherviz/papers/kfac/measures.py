"""What the K-FAC paper says of its figures 2, 3, 5 and 6 in words, as numbers of one trained network."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz import plotting
from fisherviz.exact.cumulants import cumulants
from fisherviz.papers.kfac.network import KFACNetwork


def relative(difference: Tensor, reference: Tensor) -> float:
    """A difference's Frobenius norm, to that of a reference."""
    return float(difference.norm() / reference.norm())


def likeness(net: KFACNetwork) -> dict[str, float]:
    """Of F̃ and F: relative error, cosine, and correlation of the block means."""
    exact, tilde = net.exact, net.dense("kfac-full")
    return {
        "relative_frobenius": relative(exact - tilde, exact),
        "cosine": float((exact * tilde).sum() / exact.norm() / tilde.norm()),
        "block_mean_correlation": _correlation(_means(exact, net), _means(tilde, net)),
    }


def cumulant_sums(net: KFACNetwork) -> dict[str, float]:
    """Σ|F − F̃| and its bound by cumulants, their ratio, and the largest ratio of a block."""
    found = cumulants(net.fisher, progress=net.run.progress)
    blocks = float((found.frame["error"] / found.frame["bound"]).max())
    return {"error": found.error, "bound": found.bound, "ratio": found.ratio, "largest_ratio_of_a_block": blocks}


def shares(net: KFACNetwork) -> dict[str, float]:
    """Of F̃ and F: how large blocks two or more layers apart are beside adjacent ones."""
    return {"approximate": far_share(net.dense("kfac-full"), net), "exact": far_share(net.exact, net)}


def inverse_shares(net: KFACNetwork, gamma: float) -> dict[str, float]:
    """The same of the damped inverses, and how the diagonal blocks of F̃'s fall into those of single units."""
    inverse = net.inverse("kfac-full", gamma)
    return {
        "approximate": far_share(inverse, net),
        "exact": far_share(net.exact_inverse(gamma), net),
        "contrast": outgoing_contrast(inverse, net),
    }


def regained(net: KFACNetwork, gamma: float) -> dict[str, float]:
    """Largest |difference| to the damped F̃ on the diagonal blocks of F̌, and on the tridiagonal ones of F̂."""
    apart, damped = _layers_apart(net), net.damped("kfac-full", gamma)
    check, hat = (torch.linalg.inv(net.inverse(name, gamma)) for name in ("kfac", "kfac-tridiagonal"))
    own, near = (damped - check)[apart == 0], (damped - hat)[apart <= 1]
    largest = damped.abs().max()
    return {"diagonal": float(own.abs().max() / largest), "tridiagonal": float(near.abs().max() / largest)}


def off_tridiagonal(net: KFACNetwork) -> dict[str, float]:
    """Relative errors: of F̂ off its tridiagonal blocks, of all of F̂, of all of F̌."""
    tilde, check, hat = net.dense("kfac-full"), net.dense("kfac"), net.dense("kfac-tridiagonal")
    off = _layers_apart(net) > 1
    return {
        "off_tridiagonal": relative((tilde - hat)[off], tilde[off]),
        "tridiagonal": relative(tilde - hat, tilde),
        "diagonal": relative(tilde - check, tilde),
    }


def inverses(net: KFACNetwork, gamma: float) -> dict[str, float]:
    """Relative errors of F̌⁻¹ and F̂⁻¹, and both on the diagonal blocks alone."""
    tilde, check, hat = (net.inverse(name, gamma) for name in ("kfac-full", "kfac", "kfac-tridiagonal"))
    own = _layers_apart(net) == 0
    return {
        "diagonal": relative(tilde - check, tilde),
        "tridiagonal": relative(tilde - hat, tilde),
        "diagonal_own": relative((tilde - check)[own], tilde[own]),
        "tridiagonal_own": relative((tilde - hat)[own], tilde[own]),
    }


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
