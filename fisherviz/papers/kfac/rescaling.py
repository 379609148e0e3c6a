"""Martens & Grosse 2015, figure 7: what re-scaling by the exact F makes of a proposal, at one iterate.

The proposal Δ = −F̂⁻¹∇h is damped by the factored Tikhonov technique with strength γ. The improvement h(θ) − h(θ + δ) of
the training set is measured for δ = Δ, for δ = αΔ, and for δ = αΔ + μδ₀ with momentum, over γ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fisherviz.network.likelihoods import resolve
from fisherviz.optim import KFAC
from fisherviz.papers.kfac.deep import ETA, deep_autoencoder, departures
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.problems import Method, Problem, build
from fisherviz.papers.trials.running import Reached, reached
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import tidy

RAW, RESCALED, MOMENTUM = "no re-scaling, no momentum", "re-scaling, no momentum", "re-scaling and momentum"
LOOKS = {
    RAW: ("#000000", (0, (1, 1.2)), "s"),
    RESCALED: ("#D55E00", (0, (5, 1.5)), "o"),
    MOMENTUM: ("#0072B2", "-", "^"),
}
TAUS, ALL = (1 / 8, 1 / 4), (1.0, 1.0)
PART = 1000
"""Examples of one forward pass of h."""


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run.

    Args:
        limit: training images; None: all.
        first: m₁ of the growing batches.
        iteration: of K-FAC, at which the batches hold all images.
        start: λ₀.
        gammas: strengths of the factored damping.
    """

    limit: int | None
    first: int
    iteration: int
    start: float
    gammas: tuple[float, ...]


def powers(low: float, high: float, each: int) -> tuple[float, ...]:
    """Powers of ten from one exponent to another, so many to a decade."""
    count = round((high - low) * each) + 1
    return tuple(10 ** (low + place / each) for place in range(count))


SCALES = {
    "smoke": Scale(100, 50, 5, 1.5, powers(-1, 1, 1)),
    "desk": Scale(2000, 250, 25, 1.5, powers(-2, 2, 2)),
    "paper": Scale(None, 1000, 500, 150.0, powers(-3, 3, 4)),
}
Found = dict[str, dict[str, float]]


@exhibit(
    "kfac.fig7", "figure 7: updates with and without re-scaling, over γ",
    shows="the improvement in the objective by one update over γ: none without re-scaling unless γ is very large",
    desk=0.05, paper=1.3,
)  # fmt: skip
def fig7(run: Run) -> Outcome:
    """Measure updates with and without re-scaling at one iterate of the MNIST autoencoder.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale = SCALES[run.scale]
    problem = deep_autoencoder(run, scale.first, scale.limit, full_at=scale.iteration)
    fixed = {"inverse": "block-tridiagonal", "weight_decay": ETA}
    method = Method("K-FAC tridiagonal", "kfac", fixed)
    what = {"problem": asdict(problem), "options": {**fixed, "damping": scale.start}, "steps": scale.iteration}
    here = _Iterate(problem, method, scale, run)
    found = {gamma: _kept(here, what, gamma, TAUS) for gamma in scale.gammas}
    own = here.gamma
    taus = {taus: _kept(here, what, own, taus) for taus in (TAUS, ALL)}
    other = tuple(
        departures(problem)
        + [f"iteration {scale.iteration} instead of 500"] * (scale.iteration != 500)
        + [f"λ₀ = {scale.start:g} instead of 150"] * (scale.start != 150)
    )
    details = (
        f"{problem.title} autoencoder, {problem.examples:,} training images, at iteration {scale.iteration} of K-FAC "
        f"(block-tridiagonal, λ₀ = {scale.start:g}, η = {ETA:g}, batches from {scale.first} growing to all images "
        f"there), seed {run.seed}; statistics and inverses of the next iteration, τ₁ = 1/8 and τ₂ = 1/4; λ as K-FAC "
        f"has it, its own γ is {own:.3g}; h is the whole training set's, with its ℓ₂ term"
    )
    linear = _linear(found)
    caption = (
        "Improvement h(θ) − h(θ + δ) of one update over the strength γ of the factored Tikhonov damping (linear "
        f"between −{linear:g} and {linear:g}, logarithmic beyond; dotted line: K-FAC's own γ)."
    )
    picture = draw(6.4, 4.2, lambda figure: _fill(figure, found, own, linear))
    setting = f"{problem.title} autoencoder, iteration {scale.iteration}"
    return Outcome(claims_of(found, taus[TAUS], taus[ALL], other), setting, details, caption, picture)


class _Iterate:
    """The iterate, and updates from it.

    Args:
        problem: what is trained.
        method: K-FAC.
        scale: iteration and λ₀.
        run: how.
    """

    def __init__(self, problem: Problem, method: Method, scale: Scale, run: Run) -> None:
        self.problem, self.method, self.scale, self.run = problem, method, scale, run
        self.reached: Reached = reached(problem, method, {"damping": scale.start}, scale.iteration, run.seed, run)
        self.data = problem.data().to(run.device)
        self.likelihood = resolve(self.data.likelihood)

    @property
    def gamma(self) -> float:
        """K-FAC's own γ."""
        return float(self.reached.optimizer["fisherviz"]["adaptive"]["gamma"])

    def model(self) -> nn.Module:
        """The network there."""
        model = build(self.problem, self.data, self.run.seed).to(self.run.device)
        model.load_state_dict(self.reached.model)
        return model

    def objective(self, model: nn.Module) -> float:
        """H of the training set: mean nll and ½ η ‖θ‖²."""
        inputs, targets = self.data.train
        total = 0.0
        with torch.no_grad():
            for x, y in zip(inputs.split(PART), targets.split(PART), strict=True):
                total += float(self.likelihood.nll(model(x), y).double().sum())
            square = sum(float(p.double().square().sum()) for p in model.parameters())
        return total / len(inputs) + 0.5 * ETA * square

    def step(self, gamma: float, taus: tuple[float, float], momentum: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The network after one update at a γ, and what K-FAC says of the update."""
        model = self.model().train()
        optimizer = KFAC.paper(
            model, self.likelihood, **self.method.fixed, damping=self.scale.start, T=1, adapt=False, tau1=taus[0],
            tau2=taus[1], momentum=None if momentum else 0.0,
        )  # fmt: skip
        state = copy.deepcopy(self.reached.optimizer)
        state["fisherviz"]["adaptive"]["gamma"] = gamma
        optimizer.load_state_dict(state)
        x, y = self.reached.batch
        optimizer.zero_grad()
        self.likelihood.nll(model(x), y).mean().backward()
        optimizer.step()
        return model, dict(optimizer.last)


def improvements(here: _Iterate, gamma: float, taus: tuple[float, float]) -> Found:
    """Of each kind of update: its improvement of h and its norm.

    Args:
        here: the iterate.
        gamma: strength of the factored damping.
        taus: τ₁ and τ₂.
    """
    start = here.model()
    before = here.objective(start)
    scaled, last = here.step(gamma, taus, momentum=False)
    joined, _ = here.step(gamma, taus, momentum=True)
    raw = copy.deepcopy(start)
    with torch.no_grad():
        for p, q in zip(raw.parameters(), scaled.parameters(), strict=True):
            p.add_((q - p) / last["alpha"])
    moved = {RAW: raw, RESCALED: scaled, MOMENTUM: joined}
    found = {name: {"improvement": before - here.objective(m), "norm": _norm(m, start)} for name, m in moved.items()}
    found[RESCALED]["alpha"] = last["alpha"]
    return found


def _norm(model: nn.Module, start: nn.Module) -> float:
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    total = torch.stack([_square(p - q) for p, q in pairs]).sum()
    return float(total.sqrt())


def _square(difference: Tensor) -> Tensor:
    return difference.detach().double().square().sum()


def _kept(here: _Iterate, what: Mapping[str, Any], gamma: float, taus: tuple[float, float]) -> Found:
    named = {"kfac update": dict(what), "gamma": gamma, "taus": list(taus), "seed": here.run.seed}
    named["device"] = here.run.device
    return kept(named, lambda: {"updates": improvements(here, gamma, taus)}, here.run)["updates"]


def claims_of(found: Mapping[float, Found], part: Found, whole: Found, other: tuple[str, ...]) -> tuple[Claim, ...]:
    """The rows.

    Args:
        found: γ to what the updates make there.
        part: the same at K-FAC's own γ with the paper's τ₁ and τ₂.
        whole: and with all examples.
        other: departures from the paper's setting.
    """
    gains = {name: {gamma: one[name]["improvement"] for gamma, one in found.items()} for name in (RAW, RESCALED)}
    best = {name: max(one, key=one.__getitem__) for name, one in gains.items()}
    raw, scaled = gains[RAW][best[RAW]], gains[RESCALED][best[RESCALED]]
    below = {gamma: gain for gamma, gain in gains[RAW].items() if gamma <= best[RESCALED]}
    first = min((gamma for gamma, gain in gains[RAW].items() if gain > 0), default=None)
    starts = "no γ that was tried" if first is None else f"γ = {first:.2g} on"
    norms = {name: found[best[name]][name]["norm"] for name in best}
    times = scaled / raw if raw > 0 else float("inf")
    with_part, with_all = (one[RESCALED]["improvement"] for one in (part, whole))
    joined = part[MOMENTUM]["improvement"], whole[MOMENTUM]["improvement"]
    change = max(abs(with_part / with_all - 1), abs(joined[0] / joined[1] - 1))
    return (
        Claim(
            "Δ, without being re-scaled, won't even give any improvement in the objective function unless the strength "
            "of the factored Tikhonov damping terms is made very large",
            "section 6.4 and figure 7",
            f"improvement from {starts}; the re-scaled update is best at γ = {best[RESCALED]:.2g}, where Δ gives "
            f"{gains[RAW][best[RESCALED]]:.3g}",
            "Δ improves h at no γ up to the one at which the re-scaled update is best",
            max(below.values()) <= 0,
            other,
            values={"first_gamma": first if first is not None else float("inf"), "best_gamma": best[RESCALED]},
        ),
        Claim(
            "when the update is re-scaled, we can afford to compute Δ using a much smaller strength",
            "section 6.4 and figure 7",
            f"the best γ is {best[RESCALED]:.2g} with and {best[RAW]:.2g} without re-scaling",
            "at most a third of the best γ without re-scaling",
            best[RESCALED] <= best[RAW] / 3,
            other,
            values={"with": best[RESCALED], "without": best[RAW]},
        ),
        Claim(
            "overall this yields a much larger and more effective update to θ",
            "section 6.4 and figure 7",
            f"each at its best γ, the improvement is {scaled:.3g} with and {raw:.3g} without re-scaling, ‖δ‖ "
            f"{norms[RESCALED]:.3g} and {norms[RAW]:.3g}",
            "at least twice the improvement, and a larger ‖δ‖",
            scaled > 0 and times >= 2 and norms[RESCALED] > norms[RAW],
            other,
            values={"with": scaled, "without": raw},
        ),
        Claim(
            "τ₁ = 1/8 and τ₂ = 1/4 have a negligible effect on the quality of the resultant updates",
            "section 8",
            f"improvement at K-FAC's own γ {with_part:.4g} with them and {with_all:.4g} with τ₁ = τ₂ = 1; with "
            f"momentum {joined[0]:.4g} and {joined[1]:.4g}",
            "both improvements are within 10 % of those with all examples",
            change <= 0.1,
            other,
            values={"part": with_part, "all": with_all},
        ),
    )


def _linear(found: Mapping[float, Found]) -> float:
    """Where the axis of improvements is linear: the power of ten below the best one, so that each is seen."""
    best = max(each["improvement"] for one in found.values() for each in one.values())
    return 10.0 ** math.floor(math.log10(best)) if best > 0 else 1.0


def _fill(figure: Figure, found: Mapping[float, Found], own: float, linear: float) -> None:
    ax = figure.subplots()
    for name, (color, line, marker) in LOOKS.items():
        values = [one[name]["improvement"] for one in found.values()]
        ax.plot(list(found), values, color=color, linestyle=line, marker=marker, ms=4, label=name)
    ax.axvline(own, color="#767676", linestyle=":", linewidth=1)
    ax.axhline(0, color="black", linewidth=0.7)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=linear)
    ax.set_xlabel("γ")
    ax.set_ylabel("improvement h(θ) − h(θ + δ)")
    tidy(ax)
    ax.legend()
