"""Martens & Grosse 2015: figures 2, 3, 5, 6 and the cumulant sums of section 3.1, on their example network.

All matrices are of the middle four layers jointly, in the paper's vec(W̄) order, in float64. F̃ is "kfac-full",
F̌ "kfac" (block-diagonal), F̂ "kfac-tridiagonal". What is drawn is what the paper's captions say.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fisherviz import plotting
from fisherviz.papers.kfac.dampings import EARLIER, RULE, sweep
from fisherviz.papers.kfac.measures import (
    cumulant_sums,
    inverse_shares,
    inverses,
    likeness,
    off_tridiagonal,
    regained,
    relative,
    shares,
)
from fisherviz.papers.kfac.network import MIDDLE, KFACNetwork, kfac_networks
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run

PAPER_ERROR, PAPER_BOUND = 2894.4, 4134.6  # section 3.1
EVERY = "on every seed"
F_TILDE, F_CHECK, F_HAT = r"\tilde{F}", r"\breve{F}", r"\hat{F}"  # matplotlib sets \check beside the letter
BRIGHT = 0.99  # share of the cells of F̃ below the top of its scale
BRIGHT_INVERSE = 0.93  # the same of inverses, whose diagonal blocks would leave everything else black


@exhibit(
    "kfac.fig2", "figure 2: F, F̃ and their difference",
    shows="the exact Fisher of the middle four layers, its Khatri–Rao approximation and their difference",
    desk=0.05, paper=0.05,
)  # fmt: skip
def fig2(run: Run) -> Outcome:
    """Draw the exact Fisher, its Khatri-Rao approximation F̃ and |F - F̃| on one scale.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    networks = kfac_networks(run)
    net = networks.first
    titles = ("exact $F$", rf"Khatri–Rao ${F_TILDE}$", rf"$|F - {F_TILDE}|$")

    def fill(figure: Figure) -> None:
        _triptych(list(figure.subplots(1, 3)), net.exact, net.dense("kfac-full"), net, titles, BRIGHT)

    found = networks.measured(likeness)
    error, cosine, alike = found["relative_frobenius"], found["cosine"], found["block_mean_correlation"]
    claim = Claim(
        "F̃ is fairly accurate and captures the coarse structure of F",
        "figure 2, middle and right (no number)",
        f"‖F − F̃‖/‖F‖ = {spread(error, '.3f')}, cosine {spread(cosine, '.3f')}, correlation of the block means of "
        f"|entries| {spread(alike, '.3f')}",
        f"the cosine and the correlation of block means are at least 0.8, {EVERY}",
        min(*cosine, *alike) >= 0.8,
        net.recipe.departures,
        values={name: values[0] for name, values in found.items()},
    )
    caption = f"Exact Fisher, its approximation F̃, and their absolute difference. {_scale(BRIGHT)}"
    return networks.outcome((claim,), caption, draw(9.6, 3.2, fill, heatmaps=True))


@exhibit(
    "kfac.cumulants", "section 3.1: the error of F̃ and its cumulant bound",
    shows="the sum of |F − F̃| over all pairs of weights, 2894.4, and its bound by cumulants, 4134.6",
    desk=0.05, paper=0.05,
)  # fmt: skip
def sums(run: Run) -> Outcome:
    """Sum |F - F̃| and its bound by cumulants over all pairs of weights.

    Args:
        run: scale, seed and device.

    Returns:
        The claims; there is no picture.
    """
    networks = kfac_networks(run)
    found = networks.measured(cumulant_sums)
    paper_ratio, other = PAPER_ERROR / PAPER_BOUND, networks.first.recipe.departures
    errors, bounds, ratios = found["error"], found["bound"], found["ratio"]
    values = {"error": errors[0], "bound": bounds[0], "ratio": ratios[0]}
    bounded = max(found["largest_ratio_of_a_block"]) <= 1
    within = "the median of the seeds is within 10 % of the paper's number"

    def number(statement: str, paper: float, measured: list[float]) -> Claim:
        close = abs(median(measured) / paper - 1) <= 0.1
        return Claim(statement, f"{paper}", spread(measured, ".1f"), within, close, other, values=values)

    claims = (
        number("the total approximation error, summed over all pairs of weights", PAPER_ERROR, errors),
        number("the corresponding upper bound (eq. 4)", PAPER_BOUND, bounds),
        Claim(
            "the error is of roughly the same size as the bound",
            f"{paper_ratio:.3f} (error / bound)",
            spread(ratios, ".3f"),
            f"error / bound is within 0.1 of the paper's, and no block's error exceeds its bound, {EVERY}",
            max(abs(ratio - paper_ratio) for ratio in ratios) <= 0.1 and bounded,
            other,
            values=values,
        ),
    )
    return networks.outcome(claims, "Sums over all pairs of weights of the middle four layers.")


@exhibit(
    "kfac.fig3", "figure 3: F̃, its inverse, and the block means of the inverse",
    shows="the inverse of F̃ is nearly block-tridiagonal where F̃ is not",
    desk=0.05, paper=0.05,
)  # fmt: skip
def fig3(run: Run) -> Outcome:
    """Draw F̃, its exact damped inverse and the inverse's block means; below them the same of the exact F.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    networks = kfac_networks(run)
    net = networks.first
    rows = (
        (F_TILDE, net.dense("kfac-full"), net.inverse("kfac-full", net.gamma)),
        ("F", net.exact, net.exact_inverse(net.gamma)),
    )

    def fill(figure: Figure) -> None:
        axes = figure.subplots(2, 3, width_ratios=(1.25, 1.25, 1))
        for (name, matrix, inverse), (left, middle, right) in zip(rows, axes, strict=True):
            for ax, picture, share in ((left, matrix, BRIGHT), (middle, inverse, BRIGHT_INVERSE)):
                top = _top(picture, net, share)
                plotting.heatmap(picture.cpu(), ax=ax, edges=net.edges, layers=MIDDLE, vmax=top)
            plotting.block_means(inverse.cpu(), ax=right, edges=net.edges, layers=MIDDLE)
            _title(left, f"${name}$")
            _title(middle, f"${name}^{{-1}}$, damped")

    undamped = networks.measured(shares)
    flat, exact_flat = undamped["approximate"], undamped["exact"]
    far = sweep(networks, inverse_shares, lambda found: found["approximate"], lambda share: share <= 0.5)
    exact_far = sweep(networks, inverse_shares, lambda found: found["exact"], lambda share: share <= 0.5)
    contrast = sweep(networks, inverse_shares, lambda found: found["contrast"], lambda times: times >= 3, ".1f")
    text = "{} of the adjacent blocks' mean |entry|"
    claims = (
        Claim(
            "the inverse of F̃ exhibits an approximate block-tridiagonal structure",
            "figure 3, middle and right (no number)",
            f"blocks two or more layers apart have {text.format(spread(far.own, '.2f'))} at K-FAC's own γ",
            f"blocks two or more layers apart have at most half the mean |entry| of adjacent ones, {RULE}",
            far.holds,
            net.recipe.departures,
            far.words(),
            {"far_share": far.own[0], "gamma": net.gamma},
            earlier_rule=EARLIER,
            earlier_holds=far.held,
        ),
        Claim(
            "F̃ itself does not",
            "figure 3, left (no number)",
            f"its blocks two or more layers apart have {text.format(spread(flat, '.2f'))}",
            f"the same share is above one half, {EVERY}",
            min(flat) > 0.5,
            net.recipe.departures,
            values={"far_share": flat[0]},
        ),
        Claim(
            "the corresponding plots for the exact F and its inverse look similar",
            "figure 3, caption",
            f"the shares are {spread(exact_far.own, '.3f')} for F's inverse at K-FAC's own γ and "
            f"{spread(exact_flat, '.2f')} for F",
            f"both rules above hold for F and its inverse, damped by the same matrix as F̃, {RULE}",
            exact_far.holds and min(exact_flat) > 0.5,
            net.recipe.departures,
            f"F's inverse {exact_far.words()}",
            {"far_share_inverse": exact_far.own[0], "far_share": exact_flat[0], "gamma": net.gamma},
            earlier_rule=EARLIER,
            earlier_holds=exact_far.held and min(exact_flat) > 0.5,
        ),
        Claim(
            "the very small blocks visible on the diagonal of the inverse each correspond to the weights on the "
            "outgoing connections of a particular unit",
            "figure 3, caption",
            f"in diagonal blocks, mean |entry| among one unit's outgoing weights is {spread(contrast.own, '.1f')} "
            f"times that of the rest at K-FAC's own γ",
            f"at least 3 times, {RULE}",
            contrast.holds,
            net.recipe.departures,
            contrast.words(),
            {"contrast": contrast.own[0], "gamma": net.gamma},
            earlier_rule=EARLIER,
            earlier_holds=contrast.held,
        ),
    )
    caption = (
        f"Left F̃, middle its exact inverse under factored Tikhonov damping at γ = {net.gamma:.2g}, K-FAC's own when it "
        "came to these weights, right the averages of the |entries| of each of the inverse's blocks. Below: the exact "
        f"F, damped by the same matrix. |entries| on linear scales from 0 to the {BRIGHT:.0%} quantile of F̃ and of F, "
        f"and to the {BRIGHT_INVERSE:.0%} quantile of either inverse."
    )
    return networks.outcome(claims, caption, draw(9.6, 5.6, fill, heatmaps=True))


@exhibit(
    "kfac.fig5", "figure 5: F̃ against F̌ and F̂",
    shows="the block-diagonal and the block-tridiagonal approximation of F̃ and their errors",
    desk=0.05, paper=0.05,
)  # fmt: skip
def fig5(run: Run) -> Outcome:
    """Draw F̃ beside F̌ and F̂, whose inverses are block-diagonal and block-tridiagonal, with |differences|.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    networks = kfac_networks(run)
    net = networks.first
    tilde, check, hat = net.dense("kfac-full"), net.dense("kfac"), net.dense("kfac-tridiagonal")
    again, errors = networks.damped(regained), networks.measured(off_tridiagonal)
    own, near = again["diagonal"], again["tridiagonal"]
    off, whole, poor = errors["off_tridiagonal"], errors["tridiagonal"], errors["diagonal"]
    claims = (
        Claim(
            "F̌ and F̂ capture the diagonal and the tridiagonal blocks of F̃ exactly",
            "figure 5, caption: exactly zero due to how they are constructed",
            f"largest |difference| there {max(own):.1e} and {max(near):.1e} of F̃'s largest entry, F̌ and F̂ regained "
            f"by inverting F̌⁻¹ and F̂⁻¹ at K-FAC's own γ; an identity by their definition, so that this tests the "
            f"inverses of this implementation, and no finding of the paper",
            f"both at most 1e-8 (rounding), {EVERY}",
            max(*own, *near) <= 1e-8,
            values={"diagonal": own[0], "tridiagonal": near[0]},
        ),
        Claim(
            "F̂ approximates the off-tridiagonal blocks very well, though not exactly",
            "figure 5, bottom right: very close to zero",
            f"relative Frobenius error of these blocks {spread(off, '.3f')}, of all of F̂ {spread(whole, '.4f')}",
            f"above 1e-8 and at most 0.1 on these blocks, {EVERY}",
            1e-8 < min(off) <= max(off) <= 0.1,
            net.recipe.departures,
            values={"off_tridiagonal": off[0], "whole": whole[0]},
        ),
        Claim(
            "F̌ is a rather poor approximation of F̃",
            "figure 5, top right (no number)",
            f"relative Frobenius error {spread(poor, '.3f')}",
            f"at least 0.5, {EVERY}",
            min(poor) >= 0.5,
            net.recipe.departures,
            values={"relative_frobenius": poor[0]},
        ),
    )
    caption = "Left F̃, middle F̌ (top) and F̂ (bottom), right the absolute difference, all undamped. "
    caption += _scale(BRIGHT)
    return networks.outcome(claims, caption, _two_rows(net, tilde, check, hat, "", BRIGHT))


@exhibit(
    "kfac.fig6", "figure 6: the inverses of F̃, F̌ and F̂",
    shows="the same for the inverses, where the approximations are made",
    desk=0.05, paper=0.05,
)  # fmt: skip
def fig6(run: Run) -> Outcome:
    """Draw the exact inverse of F̃ beside its block-diagonal and block-tridiagonal approximations.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    networks = kfac_networks(run)
    net = networks.first
    poor = networks.measured(off_tridiagonal)["diagonal"]
    found = networks.damped(inverses)
    good, better, own, own_better = (found[f"{n}{of}"] for of in ("", "_own") for n in ("diagonal", "tridiagonal"))
    gained = sweep(networks, inverses, lambda at: _times(at["diagonal"], poor), lambda times: times <= 0.5)
    whole = sweep(networks, inverses, lambda at: _times(at["tridiagonal"], at["diagonal"]), _two_thirds)
    blocks = sweep(networks, inverses, lambda at: _times(at["tridiagonal_own"], at["diagonal_own"]), _two_thirds)
    claims = (
        Claim(
            "F̌⁻¹ is a reasonably good approximation of F̃⁻¹ although F̌ is a poor one of F̃",
            "figure 6, top (no number)",
            f"relative Frobenius error {spread(good, '.3f')} at K-FAC's own γ, of F̌ itself {spread(poor, '.3f')}: "
            f"{spread(gained.own, '.2f')} times",
            f"at most half of the error of F̌, {RULE}",
            gained.holds,
            net.recipe.departures,
            gained.words(),
            {"inverse_frobenius": good[0], "relative_frobenius": poor[0], "gamma": net.gamma},
            earlier_rule=EARLIER,
            earlier_holds=gained.held,
        ),
        Claim(
            "F̂⁻¹ is a significantly better approximation of F̃⁻¹ than F̌⁻¹",
            "figure 6, bottom (no number)",
            f"relative Frobenius error {spread(better, '.3f')} against {spread(good, '.3f')} at K-FAC's own γ: "
            f"{spread(whole.own, '.2f')} times",
            f"at most two thirds, {RULE}",
            whole.holds,
            net.recipe.departures,
            whole.words(),
            {"tridiagonal": better[0], "diagonal": good[0], "gamma": net.gamma},
            earlier_rule=EARLIER,
            earlier_holds=whole.held,
        ),
        Claim(
            "... even on the diagonal blocks",
            "figure 6, right (no number)",
            f"there {spread(own_better, '.3f')} against {spread(own, '.3f')} at K-FAC's own γ: "
            f"{spread(blocks.own, '.2f')} times",
            f"at most two thirds, {RULE}",
            blocks.holds,
            net.recipe.departures,
            blocks.words(),
            {"tridiagonal": own_better[0], "diagonal": own[0], "gamma": net.gamma},
            earlier_rule=EARLIER,
            earlier_holds=blocks.held,
        ),
    )
    tilde, check, hat = (net.inverse(name, net.gamma) for name in ("kfac-full", "kfac", "kfac-tridiagonal"))
    caption = (
        "Left the exact inverse of F̃, middle F̌⁻¹ (top) and F̂⁻¹ (bottom), right the absolute difference; factored "
        f"Tikhonov damping at γ = {net.gamma:.2g}, K-FAC's own when it came to these weights. {_scale(BRIGHT_INVERSE)}"
    )
    return networks.outcome(claims, caption, _two_rows(net, tilde, check, hat, "^{-1}", BRIGHT_INVERSE))


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
    last = f"{titles[-1]}, {relative(left - right, left):#.2g} in norm"
    for ax, title in zip(axes, (*titles[:-1], last), strict=True):
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


def _times(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def _two_thirds(times: float) -> bool:
    return times <= 2 / 3
