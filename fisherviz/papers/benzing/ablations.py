"""Benzing 2021, figures 2, 3, 6 and 7: neither more data nor the blocks explain why K-FAC is ahead."""

from __future__ import annotations

from fisherviz.papers.benzing.panels import Comparison, begun, data_sets, outcome, trained, untuned
from fisherviz.papers.benzing.setting import (
    KFAC,
    LAYERWISE,
    NATURAL,
    ONE_BATCH,
    SCALES,
    SGD,
    full_batches,
    larger,
    mini_batches,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.trials.work import Run


@exhibit(
    "benzing.fig2", "figure 2: K-FAC's advantage is not due to more data, Fashion-MNIST",
    shows="training losses with the same data for both Fishers, with more data for the natural gradient's, and on "
          "1,000 images at once; K-FAC's is the lowest each time",
    desk=0.07, paper=200.0,
)  # fmt: skip
def fig2(run: Run) -> Outcome:
    """Train K-FAC and natural gradients with as much data for the Fisher, on Fashion-MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    return _data("fashion-mnist", "2", run)


@exhibit(
    "benzing.fig6", "figure 6: the same as figure 2 on MNIST",
    shows="training losses with the same data for both Fishers, with more data for the natural gradient's, and on "
          "1,000 images at once, as in figure 2",
    desk=0.07, paper=200.0,
)  # fmt: skip
def fig6(run: Run) -> Outcome:
    """Train K-FAC and natural gradients with as much data for the Fisher, on MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    return _data("mnist", "6", run)


@exhibit(
    "benzing.fig3", "figure 3: K-FAC's advantage is not due to the block-diagonal structure, Fashion-MNIST",
    shows="training losses of a network of one layer, and of layer-wise natural gradients in mini-batches and on 1,000 "
          "images at once; K-FAC's is the lowest each time",
    desk=0.09, paper=50.0,
)  # fmt: skip
def fig3(run: Run) -> Outcome:
    """Train K-FAC and natural gradients with the same blocks, on Fashion-MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    return _blocks("fashion-mnist", "3", run)


@exhibit(
    "benzing.fig7", "figure 7: the same as figure 3 on MNIST",
    shows="training losses of a network of one layer, and of layer-wise natural gradients in mini-batches and on 1,000 "
          "images at once, as in figure 3",
    desk=0.09, paper=50.0,
)  # fmt: skip
def fig7(run: Run) -> Outcome:
    """Train K-FAC and natural gradients with the same blocks, on MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    return _blocks("mnist", "7", run)


def _data(wanted: str, figure: str, run: Run) -> Outcome:
    (name,), scale = data_sets([wanted], run), SCALES[run.scale]
    more = tuple(map(larger, scale.larger))
    mini = trained(mini_batches(name, scale), (SGD, NATURAL, *more, KFAC, ONE_BATCH), run)
    full = _full(name, (SGD, NATURAL, KFAC), run)
    claims = (
        still_ahead(
            mini, ONE_BATCH, (NATURAL,), f"figure {figure}A",
            "with the same amount of data for both Fishers, K-FAC's advantage over natural gradients persists",
        ),
        no_better(mini, more, f"figure {figure}B"),
        still_ahead(
            mini, KFAC, (NATURAL, *more), f"figure {figure}B",
            "that K-FAC uses more data than subsampled natural gradients does not explain its better performance "
            "(here: it is ahead of those with more data, too)",
        ),
        still_ahead(
            full, KFAC, (SGD, NATURAL), f"figure {figure}C",
            "on a subset of 1,000 images in full batches, K-FAC still outperforms the other methods",
        ),
    )  # fmt: skip
    panels = {
        "A": mini.only(SGD, NATURAL, ONE_BATCH),
        "B": mini.only(NATURAL, *more, KFAC),
        "C": full.only(SGD, NATURAL, KFAC),
    }
    return outcome(claims, panels, (mini, full))


def _blocks(wanted: str, figure: str, run: Run) -> Outcome:
    (name,), scale = data_sets([wanted], run), SCALES[run.scale]
    mini = trained(mini_batches(name, scale), (SGD, LAYERWISE, KFAC), run)
    full = _full(name, (SGD, LAYERWISE, KFAC), run)
    layer = trained(full_batches(name, scale, hidden=False), (SGD, NATURAL, KFAC), run)
    claims = (
        still_ahead(
            layer, KFAC, (NATURAL,), f"figure {figure}A",
            "natural gradients do not perform as well as K-FAC in a network of one layer, where the block-diagonal "
            "Fisher is the Fisher",
        ),
        still_ahead(
            mini, KFAC, (LAYERWISE,), f"figure {figure}B",
            "K-FAC is ahead of layer-wise natural gradients in mini-batches: not the block-diagonal approximation "
            "explains its performance",
        ),
        still_ahead(
            full, KFAC, (LAYERWISE,), f"figure {figure}C",
            "K-FAC is ahead of layer-wise natural gradients on 1,000 images in full batches",
        ),
    )  # fmt: skip
    return outcome(claims, {"A": layer, "B": mini, "C": full.only(SGD, LAYERWISE, KFAC)}, (mini, full, layer))


def _full(name: str, methods: tuple[str, ...], run: Run) -> Comparison:
    """In full batches, tuned and not tuned, since trials from one seed may choose what does not last from others."""
    setting = full_batches(name, SCALES[run.scale])
    return trained(setting, methods, run).and_also(untuned(setting, methods, run).found)


def still_ahead(one: Comparison, name: str, others: tuple[str, ...], figure: str, statement: str) -> Claim:
    """Whether a method ends below others on every seed.

    Args:
        one: where.
        name: the method.
        others: what it is compared with.
        figure: where the paper says so.
        statement: what it says.
    """
    given = [begun(known) for known in (name, *others) if begun(known) in one.found]
    return Claim(
        statement,
        f"{figure} (no number in the text)",
        one.shown((name, *others)),
        f"every seed of {name} ends below every seed of {' and of '.join(others)}",
        one.below(name, others),
        one.departures,
        sensitivity=f"where the searches begin: {one.shown(given)}" if given else "",
        values={other: one.ratio(other, name) for other in others},
    )


def no_better(one: Comparison, more: tuple[str, ...], figure: str) -> Claim:
    """Whether larger samples for the Fisher leave the natural gradient where it was.

    Args:
        one: where.
        more: the natural gradients with more data.
        figure: where the paper says so.
    """
    ratios = {name: one.ratio(name, NATURAL) for name in more}
    return Claim(
        "natural gradients do not improve with more data for the Fisher",
        f"caption of {figure}: increasing sample size does not improve performance",
        one.shown((NATURAL, *more)),
        f"no median loss is below 0.8 times that of {NATURAL} with 100 examples",
        all(value >= 0.8 for value in ratios.values()),
        one.departures,
        values=ratios,
    )
