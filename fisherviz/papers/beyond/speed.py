"""Which approximation's direction is closest to the exact natural gradient, and which trains fastest."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from fisherviz.papers.beyond.along import OWN, closeness, departures, network_words, problem_of
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, logarithmic
from fisherviz.papers.trials.problems import Effort, Method, Trained
from fisherviz.papers.trials.tuning import compare
from fisherviz.papers.trials.words import protocol, settings_words, spread, stopped_words
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy

RATES = tuple(float(f"{a}e{i}") for i in range(-4, 1) for a in (1, 3))
DAMPINGS = tuple(float(f"1e{i}") for i in range(-5, 1))
EXACT = "natural gradient"
OWN_NAMES = {
    "SGD": "identity", "diagonal": "diagonal", "CW-NGD": "cw-ngd", "FOOF": "foof", "K-FAC": "kfac", "EKFAC": "ekfac",
    "K-FAC tridiagonal": "kfac-tridiagonal",
}  # fmt: skip
"""The lines of the comparison, and the approximations whose directions they take."""
EFFORTS = {
    "smoke": Effort(steps=4, look=2, seeds=2, trials=1, trial_steps=2),
    "desk": Effort(steps=300, look=100, seeds=3, trials=6, trial_steps=100),
    "paper": Effort(steps=3000, look=600, seeds=5, trials=12, trial_steps=600),
}


def methods() -> tuple[Method, ...]:
    """Every direction with the same step: learning rate, damping, a Fisher by the model's labels, no momentum."""
    found = [Method("SGD", "sgd", {}, {"lr": RATES}, {"lr": 0.1})]
    grid: dict[str, Any] = {"lr": RATES, "damping": DAMPINGS}
    start = {"lr": 0.1, "damping": 0.01}
    for title, name in OWN_NAMES.items():
        if name != "identity":
            fixed = {"method": name, "kind": "mc"}
            found.append(Method(title, "natural-gradient", fixed, grid, start))
    found.append(Method(EXACT, "subsampled", {"fisher_data": "same"}, grid, start))
    return tuple(found)


@exhibit(
    "beyond.speed", "the direction closest to the exact natural gradient, and the one that trains fastest",
    shows="nothing: whether closeness to the natural gradient is what makes a method fast",
    desk=0.1, paper=6.0,
)  # fmt: skip
def speed(run: Run) -> Outcome:
    """Tune and train by every direction, beside its cosine with the exact natural gradient.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    problem, effort = problem_of(run), EFFORTS[run.scale]
    found = compare(problem, methods(), effort, run)
    cosines, other = closeness(run), departures(run)
    claims = (_alike(found, cosines, other), _exact_is_fastest(found, other))

    def fill(figure: Figure) -> None:
        ax = figure.subplots()
        for title, name in OWN_NAMES.items():
            losses, look = found[title].last("train_loss"), STYLES[title]
            x, y = median(cosines[name]), median(losses)
            ax.plot(x, y, look.marker, color=look.color, markersize=8, linestyle="")
            ax.vlines(x, min(losses), max(losses), color=look.color, linewidth=1.5)
            ax.annotate(title, (x, y), (7, 4), textcoords="offset points", fontsize=8)
        ax.axhline(
            median(found[EXACT].last("train_loss")), color="black", linewidth=1, linestyle=(0, (4, 2)),
            label=f"exact {EXACT}",
        )  # fmt: skip
        ax.margins(x=0.16)
        ax.legend(fontsize=8)
        ax.set_xlabel("cosine with the exact natural gradient (mean over steps and dampings)")
        ax.set_ylabel(f"training loss after {effort.steps} steps")
        logarithmic(ax)
        tidy(ax)

    details = (
        f"{network_words(run)}, batch {problem.batch}, one label drawn for each example, averages with decay 0.95, no "
        f"momentum; the exact natural gradient's Fisher is the mini-batch's own; {effort}; chosen: "
        f"{settings_words(found)}{stopped_words(found)}"
    )
    caption = (
        "Training loss (median, bars over the seeds) against the cosine of the method's direction with the exact "
        "natural gradient along a training by SGD; dashed: where the exact natural gradient of the mini-batch ends."
    )
    setting = f"{problem.title}, {effort.steps} steps, {effort.seeds} seeds, {effort.trials} trials each"
    return Outcome(claims, setting, details, caption, draw(6.4, 4.2, fill), protocol(found))


def _alike(found: Mapping[str, Trained], cosines: Mapping[str, list[float]], other: tuple[str, ...]) -> Claim:
    losses = {title: median(found[title].last("train_loss")) for title in OWN_NAMES}
    near = {title: median(cosines[name]) for title, name in OWN_NAMES.items()}
    correlation = float(spearmanr(list(near.values()), list(losses.values())).statistic)
    closest, fastest = max(near, key=near.__getitem__), min(losses, key=losses.__getitem__)
    shown = ", ".join(f"{title} {near[title]:.2f} and {losses[title]:.3g}" for title in OWN_NAMES)
    return Claim(
        "the closer a method's direction is to the exact natural gradient's, the faster it trains",
        f"{OWN}; what approximating the natural gradient is for, and what Benzing's abstract doubts",
        f"rank correlation of cosine and loss {correlation:+.2f}; closest {closest}, fastest {fastest} (cosine and "
        f"loss: {shown})",
        "the rank correlation over the methods is at most -0.7, and the closest is the fastest",
        correlation <= -0.7 and closest == fastest,
        other,
        values={"rank_correlation": correlation},
    )


def _exact_is_fastest(found: Mapping[str, Trained], other: tuple[str, ...]) -> Claim:
    exact = found[EXACT].last("train_loss")
    ahead = [title for title in OWN_NAMES if median(found[title].last("train_loss")) < median(exact)]
    return Claim(
        "the exact natural gradient of the mini-batch trains slower than K-FAC",
        "Benzing 2021, abstract, on other networks",
        f"exact {spread(exact)}, K-FAC {spread(found['K-FAC'].last('train_loss'))}; ahead of the exact one: "
        f"{', '.join(ahead) or 'none'}",
        "K-FAC's median loss is lower",
        "K-FAC" in ahead,
        other,
        values={"exact": median(exact), "kfac": median(found["K-FAC"].last("train_loss"))},
    )
