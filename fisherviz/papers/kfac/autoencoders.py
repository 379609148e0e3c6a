"""Martens & Grosse 2015, figures 10 and 11: K-FAC and Nesterov's momentum on three deep autoencoders.

Logistic units, sparse initialisation, η = 1e-5, the better of the iterate and its average with ξ = 0.99. K-FAC
complete, diagonal and tridiagonal, with momentum and growing batches and without; both figures show the same runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from fisherviz import models
from fisherviz.papers.kfac.autoencoder_claims import (
    BASELINE,
    DIAGONAL,
    ERROR,
    ITERATIONS,
    PLAIN,
    SECONDS,
    STILL,
    TRIDIAGONAL,
    Compared,
    averaging,
    costlier,
    ends,
    rows,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, draw_band, logarithmic, over_seeds
from fisherviz.papers.trials.problems import Effort, Method, Problem, at_hand
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol, settings_words, stopped_words
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import MethodStyle, plain_decades, tidy

ETA, XI = 1e-5, 0.99
LOOKS = {**STYLES, PLAIN: MethodStyle("#767676", "v", (0, (3, 1)))}
DATA = {"MNIST": "mnist", "CURVES": "curves", "FACES": "faces-cut"}
CODES = {"MNIST": 30, "CURVES": 6, "FACES": 30}


@dataclass(frozen=True)
class Setting:
    """How much of a problem is run.

    Args:
        growing: effort of K-FAC with momentum, whose batches grow.
        still: of K-FAC without.
        plain: of the baselines.
        first: m₁ of the growing batches.
        full_at: iteration at which they hold all images.
        batch: images per step of the others.
        limit: training images; None: all.
        hidden: widths of the encoder; None: the paper's network.
    """

    growing: Effort
    still: Effort
    plain: Effort
    first: int
    full_at: int
    batch: int
    limit: int | None = None
    hidden: tuple[int, ...] | None = None


def _desk(steps: int, tried: int, plain: int, plain_tried: int, hidden: tuple[int, ...]) -> Setting:
    quick = Effort(steps, 4, seeds=3, trials=5, trial_steps=tried)
    return Setting(quick, quick, Effort(plain, 20, 3, 5, plain_tried), 250, steps, 250, 2000, hidden)


def _paper(steps: int, batch: int) -> Setting:
    return Setting(
        Effort(steps, 20, seeds=1, trials=5, trial_steps=100), Effort(2000, 40, 1, 5, 100),
        Effort(20_000, 250, 1, 12, 2000), 1000, 500, batch,
    )  # fmt: skip


SMOKE = Effort(steps=3, look=1, seeds=2, trials=1, trial_steps=1)
SETTINGS: dict[str, dict[str, Setting]] = {
    "smoke": {"MNIST": Setting(SMOKE, SMOKE, SMOKE, 40, 3, 40, 120, (12,))},
    "desk": {
        "CURVES": _desk(100, 30, 1000, 300, (200, 100, 50, 25)),
        "MNIST": _desk(40, 15, 400, 150, (500, 250, 125)),
        "FACES": _desk(40, 15, 600, 150, (500, 250, 125)),
    },
    "paper": {"CURVES": _paper(2000, 250), "MNIST": _paper(500, 500), "FACES": _paper(500, 500)},
}  # fmt: skip


def narrow_autoencoder(inputs: int, *, hidden: Sequence[int], code: int, generator: torch.Generator) -> nn.Sequential:
    """An autoencoder of the same make with other widths.

    Args:
        inputs: pixels.
        hidden: widths of the encoder's logistic layers.
        code: units of the linear code.
        generator: where the weights come from.
    """
    sizes = (inputs, *hidden, code, *hidden[::-1], inputs)
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if place not in (len(hidden), len(sizes) - 2):
            layers.append(nn.Sigmoid())
    return models.sparse_init(nn.Sequential(*layers), generator=generator)


def methods(schedule: bool) -> tuple[Method, ...]:
    """Both baselines and four versions of K-FAC; λ₀ is to these what its learning rate is to a baseline.

    Args:
        schedule: whether trials are long enough for μ's schedule to come to its bound, which is then tuned too.
    """
    rates = tuple(float(f"{a}e{i}") for i in range(-5, 0) for a in (1, 3))
    bound = {"momentum": (0.9, 0.99, 0.995, 0.999)} if schedule else {}
    fixed: dict[str, Any] = {"weight_decay": ETA} | ({} if schedule else {"momentum": 0.99})
    found = [
        Method(BASELINE, "nesterov", fixed, {"lr": rates, **bound}, {"lr": 0.01} | dict.fromkeys(bound, 0.99)),
        Method(PLAIN, "sgd", {"weight_decay": ETA}, {"lr": rates}, {"lr": 0.01}),
    ]
    grid = {"damping": (0.00015, 0.0015, 0.015, 0.15, 1.5, 15.0, 150.0)}  # the paper starts from 150
    for words, momentum in (("", None), (STILL, 0.0)):
        for name, inverse in ((DIAGONAL, "block-diagonal"), (TRIDIAGONAL, "block-tridiagonal")):
            fixed = {"inverse": inverse, "weight_decay": ETA, "momentum": momentum}
            found.append(Method(f"{name}{words}", "kfac", fixed, grid, {"damping": 0.15}))
    return tuple(found)


def settings(run: Run) -> dict[str, Setting]:
    """The problems that can be run, with how much of them; smoke has one, on digits."""
    if run.scale == "smoke":
        return SETTINGS["smoke"]
    return {
        title: setting for title, setting in SETTINGS[run.scale].items()
        if DATA[title] == "curves" or at_hand(DATA[title], run)
    }  # fmt: skip


def problem(title: str, setting: Setting, small: bool) -> Problem:
    """The problem as the methods without growing batches train it.

    Args:
        title: "MNIST", "CURVES" or "FACES".
        setting: how much of it.
        small: whether digits stand in.
    """
    name = "digits" if small else DATA[title]
    known = setting.hidden is None
    network = f"{title.lower()}-autoencoder" if known else f"{__name__}:narrow_autoencoder"
    options = () if known else (("hidden", setting.hidden), ("code", 3 if small else CODES[title]))
    return Problem(
        name, network, options, batch=setting.batch, limit=setting.limit, task="autoencoder", averaging=XI,
        evaluated=setting.limit,
    )  # fmt: skip


def mean_image(of: Problem, run: Run) -> float:
    """Squared error of the mean training image, where autoencoders stand for a while."""

    def measure() -> dict[str, Any]:
        targets = of.data().train.targets.double()
        return {"error": float((targets - targets.mean(0)).square().sum(1).mean())}

    what = {"measurement": "squared error of the mean image", "dataset": of.dataset, "limit": of.limit}
    return float(kept(what, measure, run)["error"])


def compared(run: Run) -> dict[str, Compared]:
    """All methods tuned and trained on every problem.

    Args:
        run: scale, seed and device.
    """
    small = run.scale == "smoke"
    tasks, titles = [], []
    for title, setting in settings(run).items():
        still = problem(title, setting, small)
        growing = replace(still, batch=setting.first, full_at=setting.full_at)
        for method in methods(setting.plain.trial_steps >= 500):
            if method.name in (BASELINE, PLAIN):
                tasks.append((still, method, setting.plain))
            elif method.name.endswith(STILL):
                tasks.append((still, method, setting.still))
            else:
                tasks.append((growing, method, setting.growing))
            titles.append(title)
    found: dict[str, dict[str, Any]] = {}
    for title, one in zip(titles, tuned(tasks, run), strict=True):
        found.setdefault(title, {})[one.method.name] = one
    return {
        title: Compared(methods, mean_image(problem(title, SETTINGS[run.scale][title], small), run))
        for title, methods in found.items()
    }


@exhibit(
    "kfac.fig10", "figure 10: K-FAC and Nesterov on three autoencoders, against time",
    shows="training error over computation time, K-FAC with momentum far below the baseline, without it no better",
    desk=0.35, paper=36.0,
)  # fmt: skip
def fig10(run: Run) -> Outcome:
    """Train three autoencoders with two baselines and four versions of K-FAC, and look at the seconds.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    problems, other = compared(run), departures(run)
    claims = (*rows(SECONDS, problems, other), costlier(problems, other))
    return _outcome(run, problems, claims, "seconds", "seconds of a processor in the steps")


@exhibit(
    "kfac.fig11", "figure 11: K-FAC and Nesterov on three autoencoders, against iterations",
    shows="training error over iterations, with and without momentum, both K-FACs with momentum far below the baseline",
    desk=0.0, paper=0.0,  # figure 10's runs
)  # fmt: skip
def fig11(run: Run) -> Outcome:
    """The runs of figure 10, by iterations.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    problems, other = compared(run), departures(run)
    claims = (*rows(ITERATIONS, problems, other), averaging(problems, other))
    return _outcome(run, problems, claims, "step", "iteration")


def departures(run: Run) -> tuple[str, ...]:
    """Where the setting differs from the paper's."""
    if run.scale == "smoke":
        return ("digits instead of three data sets", "a smaller network", "3 iterations")
    present = settings(run)
    found = [
        "CURVES drawn anew, FACES cut anew from the Olivetti faces", "K-FAC's λ₀ tuned instead of 150",
        "another machine",
    ]  # fmt: skip
    found += [f"{title} left out, its files not being at hand" for title in DATA if title not in present]
    if run.scale == "desk":
        found += [
            "2,000 images of each set", "networks of half the width, CURVES without its first layer",
            "40 to 100 iterations of K-FAC and 400 to 1,000 of the baselines instead of thousands",
        ]  # fmt: skip
    return tuple(found)


def _outcome(
    run: Run, problems: Mapping[str, Compared], claims: tuple[Claim, ...], over: str, label: str
) -> Outcome:  # fmt: skip
    present = settings(run)
    whole = {f"{title}, {name}": one for title, p in problems.items() for name, one in p.found.items()}
    sizes = "; ".join(
        f"{title}: {setting.limit or 'all'} images, encoder "
        + ("as in the paper" if setting.hidden is None else "-".join(map(str, setting.hidden)))
        + f", {setting.growing.steps} iterations of K-FAC with batches from {setting.first} to all at "
        f"{setting.full_at}, {setting.still.steps} without momentum with batches of {setting.batch}, "
        f"{setting.plain.steps} of the baselines"
        for title, setting in present.items()
    )
    details = (
        f"{sizes}; logistic units, linear code, sparse initialisation, η = {ETA:g}; K-FAC with T₁ = 5, T₂ = T₃ = 20, "
        "τ₁ = 1/8, τ₂ = 1/4, λ₀ tuned; Nesterov's momentum on Sutskever's schedule; the better of the iterate and its "
        f"average with ξ = {XI:g} counts; medians and ranges of seeds that no trial saw; at the end: {ends(problems)}; "
        f"chosen: {settings_words(whole)}{stopped_words(whole)}"
    )
    caption = (
        f"Squared reconstruction error of the training images over the {label}; median and range of the seeds. Grey: "
        "the mean image."
    )

    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, len(problems), squeeze=False)[0]
        for ax, (title, one) in zip(axes, problems.items(), strict=True):
            _panel(ax, one, over)
            tidy(ax, title)
        axes[0].set_ylabel("squared error of an image")
        figure.supxlabel(label, fontsize=8)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)

    setting = f"{', '.join(problems)} autoencoders, {_seeds(present)}"
    return Outcome(claims, setting, details, caption, draw(7.2, 3.6, fill), protocol(whole))


def _seeds(present: Mapping[str, Setting]) -> str:
    seeds = next(iter(present.values())).growing.seeds
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def _panel(ax: Axes, one: Compared, over: str) -> None:
    for name, method in one.found.items():
        curves = [run["curve"][1:] for run in method.runs]  # a logarithmic axis has no zero
        if any(curves):
            x, values = over_seeds(curves, over, ERROR)
            draw_band(ax, x, values, LOOKS[name], name, markersize=3, markevery=max(1, len(x) // 6), linewidth=1.2)
    ax.axhline(one.mean_image, color="#999999", linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    logarithmic(ax)
    ax.set_ylim(top=min(ax.get_ylim()[1], 2 * one.mean_image))  # all fall steeply to the mean image
    low, high = ax.get_xlim()
    plain_decades(ax.xaxis, high / low)
