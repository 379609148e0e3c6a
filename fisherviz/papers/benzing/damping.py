"""Benzing 2021, figures 4B, 4C and 8: K-FAC and FOOF against damping, the learning rate tuned for each damping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from fisherviz.papers.benzing.similarity import Looks, draw_similarity, looks, similarity_claims
from fisherviz.papers.benzing.sweeps import (
    FOOF,
    KFAC,
    PRODUCT,
    Sweep,
    dataset,
    departures,
    draw_sweep,
    rows,
    setting_words,
    sweeps,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run

LOOKS = {KFAC: STYLES["K-FAC"], PRODUCT: STYLES["natural gradient"], FOOF: STYLES["FOOF"]}
Swept = Mapping[str, Sweep]
CAPTION = "Final training loss against damping (median and range of the seeds); the learning rate is tuned for each."


@exhibit(
    "benzing.fig4b", "figure 4B: K-FAC's performance against damping",
    shows="the training loss of K-FAC for different damping strengths, which falls with damping",
    desk=0.03, paper=80.0,
)  # fmt: skip
def fig4b(run: Run) -> Outcome:
    """Train K-FAC at each damping, of its factors and of their product.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    name = dataset("mnist", run)
    swept, other = sweeps(name, (KFAC, PRODUCT), run), departures("mnist", name, run)
    claims = (*_increases(swept[KFAC], "4B", other), _factored(swept, other))
    return _outcome(name, swept, claims, run)


@exhibit(
    "benzing.fig4c", "figure 4C: FOOF's performance against damping",
    shows="the training loss of FOOF for different damping strengths, to which that of K-FAC comes close",
    desk=0.02, paper=20.0,
)  # fmt: skip
def fig4c(run: Run) -> Outcome:
    """Train FOOF at each damping, beside K-FAC.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    name = dataset("mnist", run)
    swept, other = sweeps(name, (FOOF, KFAC), run), departures("mnist", name, run)
    return _outcome(name, swept, (_similar(swept, "4C", other), _ahead(swept, "4C", other)), run)


@exhibit(
    "benzing.fig8", "figure 8: the same as figure 4 on Fashion-MNIST",
    shows="K-FAC's similarity to FOOF, its training loss and that of FOOF against damping, on Fashion-MNIST",
    desk=0.06, paper=50.0,
)  # fmt: skip
def fig8(run: Run) -> Outcome:
    """Measure figure 4 on Fashion-MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    name = dataset("fashion-mnist", run)
    seen, swept = looks(name, run), sweeps(name, (KFAC, FOOF), run)
    other = departures("fashion-mnist", name, run)
    claims = (
        *similarity_claims(seen, "8A", seen.departures("fashion-mnist")),
        *_increases(swept[KFAC], "8B", other), _similar(swept, "8C", other), _ahead(swept, "8C", other),
    )  # fmt: skip
    return _outcome(name, swept, claims, run, seen)


def _outcome(name: str, swept: Swept, claims: tuple[Claim, ...], run: Run, seen: Looks | None = None) -> Outcome:
    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, 1 if seen is None else 2, squeeze=False)[0]
        if seen is not None:
            draw_similarity(axes[0], seen)
        _draw(axes[-1], swept)

    short, long = setting_words(name, swept, run)
    details = f"{long}. Dampings are for means over the batch; K-FAC's factors are damped as in equation 3"
    caption = CAPTION if seen is None else f"Left: {seen.caption} Right: {CAPTION[0].lower()}{CAPTION[1:]}"
    if seen is not None:
        details = f"{details}. Similarity: {seen.details}"
    picture = draw(5.2 if seen is None else 9.6, 3.6, fill)
    return Outcome(claims, short, details, caption, picture, rows(swept))


def _draw(ax: Axes, swept: Swept) -> None:
    for name, sweep in swept.items():
        draw_sweep(ax, sweep, LOOKS[name])
    ax.legend(fontsize=8)


def _increases(sweep: Sweep, figure: str, other: tuple[str, ...]) -> tuple[Claim, Claim]:
    """Performance up to the best damping, and over the whole grid."""
    medians, best = sweep.medians, sweep.best
    rising = max((_ratio(after, before) for before, after in pairwise(medians[: best + 1])), default=math.inf)
    gain = _ratio(medians[0], medians[best])
    rank = float(spearmanr(sweep.dampings, medians).statistic)
    statement = "the performance of KFAC increases with larger damping"
    where = f"section 3, figure {figure} (no number in the text, nor the dampings that are drawn)"
    return (
        Claim(
            statement, where,
            f"median final training loss {sweep.words}; up to the best each at most {rising:.2f} times that before",
            "up to the damping with the smallest median loss no median exceeds 1.1 times the one before it, and the "
            "loss at the smallest damping is at least twice the smallest",
            rising <= 1.1 and gain >= 2, other, values={"gain": gain, "rising": rising},
        ),
        Claim(
            f"{statement}, read over the whole grid of appendix B.1", where,
            f"Spearman's rank correlation of damping and median loss {rank:+.2f}",
            "at most -0.7", rank <= -0.7, other, values={"rank": rank}, repeats=True,
        ),
    )  # fmt: skip


def _factored(swept: Swept, other: tuple[str, ...]) -> Claim:
    factors, product = swept[KFAC], swept[PRODUCT]
    first, second = factors.medians[factors.best], product.medians[product.best]
    ahead = sum(a < b for a, b in zip(factors.medians, product.medians, strict=True))
    return Claim(
        "damping factors leads to better performance than damping the product",
        "section 3, which quotes Martens & Grosse 2015 (no number in the text)",
        f"at the best damping of each: factors {_best(factors)}, product {_best(product)}",
        "the smallest median loss with damped factors is below the smallest with a damped product",
        first < second,
        other,
        f"factors are ahead at {ahead} of {len(factors.medians)} dampings",
        {"factors": first, "product": second},
    )


def _similar(swept: Swept, figure: str, other: tuple[str, ...]) -> Claim:
    foof = swept[FOOF].medians[swept[FOOF].best]
    kfac = swept[KFAC]
    ratios = [_ratio(value, foof) for value in kfac.medians]
    start, end = (_distance(ratio) for ratio in (ratios[0], ratios[kfac.best]))
    same = [_ratio(a, b) for a, b in zip(kfac.medians, swept[FOOF].medians, strict=True)]
    return Claim(
        "with larger damping the performance of KFAC becomes more similar to the performance of FOOF",
        f"section 3, figure {figure} (no number in the text)",
        f"K-FAC's median loss is {_times(ratios[0])} FOOF's at its best damping (λ = "
        f"{swept[FOOF].dampings[swept[FOOF].best]:g}) at the smallest damping, {_times(ratios[kfac.best])} at the best",
        "the logarithm of that ratio is at the best damping at most half as far from 0 as at the smallest",
        kfac.best > 0 and end <= start / 2,
        other,
        f"at the same damping: from {_times(same[0])} at the smallest to {_times(same[-1])} at the largest",
        {"smallest": ratios[0], "best": ratios[kfac.best]},
    )


def _ahead(swept: Swept, figure: str, other: tuple[str, ...]) -> Claim:
    foof, kfac = swept[FOOF], swept[KFAC]
    ratio = _ratio(foof.medians[foof.best], kfac.medians[kfac.best])
    return Claim(
        "FOOF performs similarly to, if not better than, KFAC",
        f"section 3, from figures {figure[0]}B and {figure} (figures 5B and 5C have the same claim)",
        f"at the best damping of each: FOOF {_best(foof)}, K-FAC {_best(kfac)}",
        "FOOF's smallest median loss is at most 1.1 times K-FAC's",
        ratio <= 1.1,
        other,
        values={"ratio": ratio},
        repeats=True,
    )


def _ratio(above: float, below: float) -> float:
    """Of two losses; those that diverged are equal."""
    return above / below if math.isfinite(above) or math.isfinite(below) else 1.0


def _distance(ratio: float) -> float:
    """Of its logarithm from 0."""
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _best(sweep: Sweep) -> str:
    return f"{spread(sweep.losses[sweep.best].tolist())} at λ = {sweep.dampings[sweep.best]:g}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if math.isfinite(ratio) else "(diverged) any number of times"
