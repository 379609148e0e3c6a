"""Benzing 2021, figures 1A and 5A: time of SGD, natural gradients, K-FAC and FOOF."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.papers.benzing.costs import METHODS, SCALES, Costs, Scale, costs, in_single
from fisherviz.papers.benzing.setting import RATES
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES
from fisherviz.papers.trials.problems import TITLES, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import compare
from fisherviz.papers.trials.words import protocol, spread
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy


@exhibit(
    "benzing.fig1a", "figure 1A: wall-clock time of SGD and natural gradients",
    shows="time of SGD and of natural gradients whose Fisher is inverted every T steps",
    desk=0.03, paper=4.0,
)  # fmt: skip
def fig1a(run: Run) -> Outcome:
    """Measure steps of natural gradients beside SGD's, and train with and without amortisation.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale, found = SCALES[run.scale], costs(run)
    often, rare = scale.periods[-1], scale.periods[0]
    name = "fashion-mnist" if at_hand("fashion-mnist", run) else "digits"
    trained, single = _amortised(name, scale, run), in_single(run)
    claims = (
        Claim(
            "the amortised version requires less than double the time of vanilla SGD", "section 3, figure 1A",
            f"{found.times('natural gradient', rare)} times SGD's CPU seconds at T = {rare} "
            f"({found.times('natural gradient', often)} at T = {often})",
            "less than 2 times", found.ratio("natural gradient", rare) < 2, _machine(scale, run),
            f"this at λ = {METHODS['natural gradient'][1]['damping']:g}, where Woodbury's difference is taken in "
            f"float64; at λ = 1, where float32 suffices, {single:.2f} times",
            {"ratio": found.ratio("natural gradient", rare), "single": single},
        ),
        Claim(
            "the same, read as operations, which no machine decides", "section 3, figure 1A",
            f"{found.times('natural gradient', rare, 'operations')} times SGD's multiplications and additions at T = "
            f"{rare} ({found.times('natural gradient', often, 'operations')} at T = {often})",
            "less than 2 times", found.ratio("natural gradient", rare, "operations") < 2, _width(scale),
            values={"ratio": found.ratio("natural gradient", rare, "operations")}, repeats=True,
        ),
        _inversion(found, scale, run),
        _equally(trained, name, scale),
    )  # fmt: skip
    details = (
        f"{_details(scale, run)}. Training: {TITLES[name]}, "
        f"{'all' if scale.limit is None else f'the first {scale.limit:,}'} training images, {scale.epochs} epochs; "
        f"{next(iter(trained.values())).effort}"
    )
    return _outcome(found, ("natural gradient",), claims, scale, run, details, protocol(trained))


@exhibit(
    "benzing.fig5a", "figure 5A: wall-clock time of FOOF, K-FAC and SGD",
    shows="time of SGD, FOOF and K-FAC whose matrices are inverted every T steps",
    desk=0.02, paper=0.1,
)  # fmt: skip
def fig5a(run: Run) -> Outcome:
    """Measure steps of FOOF and K-FAC beside SGD's.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale, found = SCALES[run.scale], costs(run)
    rare = scale.periods[0]
    speed = {of: found.ratio("K-FAC", rare, of) / found.ratio("FOOF", rare, of) for of in ("seconds", "operations")}
    pairs = [
        (T, found.ratio("FOOF", T, "operations"), found.ratio("K-FAC", T, "operations")) for T in scale.periods
    ]  # fmt: skip
    spare = {name: 1 - found.usual[name] / found.seconds[name][str(rare)] for name in ("FOOF", "K-FAC")}
    statement = "a 1.5x speed-up in wall-clock time per-update for the amortised versions of KFAC and FOOF"
    claims = (
        Claim(
            statement, "1.5 times (section 3, figure 5A)",
            f"{speed['seconds']:.2f} times at T = {rare} (CPU seconds: FOOF {found.times('FOOF', rare)}, K-FAC "
            f"{found.times('K-FAC', rare)} times SGD's)",
            "1.5 within 0.3", abs(speed["seconds"] - 1.5) <= 0.3, _machine(scale, run),
            values={"speed_up": speed["seconds"]},
        ),
        Claim(
            f"{statement}, read as operations, which no machine decides", "1.5 times (section 3, figure 5A)",
            f"{speed['operations']:.2f} times fewer multiplications and additions at T = {rare}",
            "1.5 within 0.3", abs(speed["operations"] - 1.5) <= 0.3, _width(scale),
            values={"speed_up": speed["operations"]}, repeats=True,
        ),
        Claim(
            "FOOF requires strictly less computation than KFAC", "section 3",
            "multiplications and additions, in those of SGD: "
            + ", ".join(f"{foof:.2f} against {kfac:.2f} at T = {T}" for T, foof, kfac in pairs),
            "fewer at every T", all(foof < kfac for _, foof, kfac in pairs), _width(scale),
            values={f"T{T}": kfac / foof for T, foof, kfac in pairs},
        ),
        Claim(
            "increasing T above 100 does not notably improve runtime", "caption of figure 5A",
            "steps that invert nothing at all take "
            + ", ".join(f"{100 * value:.1f} % less time than {name}'s at T = {rare}" for name, value in spare.items()),
            "at most 10 % less", max(spare.values()) <= 0.1, _machine(scale, run), values=spare,
        ),
    )  # fmt: skip
    return _outcome(found, ("FOOF", "K-FAC"), claims, scale, run, _details(scale, run), ())


def _outcome(
    found: Costs, names: tuple[str, ...], claims: tuple[Claim, ...], scale: Scale, run: Run, details: str, rows: Any
) -> Outcome:
    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, 2)
        for ax, of, label in zip(axes, ("seconds", "operations"), ("time", "operations"), strict=True):
            _bars(ax, found, names, scale, of)
            ax.set_ylabel(f"{label} of a step, in SGD's")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)

    caption = "Time and operations of a step, the mean over a cycle of T steps, in those of an SGD step (dotted)."
    setting = f"width {scale.width}, batch 100, one {'thread' if run.device == 'cpu' else run.device}"
    return Outcome(claims, setting, details, caption, draw(7.6, 3.2, fill), rows)


def _bars(ax: Axes, found: Costs, names: tuple[str, ...], scale: Scale, of: str) -> None:
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = [j + (i - (len(names) - 1) / 2) * width for j in range(len(scale.periods))]
        heights = [found.ratio(name, T, of) for T in scale.periods]
        drawn = ax.bar(x, heights, width * 0.92, color=STYLES[name].color, hatch="//" if i else None,
                       edgecolor="white", label=name)  # fmt: skip
        ax.bar_label(drawn, [f"{h:.1f}" for h in heights], fontsize=7)
    ax.axhline(1, color=STYLES["SGD"].color, linestyle=(0, (1, 1)), linewidth=1.2, label="SGD")
    ax.set_xticks(range(len(scale.periods)), [f"T = {T}" for T in scale.periods])
    tidy(ax)


def _width(scale: Scale) -> tuple[str, ...]:
    return () if scale.width == 1000 else (f"hidden layers of {scale.width} instead of 1000",)


def _machine(scale: Scale, run: Run) -> tuple[str, ...]:
    found = ("CPU seconds of one thread instead of a GPU's clock",) if run.device == "cpu" else ()
    return (*_width(scale), *found, "batches in memory instead of from a DataLoader")


def _details(scale: Scale, run: Run) -> str:
    return (
        f"ReLU network 784-{'-'.join([str(scale.width)] * 3)}-10, no biases, batch 100 of random numbers in memory, "
        f"float32, {'CPU seconds of this process on its threads' if run.device == 'cpu' else run.device}; forward, "
        f"backward and step; the methods' steps take turns, {', '.join(map(str, scale.cycles))} cycles of T = "
        f"{', '.join(map(str, scale.periods))}: medians of the steps that renew the matrices and of the others; "
        "operations are counted at the dispatcher"
    )


def _inversion(found: Costs, scale: Scale, run: Run) -> Claim:
    share = found.large["inverse"] / found.large["step"]
    counted = found.large["inverse_operations"] / found.large["step_operations"]
    return Claim(
        "the cost of inverting the D × D matrix is dominated by other factors even for batch sizes of 1000",
        "section 3",
        f"an explicit inverse, D = {scale.large}, takes {100 * share:.0f} % of the time of a step with such a Fisher",
        "less than half", share < 0.5, _machine(scale, run),
        f"{100 * counted:.0f} % of the operations", {"seconds": share, "operations": counted},
    )  # fmt: skip


def _amortised(name: str, scale: Scale, run: Run) -> dict[str, Trained]:
    options = (("hidden", (scale.width,) * 3),)
    problem = Problem(
        name, "foof-mlp", options, batch=100, limit=scale.limit, standardise=True, evaluated=scale.limit
    )  # fmt: skip
    grid = {"lr": RATES, "damping": tuple(float(f"1e{i}") for i in range(-6, 3, 2))}
    start = {"lr": 1e-5, "damping": 1e-4}
    found = [
        Method(f"natural gradient, T = {T}", "subsampled", {"T": T}, grid, start)
        for T in (scale.periods[0], scale.periods[-1])
    ]
    return compare(problem, found, problem.effort(scale.epochs, scale.epochs, scale.trials, scale.seeds), run)


def _equally(trained: Mapping[str, Trained], name: str, scale: Scale) -> Claim:
    rare, often = (one.last("train_loss") for one in trained.values())
    ratio = median(rare) / median(often)
    other = [] if name == "fashion-mnist" else [f"{TITLES[name]} instead of Fashion-MNIST"]
    other += _width(scale)
    other += [f"{scale.limit:,} training images instead of 60,000"] if scale.limit is not None else []
    other += [f"{scale.epochs} epochs instead of 10"] if scale.epochs != 10 else []
    return Claim(
        "the amortised version performs equally to the unamortised version", "section 3",
        f"final training loss {spread(rare)} at T = {scale.periods[0]}, {spread(often)} at T = {scale.periods[-1]}",
        "medians within a factor of 1.25", 0.8 <= ratio <= 1.25, tuple(other), values={"ratio": ratio},
    )  # fmt: skip
