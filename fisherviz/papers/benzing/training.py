"""Benzing 2021, figures 1B, 1C, 5B and 5C: training losses of five optimizers on two data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fisherviz.papers.benzing.panels import Comparison, data_sets, outcome, trained
from fisherviz.papers.benzing.setting import (
    ADAM,
    FOOF,
    FOOF_RARELY,
    FOOF_TUNED,
    KFAC,
    NATURAL,
    RARELY,
    SAME,
    SCALES,
    SGD,
    departures,
    mini_batches,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.trials.tuning import compare
from fisherviz.papers.trials.work import Run

BOTH = ("fashion-mnist", "mnist")


@exhibit(
    "benzing.fig1", "figures 1B and 1C: K-FAC against exact, subsampled natural gradients",
    shows="training loss of K-FAC, ten times lower than that of exact natural gradients, on Fashion-MNIST and MNIST",
    desk=0.09, paper=250.0,
)  # fmt: skip
def fig1(run: Run) -> Outcome:
    """Train SGD, Adam, K-FAC and three versions of the natural gradient on Fashion-MNIST and MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale, names = SCALES[run.scale], (SGD, ADAM, NATURAL, RARELY, SAME, KFAC)
    found = [trained(mini_batches(name, scale), names, run) for name in data_sets(BOTH, run)]
    claims = [
        ten_times(found),
        ten_times(found, RARELY, f"the Fisher renewed every {scale.amortised} steps"),
        ten_times(found, SAME, "the Fisher on the gradient's own mini-batch"),
        _amortised(found),
        _first_order(found),
    ]
    return outcome(claims, dict(zip("BC", found, strict=False)), found)


@exhibit(
    "benzing.fig5", "figures 5B and 5C: training loss of FOOF, K-FAC and the others",
    shows="training loss of FOOF, which is as low as K-FAC's or lower, on Fashion-MNIST and MNIST",
    desk=0.05, paper=150.0,
)  # fmt: skip
def fig5(run: Run) -> Outcome:
    """Train the five optimizers on Fashion-MNIST and MNIST, and FOOF with rare inversions by both settings.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale, found = SCALES[run.scale], []
    for name in data_sets(BOTH, run):
        setting = mini_batches(name, scale)
        one = trained(setting, (SGD, ADAM, NATURAL, KFAC, FOOF, FOOF_TUNED), run)
        problem, methods, effort = setting
        fixed = {**one.found[FOOF].options, "T": scale.amortised}
        rarely = replace(methods[FOOF], name=FOOF_RARELY, fixed=fixed, grid={}, start={})
        found.append(one.and_also(compare(problem, [rarely], effort, run)))
    claims = [
        similar(found),
        outperforms(found),
        efficient(found, KFAC, "Kronecker-factored approximations are considerably more data-efficient than standard "
                  "first-order methods", "at most half the", 2.0),
        efficient(found, FOOF, "FOOF is more efficient in progress per parameter update (here: than SGD and Adam)",
                  "below the", 1.0),
        stale(found, scale.amortised),
    ]  # fmt: skip
    return outcome(claims, dict(zip("BC", found, strict=False)), found)


def each(found: Sequence[Comparison], words: Callable[[Comparison], str]) -> str:
    """What is said of each data set."""
    return "; ".join(f"{one.problem.title}: {words(one)}" for one in found)


def _values(found: Sequence[Comparison], value: Callable[[Comparison], float]) -> dict[str, float]:
    return {one.problem.dataset: value(one) for one in found}


def _departures(found: Sequence[Comparison]) -> tuple[str, ...]:
    return departures(found[0].problem)


def ten_times(found: Sequence[Comparison], natural: str = NATURAL, reading: str = "") -> Claim:
    """Whether K-FAC is about ten times ahead of a version of the natural gradient.

    Args:
        found: of each data set.
        natural: which version.
        reading: what it is, where it is another than the paper's.
    """
    ratios = _values(found, lambda one: one.ratio(natural, KFAC))
    return Claim(
        "K-FAC reaches an approximately 10 times lower training loss than the exact subsampled natural gradients"
        + (f" (here: {reading})" if reading else ""),
        "approximately 10 times on both benchmarks (caption of figure 1)",
        each(found, lambda one: f"{one.ratio(natural, KFAC):.3g} times ({one.shown((natural, KFAC))})"),
        "at least 5 times on each data set (medians)",
        all(value >= 5 for value in ratios.values()),
        _departures(found),
        values=ratios,
        repeats=bool(reading),
    )


def _amortised(found: Sequence[Comparison]) -> Claim:
    ratios = _values(found, lambda one: one.ratio(RARELY, NATURAL))
    return Claim(
        "the amortised natural gradient performs equally to the unamortised version",
        "section 3 (no number in the text)",
        each(found, lambda one: one.shown((NATURAL, RARELY))),
        "the medians differ by at most a factor of 1.25 on each data set",
        all(0.8 <= value <= 1.25 for value in ratios.values()),
        _departures(found),
        values=ratios,
    )


def _first_order(found: Sequence[Comparison]) -> Claim:
    behind = {
        one.problem.dataset: min(one.ratio(NATURAL, SGD), one.ratio(NATURAL, ADAM)) for one in found
    }  # fmt: skip
    return Claim(
        "exact subsampled natural gradients end behind SGD and Adam",
        "no sentence in the text, which puts natural gradients behind K-FAC alone; so they do in the plots of the "
        "paper's later version",
        each(found, lambda one: one.shown((NATURAL, SGD, ADAM))),
        "the natural gradient's median loss is above those of SGD and Adam on each data set",
        all(value > 1 for value in behind.values()),
        _departures(found),
        values=behind,
    )


def similar(found: Sequence[Comparison]) -> Claim:
    """Whether FOOF ends as low as K-FAC.

    Args:
        found: of each data set.
    """
    ratios = _values(found, lambda one: one.ratio(FOOF, KFAC))
    return Claim(
        "FOOF performs similarly to, if not better than, K-FAC",
        "section 3 and figures 5B and 5C (no number in the text)",
        each(found, lambda one: one.shown((FOOF, KFAC))),
        "FOOF's median loss is at most 1.1 times K-FAC's on each data set",
        all(value <= 1.1 for value in ratios.values()),
        _departures(found),
        values=ratios,
    )


def outperforms(found: Sequence[Comparison]) -> Claim:
    """Whether FOOF ends below K-FAC, the caption's stronger word.

    Args:
        found: of each data set.
    """
    return Claim(
        "FOOF outperforms K-FAC in terms of per-update progress",
        "caption of figure 5 (no number; the later version of the paper finds K-FAC ahead on autoencoders)",
        each(found, lambda one: one.shown((FOOF, KFAC))),
        "every seed of FOOF ends below every seed of K-FAC on each data set",
        all(one.below(FOOF, (KFAC,)) for one in found),
        _departures(found),
        repeats=True,
    )


def efficient(found: Sequence[Comparison], name: str, statement: str, words: str, factor: float) -> Claim:
    """Whether a method is ahead of the better of SGD and Adam.

    Args:
        found: of each data set.
        name: of the method.
        statement: the paper's.
        words: of the rule.
        factor: how far ahead it has to be.
    """
    ahead = {
        one.problem.dataset: min(one.ratio(SGD, name), one.ratio(ADAM, name)) for one in found
    }  # fmt: skip
    return Claim(
        statement,
        "abstract (no number)",
        each(found, lambda one: one.shown((name, SGD, ADAM))),
        f"{name}'s median loss is {words} better one of SGD's and Adam's on each data set",
        all(value >= factor if factor > 1 else value > factor for value in ahead.values()),
        _departures(found),
        values=ahead,
    )


def stale(found: Sequence[Comparison], steps: int) -> Claim:
    """Whether rare inversions hurt FOOF.

    Args:
        found: of each data set.
        steps: between inversions.
    """
    ratios = _values(found, lambda one: one.ratio(FOOF_RARELY, FOOF))
    return Claim(
        "inverting AAᵀ every T steps only, a stale estimate of it, is not a problem",
        "section 2.1; FOOF (T = 100) has the hyperparameters of FOOF (T = 1) (appendix B.1)",
        f"T = {steps}: " + each(found, lambda one: one.shown((FOOF_RARELY, FOOF))),
        "the median loss is at most 1.25 times that of T = 1 on each data set",
        all(value <= 1.25 for value in ratios.values()),
        _departures(found),
        sensitivity="tuned with rare inversions: " + each(found, lambda one: one.shown((FOOF_TUNED,))),
        values=ratios,
    )
