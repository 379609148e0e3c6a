"""Benzing 2021, figures 5B and 5C: training losses of five optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from fisherviz.papers.benzing.setting import SCALES, departures, setup
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import draw_curves, logarithmic
from fisherviz.papers.trials.problems import TITLES, Trained, at_hand
from fisherviz.papers.trials.tuning import compare
from fisherviz.papers.trials.words import settings_words, spread, stopped_words
from fisherviz.papers.trials.work import Run

PAPER = {"SGD": 0.14, "Adam": 0.11, "natural gradient": 0.18, "K-FAC": 0.007, "FOOF": 0.002}
"""Final training losses on Fashion-MNIST, read off the plots of the paper's later version."""


@exhibit(
    "benzing.fig5", "figures 5B and 5C: training loss of FOOF, K-FAC and the others",
    shows="training loss of the tuned optimizers over ten epochs on Fashion-MNIST and MNIST",
    desk=0.5, paper=40.0,
)  # fmt: skip
def fig5(run: Run) -> Outcome:
    """Train the five optimizers on Fashion-MNIST and MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale = SCALES[run.scale]
    names = [name for name in ("fashion-mnist", "mnist") if at_hand(name, run)] or ["digits"]
    found = {name: compare(*setup(name, scale), run) for name in names}
    effort = setup(names[0], scale)[2]
    other = departures(scale, names)
    claims = [_ten_times(found, other), _ahead(found, other)]
    if "fashion-mnist" in found:
        claims += [_number(name, one, other) for name, one in found["fashion-mnist"].items()]
    chosen = "; ".join(f"{TITLES[name]}: {settings_words(one)}{stopped_words(one)}" for name, one in found.items())
    details = (
        f"{' and '.join(TITLES[n] for n in names)} standardised, ReLU network with three hidden layers of "
        f"{scale.width}, no biases, batch 100, {scale.epochs} epochs"
        f"{'' if scale.limit is None else f' of the first {scale.limit:,} training images'}; "
        f"matrices renewed every {scale.amortised} steps, averages with decay 0.95, the natural gradient's Fisher on "
        f"an independent mini-batch; {effort}; chosen: {chosen}"
    )
    caption = "Training loss of the tuned optimizers (median and range of the seeds)."

    def fill(figure: Figure) -> None:
        axes = np.atleast_1d(figure.subplots(1, len(found)))
        for ax, (name, one) in zip(axes, found.items(), strict=True):
            draw_curves(ax, one, "train_loss")
            logarithmic(ax)
            ax.set_title(TITLES[name], fontsize=10)
        axes[0].set_ylabel("training loss")
        axes[0].legend(fontsize=7.5)

    setting = f"width {scale.width}, {scale.epochs} epochs, {scale.seeds} seeds, {scale.trials} trials each"
    return Outcome(tuple(claims), setting, details, caption, draw(4.8 * len(found), 3.6, fill))


def _ten_times(found: Mapping[str, Mapping[str, Trained]], other: tuple[str, ...]) -> Claim:
    ratios = {
        name: _ratio(one["natural gradient"].last("train_loss"), one["K-FAC"].last("train_loss"))
        for name, one in found.items()
    }
    return Claim(
        "K-FAC reaches an approximately 10 times lower training loss than the subsampled natural gradient",
        "approximately 10 times, both data sets",
        ", ".join(f"{TITLES[name]} {value:.3g} times" for name, value in ratios.items()),
        "at least 5 times on each data set (medians)",
        all(value >= 5 for value in ratios.values()),
        other,
        values=ratios,
    )


def _ahead(found: Mapping[str, Mapping[str, Trained]], other: tuple[str, ...]) -> Claim:
    losses = {name: (one["FOOF"].last("train_loss"), one["K-FAC"].last("train_loss")) for name, one in found.items()}
    ratios = {f"{name}_ratio": _ratio(foof, kfac) for name, (foof, kfac) in losses.items()}
    return Claim(
        "FOOF performs similarly to K-FAC, if not better",
        "figures 5B and 5C (about 0.002 against 0.007 on Fashion-MNIST)",
        "; ".join(f"{TITLES[n]}: FOOF {spread(foof)}, K-FAC {spread(kfac)}" for n, (foof, kfac) in losses.items()),
        "FOOF's median loss is at most 1.1 times K-FAC's on each data set",
        all(value <= 1.1 for value in ratios.values()),
        other,
        values=ratios,
    )


def _number(name: str, one: Trained, other: tuple[str, ...]) -> Claim:
    losses = one.last("train_loss")
    factor = median(losses) / PAPER[name]
    return Claim(
        f"{name}: training loss after 10 epochs on Fashion-MNIST",
        f"about {PAPER[name]:g} (read off a plot of the paper's later version)",
        spread(losses),
        "within a factor of 1.5",
        2 / 3 <= factor <= 1.5,
        other,
        values={"loss": median(losses)},
    )


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of the medians; a method that diverged is infinitely far behind."""
    first, second = median(above), median(below)
    return first / second if second < float("inf") else 0.0


# ---- figure 4A -------------------------------------------------------------------------------------------------
