"""Along training: approximations beside the floor of Kronecker products, the empirical Fisher, directions.

The network is the K-FAC paper's, 256-20-20-20-20-20-10 with tanh, trained by SGD with momentum. Errors are of its
middle four layers, whose Fisher is exact and dense, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fisherviz.comparison.compare import compare
from fisherviz.datasets import Dataset
from fisherviz.exact.fisher import Fisher
from fisherviz.network.likelihoods import resolve
from fisherviz.papers.kfac.network import MIDDLE
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, draw_band
from fisherviz.papers.trials.problems import Problem, at_hand, build
from fisherviz.papers.trials.steps import advance
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import MethodStyle, tidy
from fisherviz.probe import Probe
from fisherviz.training.data import Batches, Position

FLOOR = "nearest-kronecker"
LOOKS = {
    "kfac": STYLES["K-FAC"],
    "ekfac": MethodStyle("#E69F00", "v", (0, (3, 1))),
    "diagonal": MethodStyle("#767676", "s", (0, (1, 1))),
    "cw-ngd": STYLES["CW-NGD"],
    FLOOR: MethodStyle("#000000", "x", "-"),
}
"""The approximations whose error is looked at: those that keep F's scale."""
DIRECTIONS = ("identity", "diagonal", "cw-ngd", "foof", "kfac", "ekfac", "kfac-tridiagonal")
"""Those whose directions are compared with the exact natural gradient's."""
OWN = "not in the papers"


@dataclass(frozen=True)
class Scale:
    """How much is measured; the setting is our own."""

    limit: int
    examples: int
    steps: tuple[int, ...]
    seeds: int
    width: int = 20
    size: int = 16
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)


SCALES = {
    "smoke": Scale(200, 60, (0, 10), 2, width=6, size=8, dampings=(1e-2,)),
    "desk": Scale(6000, 1000, (0, 10, 30, 100, 300, 1000), 3),
    "paper": Scale(60_000, 5000, (0, 10, 30, 100, 300, 1000, 3000, 10_000), 5),
}


def problem_of(run: Run) -> Problem:
    """The network and its data, MNIST where it is at hand."""
    name = "mnist" if at_hand("mnist", run) else "digits"
    scale = SCALES[run.scale]
    hidden = (("hidden", (scale.width,) * 5),)
    return Problem(name, "kfac-mlp", hidden, batch=100, limit=scale.limit, size=scale.size)


def departures(run: Run) -> tuple[str, ...]:
    """From the data that the claims are about."""
    found = () if at_hand("mnist", run) else ("digits instead of MNIST",)
    return found if SCALES[run.scale].width == 20 else (*found, "a smaller network")


def network_words(run: Run) -> str:
    """Data and network, in words."""
    scale, problem = SCALES[run.scale], problem_of(run)
    sizes = "-".join(map(str, (scale.size**2, *(scale.width,) * 5, 10)))
    images = f"{problem.title} scaled to {scale.size} × {scale.size}, {problem.examples:,} training images"
    return f"{images}, tanh network {sizes}"


@exhibit(
    "beyond.floor", "the error of every approximation beside the nearest Kronecker product's, along training",
    shows="nothing: how much of K-FAC's error any Kronecker product has, from the first step to the last",
    desk=0.43, paper=5.0,
)  # fmt: skip
def floor(run: Run) -> Outcome:
    """Follow the errors of the layers' blocks along training.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    found, steps, other = _along(run), SCALES[run.scale].steps, departures(run)
    errors = {name: _layers(found, "exact", name) for name in LOOKS}
    trained_steps = range(1, len(steps))
    above = {name: values / errors[FLOOR] for name, values in errors.items()}
    kfac, ekfac = (np.median(above[name], axis=2) for name in ("kfac", "ekfac"))
    claims = (
        Claim(
            "K-FAC's factors are nearly the best that a Kronecker product can be, all along training",
            f"{OWN}; the K-FAC paper's section 3 calls F̃ fairly accurate",
            f"K-FAC's error over the floor's, median layer: {_through(kfac, steps)}",
            "at most 1.25 after every step that is looked at, 0 aside, on every seed",
            bool(kfac[:, trained_steps].max() <= 1.25),
            other,
            values={"largest": float(kfac[:, trained_steps].max())},
        ),
        Claim(
            "EKFAC's error is never above K-FAC's",
            f"{OWN}; George et al. 2018, theorem",
            f"EKFAC's error over K-FAC's, largest of all layers, steps and seeds: "
            f"{(errors['ekfac'] / errors['kfac']).max():.4f}; over the floor's, median layer: {_through(ekfac, steps)}",
            "at most 1 + 1e-9 for every layer, step and seed",
            bool((errors["ekfac"] / errors["kfac"]).max() <= 1 + 1e-9),
            other,
            values={"largest": float((errors["ekfac"] / errors["kfac"]).max())},
        ),
        Claim(
            "the units' blocks, each of them exact, leave a larger error than the Kronecker factors",
            f"{OWN}; CW-NGD keeps what K-FAC approximates and drops what K-FAC keeps",
            f"CW-NGD's error, median layer: {_through(np.median(errors['cw-ngd'], axis=2), steps)}; K-FAC's: "
            f"{_through(np.median(errors['kfac'], axis=2), steps)}",
            "CW-NGD's median is above K-FAC's after every step that is looked at, on every seed",
            bool((np.median(errors["cw-ngd"], axis=2) > np.median(errors["kfac"], axis=2)).all()),
            other,
            values={"smallest_gap": float((np.median(errors["cw-ngd"] - errors["kfac"], axis=2)).min())},
        ),
    )

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for name, look in LOOKS.items():
            draw_band(left, _places(steps), np.median(errors[name], axis=2), look, name, markersize=4)
            if name in ("kfac", "ekfac"):
                draw_band(right, _places(steps), np.median(above[name], axis=2), look, name, markersize=4)
        right.axhline(1.0, color="black", linewidth=1)
        left.set_title("‖F − F̂‖ / ‖F‖ of a layer's block", fontsize=10)
        right.set_title("over that of the nearest Kronecker product", fontsize=10)
        left.legend(fontsize=8)
        right.legend(fontsize=8)
        for ax in (left, right):
            _steps_below(ax, steps)

    caption = "Relative error of the middle four layers' blocks after steps of SGD, median layer (band: the seeds)."
    return _outcome(claims, caption, draw(9.2, 3.6, fill), run)


@exhibit(
    "beyond.empirical", "the empirical Fisher beside the exact one, along training",
    shows="nothing: whether CW-NGD's assumption holds better for the empirical Fisher, which its paper uses",
    desk=0.0, paper=0.0,
)  # fmt: skip
def empirical(run: Run) -> Outcome:
    """Follow what the two Fishers have in common, and what lies off their units' blocks.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    found, steps, other = _along(run), SCALES[run.scale].steps, departures(run)
    shares = {kind: np.median(_layers(found, kind, "off_unit_share"), axis=2) for kind in ("exact", "empirical")}
    cosine, ratio = (np.array([[look[key] for look in one] for one in found]) for key in ("cosine", "scale"))
    claims = (
        Claim(
            "different units' gradients are nearer to independent under the empirical Fisher than the exact one",
            f"{OWN}; Sang et al. assume it (equations 5 to 7) and use the empirical Fisher (equation 1)",
            f"share of ‖F‖² off the units' blocks, median layer: exact {_through(shares['exact'], steps)}; empirical "
            f"{_through(shares['empirical'], steps)}",
            "the empirical Fisher's share is the smaller after every step that is looked at, on every seed",
            bool((shares["empirical"] < shares["exact"]).all()),
            other,
            values={"largest_gap": float((shares["empirical"] - shares["exact"]).max())},
        ),
        Claim(
            "the empirical Fisher is a different matrix, not a sample of the exact one",
            "the K-FAC paper, section 2 and footnote 3",
            f"cosine of the two: {_through(cosine, steps)}; ‖empirical‖ / ‖exact‖: {_through(ratio, steps)}",
            "the cosine is below 0.9 after the last step, on every seed",
            bool(cosine[:, -1].max() < 0.9),
            other,
            values={"cosine": float(np.median(cosine[:, -1]))},
        ),
    )

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for kind, look in (("exact", STYLES["natural gradient"]), ("empirical", STYLES["K-FAC"])):
            draw_band(left, _places(steps), shares[kind], look, kind, markersize=4)
        draw_band(right, _places(steps), cosine, STYLES["SGD"], "cosine", markersize=4)
        left.set_title("share of ‖F‖² off the units' blocks", fontsize=10)
        right.set_title("cosine of the empirical with the exact Fisher", fontsize=10)
        left.set_ylim(0, 1.02)
        right.set_ylim(0, 1.02)
        left.legend(fontsize=8)
        for ax in (left, right):
            _steps_below(ax, steps)

    caption = "Left the median layer, right the middle four layers jointly, after steps of SGD (band: the seeds)."
    return _outcome(claims, caption, draw(9.2, 3.6, fill), run)


def closeness(run: Run) -> dict[str, list[float]]:
    """Each approximation's cosine with the exact natural gradient, for each seed: the mean over steps and dampings.

    Args:
        run: scale, seed and device.

    Returns:
        Name of the approximation to a value for each seed; the first look, at the initial weights, is left out.
    """
    return {
        name: [float(np.mean([look["directions"][name] for look in one[1:]])) for one in _along(run)]
        for name in DIRECTIONS
    }


def _along(run: Run) -> list[list[dict[str, Any]]]:
    """What is measured along each seed's training, a dictionary for each look."""
    scale = SCALES[run.scale]
    return run.map(_one, range(run.seed, run.seed + scale.seeds))


def _one(seed: int, run: Run) -> list[dict[str, Any]]:
    scale, problem = SCALES[run.scale], problem_of(run)
    what = {"along": 1, "dataset": problem.dataset, "limit": scale.limit, "examples": scale.examples,
            "steps": scale.steps, "dampings": scale.dampings, "seed": seed, "device": run.device}  # fmt: skip
    return kept(what, lambda: {"looks": _follow(problem, scale, seed, run)}, run)["looks"]


def _follow(problem: Problem, scale: Scale, seed: int, run: Run) -> list[dict[str, Any]]:
    data = problem.data().to(run.device)
    model, likelihood = build(problem, data, seed).to(run.device), resolve(data.likelihood)
    batches, position, done, looks = Batches(*data.train, problem.batch, None, seed), Position(), 0, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in scale.steps:
        position = advance(model, likelihood, optimizer, batches, step - done, position, done)
        done = step
        looks.append(_look(model, data, scale))
    return looks


def _look(model: nn.Module, data: Dataset, scale: Scale) -> dict[str, Any]:
    """Errors, shares and directions at the present weights, in float64."""
    twin = copy.deepcopy(model).double()
    few = (data.train.inputs[: scale.examples].double(), data.train.targets[: scale.examples])
    found: dict[str, Any] = {}
    dense: dict[str, Tensor] = {}
    for kind in ("exact", "empirical"):
        fisher = Probe(twin, "categorical", layers=MIDDLE).fisher(few, kind=kind)
        frame = compare(fisher, list(LOOKS), metrics=["relative_frobenius", "off_unit_share"], progress=False).frame
        inside = frame[frame["row"] == frame["col"]]
        found[kind] = {
            name: _values(inside[(inside["method"] == name) & (inside["metric"] == "relative_frobenius")])
            for name in LOOKS
        }
        found[kind]["off_unit_share"] = _values(inside[inside["metric"] == "off_unit_share"].drop_duplicates("row"))
        dense[kind] = fisher.to_dense()
    norms = {kind: float(matrix.norm()) for kind, matrix in dense.items()}
    inner = float((dense["exact"] * dense["empirical"]).sum())
    found["cosine"] = inner / (norms["exact"] * norms["empirical"])
    found["scale"] = norms["empirical"] / norms["exact"]
    found["directions"] = _directions(Probe(twin, "categorical").fisher(few), scale.dampings)
    return found


def _values(rows: Any) -> list[float]:
    return [float(value) for layer, value in zip(rows["row"], rows["value"], strict=True) if layer != "all"]


def _directions(fisher: Fisher, dampings: Sequence[float]) -> dict[str, float]:
    """Cosines with the exact natural gradient of the whole network, the mean over dampings."""
    found: dict[str, list[float]] = {name: [] for name in DIRECTIONS}
    for damping in dampings:
        frame = compare(fisher, DIRECTIONS, damping=damping, metrics=["direction_cosine"], progress=False).frame
        for row in frame[frame["row"] == "all"].itertuples():
            if row.method in found:
                found[row.method].append(float(row.value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _layers(found: Sequence[Sequence[Mapping[str, Any]]], kind: str, name: str) -> np.ndarray:
    """(seeds, steps, layers)."""
    return np.array([[look[kind][name] for look in one] for one in found])


def _through(values: np.ndarray, steps: Sequence[int]) -> str:
    """Medians of the seeds after the first, the middle and the last step."""
    chosen = sorted({0, len(steps) // 2, len(steps) - 1})
    return ", ".join(f"{spread(values[:, i].tolist(), '.3g')} after {steps[i]:,}" for i in chosen)


def _places(steps: Sequence[int]) -> list[int]:
    return list(range(len(steps)))


def _steps_below(ax: Axes, steps: Sequence[int]) -> None:
    ax.set_xticks(_places(steps), [f"{step:,}" for step in steps])
    ax.set_xlabel("steps of SGD")
    tidy(ax)


def _outcome(claims: tuple[Claim, ...], caption: str, picture: bytes, run: Run) -> Outcome:
    scale, problem = SCALES[run.scale], problem_of(run)
    details = (
        f"{network_words(run)}, "
        f"SGD with learning rate 0.01, momentum 0.9, batch {problem.batch}; Fishers over {scale.examples:,} training "
        f"images in float64, undamped; {scale.seeds} seeds, medians, ranges in brackets"
    )
    return Outcome(claims, f"{problem.title}, tanh network, {scale.seeds} seeds", details, caption, picture)
