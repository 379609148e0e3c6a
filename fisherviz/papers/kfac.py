"""Martens & Grosse 2015: figures 2, 3, 5, 6 and the cumulant sums of section 3.1, on their example network.

All matrices are of the middle four layers jointly, in the paper's vec(W̄) order, in float64. F̃ is "kfac-full",
F̌ "kfac" (block-diagonal), F̂ "kfac-tridiagonal". What is drawn is what the paper's captions say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fisherviz import plotting
from fisherviz.exact.cumulants import cumulants
from fisherviz.papers.claims import Claim, Outcome
from fisherviz.papers.kfac_network import MIDDLE, KFACNetwork, kfac_network
from fisherviz.papers.pictures import draw
from fisherviz.papers.registry import Run, exhibit

PAPER_ERROR, PAPER_BOUND = 2894.4, 4134.6  # section 3.1
F_TILDE, F_CHECK, F_HAT = r"\tilde{F}", r"\breve{F}", r"\hat{F}"  # matplotlib sets \check beside the letter
BRIGHT = 0.99  # share of the cells of F̃ below the top of its scale
BRIGHT_INVERSE = 0.93  # the same of inverses, whose diagonal blocks would leave everything else black


@exhibit("kfac.fig2", "Martens & Grosse 2015, figure 2: F, F̃ and their difference")
def fig2(run: Run) -> Outcome:
    """Draw the exact Fisher, its Khatri-Rao approximation F̃ and |F - F̃| on one scale.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    net = kfac_network(run)
    exact, tilde = net.exact, net.dense("kfac-full")
    titles = ("exact $F$", rf"Khatri–Rao ${F_TILDE}$", rf"$|F - {F_TILDE}|$")

    def fill(figure: Figure) -> None:
        _triptych(list(figure.subplots(1, 3)), exact, tilde, net, titles, BRIGHT)

    error = _relative(exact - tilde, exact)
    cosine = float((exact * tilde).sum() / exact.norm() / tilde.norm())
    likeness = _correlation(_means(exact, net), _means(tilde, net))
    claim = Claim(
        "F̃ is fairly accurate and captures the coarse structure of F",
        "figure 2, middle and right (no number)",
        f"‖F − F̃‖/‖F‖ = {error:.3f}, cosine {cosine:.3f}, correlation of the block means of |entries| {likeness:.3f}",
        "the cosine and the correlation of block means are at least 0.8",
        cosine >= 0.8 and likeness >= 0.8,
        net.other_data,
        values={"relative_frobenius": error, "cosine": cosine, "block_mean_correlation": likeness},
    )
    caption = f"Exact Fisher, its approximation F̃, and their absolute difference. {_scale(BRIGHT)}"
    return net.outcome((claim,), caption, draw(9.6, 3.2, fill, heatmaps=True))


@exhibit("kfac.cumulants", "Martens & Grosse 2015, section 3.1: the error of F̃ and its cumulant bound")
def sums(run: Run) -> Outcome:
    """Sum |F - F̃| and its bound by cumulants over all pairs of weights.

    Args:
        run: scale, seed and device.

    Returns:
        The claims; there is no picture.
    """
    net = kfac_network(run)
    found = cumulants(net.fisher, progress=net.progress)
    paper_ratio = PAPER_ERROR / PAPER_BOUND
    values = {"error": found.error, "bound": found.bound, "ratio": found.ratio}
    bounded = bool((found.frame["error"] <= found.frame["bound"]).all())
    within = "within 10 % of the paper's number"

    def number(statement: str, paper: float, measured: float) -> Claim:
        close = abs(measured / paper - 1) <= 0.1
        return Claim(statement, f"{paper}", f"{measured:.1f}", within, close, net.other_training, values=values)

    claims = (
        number("the total approximation error, summed over all pairs of weights", PAPER_ERROR, found.error),
        number("the corresponding upper bound (eq. 4)", PAPER_BOUND, found.bound),
        Claim(
            "the error is of roughly the same size as the bound",
            f"{paper_ratio:.3f} (error / bound)",
            f"{found.ratio:.3f}",
            "error / bound is within 0.1 of the paper's, and no block's error exceeds its bound",
            abs(found.ratio - paper_ratio) <= 0.1 and bounded,
            net.other_data,
            values=values,
        ),
    )
    return net.outcome(claims, "Sums over all pairs of weights of the middle four layers.")


@exhibit("kfac.fig3", "Martens & Grosse 2015, figure 3: F̃, its inverse, and the block means of the inverse")
def fig3(run: Run) -> Outcome:
    """Draw F̃, its exact damped inverse and the inverse's block means; below them the same of the exact F.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    net = kfac_network(run)
    gamma = net.damping.gamma
    tilde, tilde_inverse = net.dense("kfac-full"), net.inverse("kfac-full", gamma)
    exact, exact_inverse = net.exact, net.exact_inverse(gamma)
    rows = ((F_TILDE, tilde, tilde_inverse), ("F", exact, exact_inverse))

    def fill(figure: Figure) -> None:
        axes = figure.subplots(2, 3, width_ratios=(1.25, 1.25, 1))
        for (name, matrix, inverse), (left, middle, right) in zip(rows, axes, strict=True):
            for ax, picture, share in ((left, matrix, BRIGHT), (middle, inverse, BRIGHT_INVERSE)):
                top = _top(picture, net, share)
                plotting.heatmap(picture.cpu(), ax=ax, edges=net.edges, layers=MIDDLE, vmax=top)
            plotting.block_means(inverse.cpu(), ax=right, edges=net.edges, layers=MIDDLE)
            _title(left, f"${name}$")
            _title(middle, f"${name}^{{-1}}$, damped")

    inverse_rule = "blocks two or more layers apart have at most half the mean |entry| of adjacent ones"
    far, flat = _far_share(tilde_inverse, net), _far_share(tilde, net)
    others = {g: _far_share(net.inverse("kfac-full", g), net) for g in net.damping.others()}
    exact_others = {g: _far_share(net.exact_inverse(g), net) for g in net.damping.others()}
    exact_far, exact_flat = _far_share(exact_inverse, net), _far_share(exact, net)
    ratio = _outgoing_contrast(tilde_inverse, net)
    text = "{:.2f} of the adjacent blocks' mean |entry|"
    claims = (
        Claim(
            "the inverse of F̃ is approximately block-tridiagonal",
            "figure 3, middle and right (no number)",
            f"blocks two or more layers apart have {text.format(far)} at γ = {gamma:.2g}",
            inverse_rule,
            far <= 0.5,
            net.other_data,
            _at(others, 0.5),
            {"far_share": far, "gamma": gamma},
        ),
        Claim(
            "F̃ itself is not",
            "figure 3, left (no number)",
            f"its blocks two or more layers apart have {text.format(flat)}",
            "the same share is above one half",
            flat > 0.5,
            net.other_data,
            values={"far_share": flat},
        ),
        Claim(
            "the plots for the exact F and its inverse look similar",
            "figure 3, caption",
            f"the shares are {exact_far:.3f} for F's inverse at γ = {gamma:.2g} and {exact_flat:.2f} for F",
            "both rules above hold for F and its inverse, damped by the same matrix as F̃",
            exact_far <= 0.5 < exact_flat,
            net.other_data,
            f"F's inverse {_at(exact_others, 0.5)}",
            {"far_share_inverse": exact_far, "far_share": exact_flat, "gamma": gamma},
        ),
        Claim(
            "the very small blocks on the diagonal of the inverse are the outgoing weights of one unit",
            "figure 3, caption",
            f"in diagonal blocks, mean |entry| among one unit's outgoing weights is {ratio:.1f} times that of the rest",
            "at least 3 times",
            ratio >= 3,
            net.other_data,
            values={"contrast": ratio},
        ),
    )
    caption = (
        f"Left F̃, middle its exact inverse under factored Tikhonov damping at {net.damping}, right the "
        "averages of the |entries| of each of the inverse's blocks. Below: the exact F, damped by the same "
        f"matrix. |entries| on linear scales from 0 to the {BRIGHT:.0%} quantile of F̃ and of F, and to the "
        f"{BRIGHT_INVERSE:.0%} quantile of either inverse."
    )
    return net.outcome(claims, caption, draw(9.6, 5.6, fill, heatmaps=True))


@exhibit("kfac.fig5", "Martens & Grosse 2015, figure 5: F̃ against F̌ and F̂")
def fig5(run: Run) -> Outcome:
    """Draw F̃ beside F̌ and F̂, whose inverses are block-diagonal and block-tridiagonal, with |differences|.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    net = kfac_network(run)
    tilde, check, hat = net.dense("kfac-full"), net.dense("kfac"), net.dense("kfac-tridiagonal")
    apart, gamma = _layers_apart(net), net.damping.gamma
    damped = net.damped("kfac-full", gamma)
    regained = {name: torch.linalg.inv(net.inverse(name, gamma)) for name in ("kfac", "kfac-tridiagonal")}
    largest = float(damped.abs().max())
    own = float((damped - regained["kfac"])[apart == 0].abs().max()) / largest
    near = float((damped - regained["kfac-tridiagonal"])[apart <= 1].abs().max()) / largest
    off = _relative((tilde - hat)[apart > 1], tilde[apart > 1])
    whole, poor = _relative(tilde - hat, tilde), _relative(tilde - check, tilde)
    claims = (
        Claim(
            "F̌ and F̂ capture the diagonal and the tridiagonal blocks of F̃ exactly",
            "figure 5, right: zero",
            f"largest |difference| there {own:.1e} and {near:.1e} of F̃'s largest entry, F̌ and F̂ regained by "
            f"inverting F̌⁻¹ and F̂⁻¹ at γ = {gamma:.2g}",
            "both at most 1e-8 (rounding)",
            max(own, near) <= 1e-8,
            values={"diagonal": own, "tridiagonal": near},
        ),
        Claim(
            "F̂ approximates the off-tridiagonal blocks very well, though not exactly",
            "figure 5, bottom right: very close to zero",
            f"relative Frobenius error of these blocks {off:.3f}, of all of F̂ {whole:.4f}",
            "above 1e-8 and at most 0.1 on these blocks",
            1e-8 < off <= 0.1,
            net.other_data,
            values={"off_tridiagonal": off, "whole": whole},
        ),
        Claim(
            "F̌ is a rather poor approximation of F̃",
            "figure 5, top right (no number)",
            f"relative Frobenius error {poor:.3f}",
            "at least 0.5",
            poor >= 0.5,
            net.other_data,
            values={"relative_frobenius": poor},
        ),
    )
    caption = "Left F̃, middle F̌ (top) and F̂ (bottom), right the absolute difference, all undamped. "
    caption += _scale(BRIGHT)
    return net.outcome(claims, caption, _two_rows(net, tilde, check, hat, "", BRIGHT))


@exhibit("kfac.fig6", "Martens & Grosse 2015, figure 6: the inverses of F̃, F̌ and F̂")
def fig6(run: Run) -> Outcome:
    """Draw the exact inverse of F̃ beside its block-diagonal and block-tridiagonal approximations.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    net = kfac_network(run)
    gamma = net.damping.gamma
    tilde, check, hat = (net.inverse(name, gamma) for name in ("kfac-full", "kfac", "kfac-tridiagonal"))
    diagonal = _layers_apart(net) == 0
    poor = _relative(net.dense("kfac-full") - net.dense("kfac"), net.dense("kfac-full"))
    good, better = _relative(tilde - check, tilde), _relative(tilde - hat, tilde)
    own, own_better = (_relative((tilde - other)[diagonal], tilde[diagonal]) for other in (check, hat))
    others = {}
    for g in net.damping.others():
        full, *rest = (net.inverse(name, g) for name in ("kfac-full", "kfac", "kfac-tridiagonal"))
        others[g] = tuple(_relative(full - other, full) for other in rest)
    claims = (
        Claim(
            "F̌⁻¹ is a reasonably good approximation of F̃⁻¹ although F̌ is a poor one of F̃",
            "figure 6, top (no number)",
            f"relative Frobenius error {good:.3f} (of F̌ itself: {poor:.3f}) at γ = {gamma:.2g}",
            "at most half of the error of F̌",
            good <= poor / 2,
            net.other_data,
            _at({g: pair[0] for g, pair in others.items()}, poor / 2),
            {"inverse_frobenius": good, "relative_frobenius": poor, "gamma": gamma},
        ),
        Claim(
            "F̂⁻¹ is a significantly better approximation of F̃⁻¹ than F̌⁻¹",
            "figure 6, bottom (no number)",
            f"relative Frobenius error {better:.3f} against {good:.3f}: {better / good:.2f} times",
            "at most two thirds",
            better <= 2 / 3 * good,
            net.other_data,
            _at({g: pair[1] / pair[0] for g, pair in others.items()}, 2 / 3),
            {"tridiagonal": better, "diagonal": good, "gamma": gamma},
        ),
        Claim(
            "... even on the diagonal blocks",
            "figure 6, right (no number)",
            f"there {own_better:.3f} against {own:.3f}: {own_better / own:.2f} times",
            "at most two thirds",
            own_better <= 2 / 3 * own,
            net.other_data,
            values={"tridiagonal": own_better, "diagonal": own},
        ),
    )
    caption = (
        "Left the exact inverse of F̃, middle F̌⁻¹ (top) and F̂⁻¹ (bottom), right the absolute difference; "
        f"factored Tikhonov damping at {net.damping}. {_scale(BRIGHT_INVERSE)}"
    )
    return net.outcome(claims, caption, _two_rows(net, tilde, check, hat, "^{-1}", BRIGHT_INVERSE))


def _two_rows(net: KFACNetwork, tilde: Tensor, check: Tensor, hat: Tensor, power: str, share: float) -> bytes:
    """The layout of figures 5 and 6: F̃ against F̌ above, against F̂ below."""
    left = f"{F_TILDE}{power}"
    rows = ((f"{F_CHECK}{power}", "block-diagonal", check), (f"{F_HAT}{power}", "block-tridiagonal", hat))

    def fill(figure: Figure) -> None:
        for axes, (name, word, other) in zip(figure.subplots(2, 3), rows, strict=True):
            kind = word if power else f"{word} inverse"
            titles = (f"${left}$", f"${name}$ ({kind})", f"$|{left} - {name}|$")
            _triptych(list(axes), tilde, other, net, titles, share)

    return draw(9.6, 6.2, fill, heatmaps=True)


def _triptych(
    axes: list[Axes], left: Tensor, right: Tensor, net: KFACNetwork, titles: Sequence[str], share: float
) -> None:
    top = _top(left, net, share)
    plotting.triptych(left.cpu(), right.cpu(), ax=axes, edges=net.edges, layers=MIDDLE, vmax=top)
    relative = f"{titles[-1]}, {_relative(left - right, left):#.2g} in norm"
    for ax, title in zip(axes, (*titles[:-1], relative), strict=True):
        _title(ax, title)


def _title(ax: Axes, formula: str) -> None:
    ax.set_title(formula, fontsize="large", parse_math=True)


def _top(matrix: Tensor, net: KFACNetwork, share: float) -> float:
    """Top of the scale: a share of the cells drawn stays below it."""
    return plotting.shared_maximum([plotting.heatmap_info(matrix.cpu(), edges=net.edges)], share)


def _scale(share: float) -> str:
    """How |entries| became colours, in words, and what the number above the difference is."""
    return (
        f"|entries| on a linear scale from 0 to the {share:.0%} quantile of the left image; above the difference "
        "its Frobenius norm, to that of the left image."
    )


def _at(found: Mapping[float, float], most: float) -> str:
    """The same measurement at other dampings, and whether it keeps the rule there."""
    return "; ".join(
        f"at γ = {gamma:.2g}: {value:.2g}{'' if value <= most else ', which breaks the rule'}"
        for gamma, value in found.items()
    )


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm() / reference.norm())


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


def _far_share(matrix: Tensor, net: KFACNetwork) -> float:
    """Mean |entry| of blocks two or more layers apart, to that of adjacent blocks."""
    apart = _layers_apart(net)
    return float(matrix[apart > 1].abs().mean() / matrix[apart == 1].abs().mean())


def _outgoing_contrast(matrix: Tensor, net: KFACNetwork) -> float:
    """In diagonal blocks: mean |entry| among one unit's outgoing weights, to that among weights of two."""
    units = torch.cat(
        [
            offset + torch.arange(layer.num_parameters) // layer.out_features
            for offset, layer in zip(net.edges, net.fisher.layers, strict=False)
        ]
    ).to(matrix.device)
    same, own = units[:, None] == units[None, :], _layers_apart(net) == 0
    return float(matrix[same & own].abs().mean() / matrix[~same & own].abs().mean())
