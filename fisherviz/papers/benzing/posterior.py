"""Benzing 2021, appendices A.1, C and F: exact samples of the Laplace posterior, and Kronecker ones beside them.

Everything is in float64, on networks that are small enough for the explicit Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call

from fisherviz import datasets, models
from fisherviz.approximations import approximate
from fisherviz.exact.fisher import Fisher
from fisherviz.exact.posterior import Posterior
from fisherviz.operators.factorise import cholesky, eigh
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.problems import TITLES
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import method_styles, tidy
from fisherviz.probe import Probe

PRIOR = 1.0
"""Precision of the prior."""
PERTURBATIONS, NORM = 200, 0.5
"""Of the one layer's weights."""
ROUNDING = 1e-12
"""Changes below it, along inputs that are constant, are not drawn."""
EXACT, KRONECKER, INPUTS = "exact", "Kronecker", "first factor alone"


@dataclass(frozen=True)
class Scale:
    """Examples and width of the network that is sampled, samples, and training of the one-layer network."""

    examples: int
    width: int
    samples: int
    seeds: int
    train: int
    draws: int


SCALES = {
    "smoke": Scale(12, 2, 2000, 2, 60, 20),
    "desk": Scale(40, 6, 40_000, 5, 500, 200),
    "paper": Scale(60, 10, 200_000, 10, 1000, 500),
}


@exhibit(
    "benzing.a1", "appendix A.1: samples of the full-covariance Laplace posterior",
    shows="no figure: exact samples without forming the covariance, and what appendix C says of Kronecker posteriors",
    desk=0.01, paper=0.1,
)  # fmt: skip
def a1(run: Run) -> Outcome:
    """Compare the samples' covariance with the explicit one, and the posteriors of appendix C.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale = SCALES[run.scale]
    seeds = range(run.seed, run.seed + scale.seeds)
    sampled = run.map(sampling, [(scale, seed) for seed in seeds])
    laid = run.map(one_layer, [(scale, seed) for seed in seeds])
    small = ("digits, networks of our choice",)
    claims = (
        _identity(sampled), _samples(sampled, scale), _inverse(sampled), _rows(laid), _small_is_likely(laid, small),
        _performs(laid, small),
    )  # fmt: skip

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        looks = dict(zip((EXACT, KRONECKER, INPUTS), method_styles(["layer", "kfac", "foof"]).values(), strict=True))
        for name, look in looks.items():
            left.plot(range(len(laid)), [one["nll"][name] for one in laid], look.marker, color=look.color, label=name)
        left.plot(range(len(laid)), [one["nll"]["weights"] for one in laid], "k_", label="no posterior")
        left.set_xticks(range(len(laid)), [f"{seed}" for seed in seeds])
        left.set_xlabel("seed")
        left.set_ylabel("test loss of the posterior predictive")
        figure.legend(fontsize=8, loc="outside upper center", ncols=4)
        seen = [pair for pair in zip(laid[0]["changes"], laid[0]["divergences"], strict=True) if pair[0] > ROUNDING]
        right.loglog(*zip(*seen, strict=True), ".", color=looks[INPUTS].color, markersize=3)
        right.set_xlabel("equation 13")
        right.set_ylabel("KL divergence of the outputs")
        tidy(left)
        tidy(right)

    details = (
        f"{TITLES['digits']}; A.1: network 64-{scale.width}-10, tanh, {scale.examples} examples with one label drawn "
        f"for each, {scale.samples:,} samples, prior precision {PRIOR:g} and one of random entries; appendix C: one "
        f"layer, {scale.train} examples, trained to the optimum under that prior by L-BFGS, predictive of "
        f"{scale.draws} samples on the test set; the second factor's place is taken by the identity times its mean "
        f"diagonal entry; float64; {scale.seeds} seeds"
    )
    caption = (
        "One-layer network. Left: test loss of the posterior predictive. Right: rank-one perturbations of equal norm "
        "of the first seed's network: what equation 13 says of them, and how far they move the outputs."
    )
    setting = f"digits, {scale.seeds} seeds, float64"
    return Outcome(claims, setting, details, caption, draw(8.0, 3.3, fill))


# ---- appendix A.1 ---------------------------------------------------------------------------------------------------


def sampling(item: tuple[Scale, int], run: Run) -> dict[str, Any]:
    """How far the samples' covariance is from the explicit one, as a map and by chance; and appendix F's check.

    Args:
        item: scale and seed.
        run: where measurements are kept.
    """
    scale, seed = item
    what = {"posterior": "samples", "examples": scale.examples, "width": scale.width, "samples": scale.samples,
            "seed": seed, "prior": PRIOR}  # fmt: skip

    def measure() -> dict[str, Any]:
        data = datasets.load("digits", limit=scale.examples).to(dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        model = models.kfac_mlp(64, 10, hidden=(scale.width,), generator=generator).double()
        fisher = Probe(model, "categorical").fisher(data.train.inputs, kind="mc", generator=generator)
        F, n = fisher.to_dense(), fisher.examples
        size = len(F)
        uneven = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
        found: dict[str, Any] = {"parameters": size, "map": {}}
        for name, prior in (("scalar", torch.full((size,), PRIOR, dtype=torch.float64)), ("diagonal", uneven)):
            explicit = torch.linalg.inv(torch.diag(prior) + n * F)
            found["map"][name] = _off(_map_covariance(fisher, prior), explicit)
        precision = PRIOR * torch.eye(size, dtype=torch.float64) + n * F
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        samples = fisher.sample(PRIOR, scale.samples, generator) - weights
        found |= _white(samples @ cholesky(precision, "the precision"))
        found["solve"] = {kind: _solve_off(kind, data, seed) for kind in ("dense", "convolutional")}
        return found

    return kept(what, measure, run)


def _map_covariance(fisher: Fisher, prior: Tensor) -> Tensor:
    """Of the deviations that equation 9 makes of y and z, which it maps linearly: no chance is in it."""
    posterior, size, columns = Posterior(fisher, prior), fisher.space.size, fisher.columns
    eye, none = _units(size, columns)
    made = posterior.in_example_space(eye, none)
    return made @ made.T


def _units(size: int, columns: int) -> tuple[Tensor, Tensor]:
    """Every unit vector of (y, z), as columns."""
    whole = torch.eye(size + columns, dtype=torch.float64)
    return whole[:size], whole[size:]


def _white(samples: Tensor) -> dict[str, float]:
    """What whitened samples (n, P) that should be N(0, I) show: both numbers are about N(0, 1) if they are.

    The sum of the squared entries of nS/√n − √n I has mean P (P + 1) and, to first order, standard deviation 2P.
    """
    n, size = samples.shape
    covariance = samples.T @ samples / n - torch.eye(size, dtype=samples.dtype)
    spread_ = (n * float(covariance.square().sum()) - size * (size + 1)) / (2 * size)
    centre = (n * float(samples.mean(0).square().sum()) - size) / math.sqrt(2 * size)
    return {"covariance_z": spread_, "mean_z": centre}


def _solve_off(kind: str, data: datasets.Dataset, seed: int) -> float:
    """Relative error of implicit (λI + F)⁻¹ u against the explicit inverse."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        model: nn.Module = models.kfac_mlp(64, 10, hidden=(5, 5), generator=generator)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 10)
            )
    fisher = Probe(model.double(), "categorical").fisher(data.train.inputs, kind="mc", generator=generator)
    u = torch.randn(fisher.space.size, generator=generator, dtype=torch.float64)
    implicit = fisher.solve(u, 0.01)  # first: afterwards the dense matrix is at hand
    damped = fisher.to_dense() + 0.01 * torch.eye(len(u), dtype=torch.float64)
    return _off(implicit, torch.linalg.inv(damped) @ u)


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- appendix C ------------------------------------------------------------------------------------------------------


def one_layer(item: tuple[Scale, int], run: Run) -> dict[str, Any]:
    """The three posteriors of a network with one layer at its optimum, and equation 13 there.

    Args:
        item: scale and seed.
        run: where measurements are kept.
    """
    scale, seed = item
    what = {"posterior": "one layer", "train": scale.train, "draws": scale.draws, "seed": seed, "prior": PRIOR}

    def measure() -> dict[str, Any]:
        data = datasets.load("digits").to(dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data.train.inputs), generator=generator)[: scale.train]
        x, y = data.train.inputs[chosen], data.train.targets[chosen]
        model = nn.Linear(x.shape[1], 10, bias=False).double()
        _to_optimum(model, x, y)
        fisher = Probe(model, "categorical").fisher(x, kind="exact")
        kfac, foof = approximate(fisher, "kfac"), approximate(fisher, "foof").to_dense()
        G = kfac.operator(0, 0).tensors[1]
        curvatures = {EXACT: fisher.to_dense(), KRONECKER: kfac.to_dense(), INPUTS: foof * float(G.diagonal().mean())}
        eye = torch.eye(len(foof), dtype=torch.float64)
        noise = torch.randn(len(foof), scale.draws, generator=generator, dtype=torch.float64)
        found: dict[str, Any] = {"nll": {"weights": _nll(model, [model.weight], *data.test)}, "off": {}}
        covariances = {name: torch.linalg.inv(PRIOR * eye + len(x) * F) for name, F in curvatures.items()}
        for name, covariance in covariances.items():
            moved = model.weight + (cholesky(covariance, "the covariance") @ noise).T.reshape(-1, *model.weight.shape)
            found["nll"][name] = _nll(model, moved, *data.test)
            found["off"][name] = _off(covariance, covariances[EXACT])
        return found | _perturbed(model, x, foof, generator)

    return kept(what, measure, run)


def _to_optimum(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Minimise the summed loss and the prior's part."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-8, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        loss = loss + PRIOR / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)


def _nll(model: nn.Module, weights: Iterable[Tensor], x: Tensor, y: Tensor) -> float:
    """Of the mean of the probabilities over some weights."""
    with torch.no_grad():
        outputs = torch.stack([functional_call(model, {"weight": w}, x).log_softmax(1) for w in weights])
    logs = outputs.logsumexp(0) - math.log(len(outputs))
    return float(nn.functional.nll_loss(logs, y))


def _perturbed(model: nn.Linear, x: Tensor, foof: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Equation 13 for rank-one perturbations of equal norm along eigenvectors of A, and what they do to the outputs."""
    A = x.T @ x / len(x)
    directions = eigh(A, "the inputs' moment")[1]
    with torch.no_grad():
        before = model(x).log_softmax(1)
    changes, divergences, errors = [], [], []
    for _ in range(PERTURBATIONS):
        u = directions[:, torch.randint(len(A), (), generator=generator)]
        g = torch.randn(10, generator=generator, dtype=torch.float64)
        V = NORM * torch.outer(g / g.norm(), u)
        by_rows = float(sum(v @ A @ v for v in V))
        v = V.reshape(-1)
        errors.append(abs(float(v @ foof @ v) - by_rows) / float(v @ v))
        with torch.no_grad():
            after = (x @ (model.weight + V).T).log_softmax(1)
        changes.append(by_rows)
        divergences.append(float((before.exp() * (before - after)).sum(1).mean()))
    return {"changes": changes, "divergences": divergences, "row_error": max(errors) / float(A.trace()),
            "rank": float(spearmanr(changes, divergences).statistic)}  # fmt: skip


# ---- claims ----------------------------------------------------------------------------------------------------------


def _identity(sampled: Sequence[dict[str, Any]]) -> Claim:
    worst = {name: max(one["map"][name] for one in sampled) for name in ("scalar", "diagonal")}
    return Claim(
        "Λ_prior^(-1/2) x is a sample from the full covariance posterior, for any diagonal prior",
        "appendix A.1, equations 5 to 12",
        f"covariance of what equation 9 makes of y and z against (Λ_prior + D F)⁻¹: relative error at most "
        f"{worst['scalar']:.1e} for a scalar prior, {worst['diagonal']:.1e} for a diagonal one",
        "at most 1e-8", max(worst.values()) <= 1e-8, values=worst,
    )  # fmt: skip


def _samples(sampled: Sequence[dict[str, Any]], scale: Scale) -> Claim:
    spreads, centres = ([one[key] for one in sampled] for key in ("covariance_z", "mean_z"))
    return Claim(
        "the same, with samples drawn",
        "appendix A.1, equations 5 to 12",
        f"{scale.samples:,} samples, whitened by the explicit posterior: squared error of their covariance "
        f"{spread(spreads, '+.1f')} and of their mean {spread(centres, '+.1f')} standard deviations from what exact "
        f"samples have on the average",
        "within 4 for every seed", max(map(abs, (*spreads, *centres))) <= 4,
        values={"covariance": max(spreads, key=abs), "mean": max(centres, key=abs)}, repeats=True,
    )  # fmt: skip


def _inverse(sampled: Sequence[dict[str, Any]]) -> Claim:
    worst = {kind: max(one["solve"][kind] for one in sampled) for kind in ("dense", "convolutional")}
    return Claim(
        "implicit products of the damped, inverse Fisher with vectors agree with the explicit calculations, for both "
        "fully connected and convolutional networks",
        "appendix F",
        f"relative error at most {worst['dense']:.1e} fully connected, {worst['convolutional']:.1e} convolutional",
        "at most 1e-8", max(worst.values()) <= 1e-8, values=worst,
    )  # fmt: skip


def _rows(laid: Sequence[dict[str, Any]]) -> Claim:
    worst = max(one["row_error"] for one in laid)
    return Claim(
        "V (AAᵀ ⊗ I) V = Σ_i v_iᵀ (AAᵀ) v_i over the rows of V", "appendix C, equation 13",
        f"difference at most {worst:.1e} of tr A", "at most 1e-12", worst <= 1e-12, values={"error": worst},
    )  # fmt: skip


def _small_is_likely(laid: Sequence[dict[str, Any]], other: tuple[str, ...]) -> Claim:
    ranks = [one["rank"] for one in laid]
    return Claim(
        "this expression being small means that the network's outputs get perturbed very little, so that W + V has "
        "high likelihood",
        "appendix C, equation 13",
        f"Spearman's rank correlation with the outputs' KL divergence over {PERTURBATIONS} perturbations of equal norm "
        f"{spread(ranks, '.2f')}",
        "at least 0.9 for every seed", min(ranks) >= 0.9, other, values={"smallest": min(ranks)},
    )  # fmt: skip


def _performs(laid: Sequence[dict[str, Any]], other: tuple[str, ...]) -> Claim:
    losses = {name: [one["nll"][name] for one in laid] for name in (EXACT, KRONECKER, INPUTS)}
    differences = [a - b for a, b in zip(losses[INPUTS], losses[KRONECKER], strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    shown = ", ".join(f"{name} {spread(found)}" for name, found in losses.items())
    off = {name: spread([one["off"][name] for one in laid], ".2f") for name in (KRONECKER, INPUTS)}
    return Claim(
        "keep only the first Kronecker factor, replace the second one by the identity: the method performs equally "
        "well or better",
        "appendix C (a test that it proposes, its outcome predicted)",
        f"test loss of the posterior predictive: {shown}",
        "the mean difference to Kronecker over the seeds is at most two standard errors",
        mean(differences) <= 2 * error, other,
        f"mean difference {mean(differences):+.4f}, standard error {error:.4f}; relative distance to the exact "
        f"covariance: {', '.join(f'{name} {words}' for name, words in off.items())}",
        {"difference": mean(differences), "error": error},
    )  # fmt: skip
