"""Martens & Grosse 2015, theorem 1 and corollaries 2 and 3 as paths: a network and its transformed twin side by side.

Both are trained by the same method from equivalent weights, on the same examples, in float64. How far apart the two
paths are in the space of predictive distributions is measured by the outputs, relative to how far they came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fisherviz import datasets, models, optim
from fisherviz.approximations import approximate
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import tidy
from fisherviz.probe import Probe

EXAMPLES, SIZE, HIDDEN = 300, 4, (6, 5)
RATE = 0.02  # larger ones diverge without damping, and paths that diverge amplify rounding
SEEDS = {"smoke": 1, "desk": 3, "paper": 5}
STEPS = {"smoke": 3, "desk": 15, "paper": 50}
NATURAL_RATE = 0.005  # the natural gradient's own
SAME, APART = 1e-6, 1e-3
LIKELIHOOD = "bernoulli"
EQUAL = f"the paths' relative distance is at most {SAME:g} at every step, on every seed"

Make = Callable[[nn.Module], torch.optim.Optimizer]
FREE: dict[str, Any] = {"lr": RATE, "damping": 0.0, "momentum": 0.0, "kl_clip": math.inf}
PLAIN: dict[str, Any] = {**FREE, "rescale": False, "adapt": False, "kind": "exact"}


def _kfac(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return optim.KFAC(model, LIKELIHOOD, **{**PLAIN, **options})


def _complete(model: nn.Module) -> torch.optim.Optimizer:
    return optim.KFAC.paper(
        model, LIKELIHOOD, inverse="block-tridiagonal", damping=0.0, weight_decay=0.0, adapt=False, kind="exact",
        T=1, tau1=1.0, tau2=1.0,
    )  # fmt: skip


def _natural(model: nn.Module, method: str) -> torch.optim.Optimizer:
    rate = NATURAL_RATE if method == "exact" else RATE
    return optim.NaturalGradient(model, LIKELIHOOD, method, kind="exact", **{**FREE, "lr": rate})


DIAGONAL, TRIDIAGONAL, NATURAL = "K-FAC, block-diagonal", "K-FAC, block-tridiagonal", "natural gradient"
AFRESH = "K-FAC, statistics of the step alone"
SAMPLED, COMPLETE, DAMPED = "K-FAC, sampled labels", "K-FAC, complete, undamped", "K-FAC, damped"
METHODS: dict[str, Make] = {
    DIAGONAL: _kfac,
    TRIDIAGONAL: partial(_kfac, inverse="block-tridiagonal"),
    SAMPLED: partial(_kfac, kind="mc"),
    COMPLETE: _complete,
    NATURAL: partial(_natural, method="exact"),
    DAMPED: partial(_kfac, damping=0.01),
    "FOOF": lambda model: optim.FOOF(model, LIKELIHOOD, **FREE),
    "EKFAC": lambda model: optim.EKFAC(model, LIKELIHOOD, kind="exact", T=1, **FREE),
    "CW-NGD": lambda model: optim.CWNGD(model, LIKELIHOOD, loss_scale=1 / EXAMPLES, **{**FREE, "lr": RATE * EXAMPLES}),
    "diagonal": partial(_natural, method="diagonal"),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=RATE),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
}
OTHERS = ("FOOF", "EKFAC", "CW-NGD", "diagonal", "SGD", "Adam")


@lru_cache(maxsize=1)
def _inputs() -> Tensor:
    """Images of digits, 4 × 4 pixels, which are what the network is to give back."""
    return datasets.load("digits", size=SIZE, limit=EXAMPLES, task="autoencoder").train.inputs.double()


def _network(seed: int) -> nn.Sequential:
    sizes = (SIZE**2, *HIDDEN, SIZE**2)
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layer = nn.Linear(d_in, d_out).double()
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def coordinates(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random Ω and Φ with singular values between 1/2 and 2.

    Args:
        seed: which.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def matrix(size: int) -> Tensor:
        u, _, vt = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return u @ torch.diag(2 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)) @ vt

    return [matrix(d + 1) for d in (SIZE**2, *HIDDEN)], [matrix(d) for d in (*HIDDEN, SIZE**2)]


def _loss(model: nn.Module) -> Tensor:
    x = _inputs()
    return nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="none").sum(1).mean()


def path(model: nn.Module, make: Make, steps: int, seed: int) -> list[Tensor]:
    """The outputs on all examples before the first step and after each.

    Args:
        model: trained in place.
        make: its optimizer.
        steps: how many.
        seed: of the labels that the optimizer samples, if it does.
    """
    found = []
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        optimizer = make(model)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model)
            loss.backward()
            return loss

        for step in range(steps + 1):
            with torch.no_grad():
                found.append(model.eval()(_inputs()))
            model.train()
            if step < steps:
                optimizer.step(closure)  # type: ignore[arg-type]
    return found


def whitened_path(model: nn.Sequential, steps: int) -> list[Tensor]:
    """The same of gradient descent in the network that is whitened and centred anew before each step (corollary 3).

    Args:
        model: the default network; it stays as it is.
        steps: how many.
    """
    found = [model(_inputs()).detach()]
    for _ in range(steps):
        matrix = approximate(Probe(model, LIKELIHOOD).fisher(_inputs()), "kfac")
        factors = [(op.A, op.G) for op in matrix.operators]  # type: ignore[attr-defined]
        twin = models.transformed(model, *models.whitening(factors))
        _loss(twin).backward()
        torch.optim.SGD(twin.parameters(), lr=RATE).step()
        model = models.restored(twin, model)
        found.append(model(_inputs()).detach())
    return found


def distances(here: list[Tensor], there: list[Tensor]) -> list[float]:
    """‖z − z†‖ after each step, to how far z came from where it began."""
    pairs = list(zip(here, there, strict=True))[1:]
    return [float((z - other).norm() / (z - here[0]).norm()) for z, other in pairs]


def _measure(pair: str, method: str, seed: int, steps: int) -> list[float]:
    net = _network(seed)
    if pair == "whitened":
        there = whitened_path(net, steps)
        return distances(path(net, partial(_kfac, decay=0.0), steps, seed), there)
    omegas, phis = coordinates(seed)
    if pair == "inputs":  # only these are transformed
        omegas = [omegas[0], *(torch.eye(len(omega), dtype=omega.dtype) for omega in omegas[1:])]
        phis = [torch.eye(len(phi), dtype=phi.dtype) for phi in phis]
    twin = models.logistic_twin(net) if pair == "logistic" else models.transformed(net, omegas, phis)
    there = path(twin, METHODS[method], steps, seed)
    return distances(path(net, METHODS[method], steps, seed), there)


def _distances(item: tuple[str, str, int], run: Run) -> list[float]:
    pair, method, seed = item
    steps = STEPS[run.scale]
    rate = NATURAL_RATE if method == NATURAL else RATE
    what = {"kfac invariance": pair, "method": method, "seed": seed, "steps": steps, "lr": rate}
    return kept(what, lambda: {"distances": _measure(pair, method, seed, steps)}, run)["distances"]


@exhibit(
    "kfac.invariance", "theorem 1, corollaries 2 and 3: paths that do not depend on the coordinates",
    shows="proofs that K-FAC without damping takes the same path in a network with transformed activities and inputs",
    desk=0.01, paper=0.1,
)  # fmt: skip
def invariance(run: Run) -> Outcome:
    """Train a network and its twins in other coordinates by each method, and compare the paths.

    Args:
        run: scale and seed.

    Returns:
        The picture and its claims.
    """
    seeds = range(run.seed, run.seed + SEEDS[run.scale])
    kfacs = (DIAGONAL, TRIDIAGONAL)
    pairs = [("transformed", m) for m in METHODS]
    pairs += [(pair, m) for pair in ("inputs", "logistic") for m in kfacs] + [("whitened", AFRESH)]
    items = [(pair, method, seed) for pair, method in pairs for seed in seeds]
    measured = run.map(_distances, items)
    found: dict[tuple[str, str], list[list[float]]] = {key: [] for key in pairs}
    for (pair, method, _), one in zip(items, measured, strict=True):
        found[pair, method].append(one)
    own = {method: found["transformed", method] for method in METHODS}
    claims = claims_of(own, {pair: {m: found[pair, m] for m in kfacs} for pair in ("inputs", "logistic")},
                       found["whitened", AFRESH])  # fmt: skip
    steps = STEPS[run.scale]
    sizes = "-".join(map(str, (SIZE**2, *HIDDEN, SIZE**2)))
    details = (
        f"{EXAMPLES} images of digits, {SIZE} × {SIZE} pixels; autoencoder {sizes}, tanh units, Bernoulli outputs, "
        f"so that no factor is singular; float64, all examples in each of {steps} steps, {len(seeds)} seeds of weights "
        f"and of Ω and Φ (random, singular values between 1/2 and 2, also Ω₀ of the inputs); learning rate {RATE:g} "
        f"(Adam 0.01, natural gradient {NATURAL_RATE:g}), no damping but where said (γ = 0.1), no momentum, exact "
        "statistics, averaged over the steps, but where said; complete K-FAC with its re-scaling and momentum by the "
        "exact F, tridiagonal; what the theorem asks for: equivalent weights, fixed Ω and Φ, learning rates that "
        "do not depend on the coordinates"
    )
    caption = (
        "Distance of the outputs of the network from those of its transformed twin after each step, to how far they "
        "came (median of the seeds), each trained by the method in its own coordinates. Below the dashed line paths "
        "count as the same; float64 resolves about 1e-15."
    )
    picture = draw(7.6, 4.4, lambda figure: _fill(figure, own))
    return Outcome(claims, f"digits autoencoder {sizes}, {steps} steps, {len(seeds)} seeds", details, caption, picture)


Paths = Mapping[str, list[list[float]]]


def claims_of(own: Paths, others: Mapping[str, Paths], whitened: list[list[float]]) -> tuple[Claim, ...]:
    """The rows.

    Args:
        own: method to distances by seed and step, of transformed twins.
        others: the same where the inputs alone are transformed, and of logistic twins.
        whitened: K-FAC's path from that of gradient descent in the whitened network.
    """

    def same(statement: str, paper: str, paths: Paths, more: str = "", earlier: str = "") -> Claim:
        worst = {method: max(map(max, found)) for method, found in paths.items()}
        words = ", ".join(f"{method}: {value:.1e}" for method, value in worst.items())
        holds = max(worst.values()) <= SAME
        return Claim(
            statement, paper, f"largest distance {words}{more}", EQUAL, holds, values=worst, earlier_rule=earlier
        )

    def ends(methods: tuple[str, ...]) -> str:
        return ", ".join(f"{method} {spread([found[-1] for found in own[method]], '.1e')}" for method in methods)

    def apart(statement: str, paper: str, methods: tuple[str, ...]) -> Claim:
        least = {method: min(found[-1] for found in own[method]) for method in methods}
        rule = f"at the last step the paths' relative distance is above {APART:g}, on every seed"
        return Claim(
            statement, paper, f"at the last step {ends(methods)}", rule, min(least.values()) > APART, values=least
        )

    kfacs = {method: own[method] for method in (DIAGONAL, TRIDIAGONAL)}
    return (
        same(
            "the optimization path taken by K-FAC (using either of our Fisher approximations) through the space of "
            "predictive distributions is the same for the default network as it is for the transformed network",
            "corollary 2, from theorem 1", kfacs,
            "; beyond the corollary, with labels sampled alike and with re-scaling and momentum, at the last step: "
            + ends((SAMPLED, COMPLETE)),
        ),
        same(
            "K-FAC is invariant to the choice of logistic sigmoid vs. tanh activation functions",
            "section 10, after corollary 2", others["logistic"],
        ),
        same(
            "K-FAC is invariant to arbitrary affine transformations of the input",
            "section 10, after corollary 2", others["inputs"],
        ),
        same(
            "updating θ by −αF̌⁻¹∇h is equivalent to gradient descent in a network transformed so that activities and "
            "unit-gradients are centered and whitened",
            "corollary 3", {AFRESH: whitened},
        ),
        same(
            "computed with the exact Fisher, the natural gradient is invariant to the specific way that the model is "
            "parameterized", "section 10 (exactly where, as here, the transformation is linear in θ)",
            {NATURAL: own[NATURAL]},
            earlier=f"the same at the others' learning rate {RATE:g}, where it diverged and rounding grew to 2.9",
        ),
        apart("this assumes that damping is absent or negligible in effect", "corollary 2's condition", (DAMPED,)),
        apart(
            "standard gradient descent, and methods with a diagonal or another partial curvature, lack the property",
            "section 10 states it of the natural gradient and of K-FAC alone", OTHERS,
        ),
    )  # fmt: skip


LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = "o^sDvP*X<>dp"


def _fill(figure: Figure, own: Paths) -> None:
    ax = figure.subplots()
    for place, (method, found) in enumerate(own.items()):
        values = np.maximum(np.median(np.array(found), axis=0), 1e-17)
        ax.plot(
            range(1, len(values) + 1), values, color=COLORS[place % 6], linestyle=LINES[place % 4], ms=4,
            marker=MARKERS[place], markevery=2, linewidth=1.3, label=method,
        )  # fmt: skip
    ax.axhline(SAME, color="#767676", linestyle="--", linewidth=1)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("relative distance of the two paths")
    tidy(ax)
    figure.legend(loc="outside right center", fontsize=8)
