"""Shrestha 2023: figure 1 from a real network, and what equations 4, 8, 13 and 14 say, computed by plain autograd.

Figure 1 is schematic: which entries each approximation keeps. Here they are those of one network in training, of the
empirical Fisher of one mini-batch of 128 (equation 7), as every step of the paper's methods takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

from fisherviz import optim, plotting
from fisherviz.approximations import approximate
from fisherviz.exact.fisher import Fisher
from fisherviz.network.likelihoods import resolve
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.shrestha.setting import weather_problem
from fisherviz.papers.trials.problems import Problem, at_hand, build
from fisherviz.papers.trials.steps import advance
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.probe import Probe
from fisherviz.training.data import Batches

BETA = 0.1  # of directions
METHODS = {"layer": "block-diagonal (TENGraD)", "ekfac": "EKFAC", "kfac": "K-FAC"}
SEEDS, STEPS, LR, BATCH = 3, 300, 0.03, 128
SMOKE_SEEDS, SMOKE_STEPS = 2, 10
SAME, SMALL = 1e-8, 1e-2
"""Relative differences of what is equal, and of what is nearly so."""
LENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""‖t‖ / ‖θ‖ of equation 14."""
DIRECTIONS = 5
Measured = Mapping[str, Any]


def in_training(problem: Problem, steps: int, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    """A network after some steps of SGD, in float64, with its next mini-batch and its likelihood's name."""
    data = problem.data().to(dtype=torch.float64)
    model, likelihood = build(problem, data, seed).double(), resolve(data.likelihood)
    batches = Batches(*data.train, problem.batch, None, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    position = advance(model, likelihood, optimizer, batches, steps)
    optimizer.zero_grad()
    x, y, _ = batches.take(position, steps + 1)
    return model, (x, y), data.likelihood


@exhibit(
    "shrestha.fig1", "figure 1: the approximations of the Fisher",
    shows="the Fisher with its blocks between layers set to zero, and the approximations of the blocks",
    desk=0.01, paper=0.01,
)  # fmt: skip
def fig1(run: Run) -> Outcome:
    """Draw the empirical Fisher of one network and its approximations, and measure their errors.

    Args:
        run: scale and seed.

    Returns:
        The picture and its claims.
    """
    problem = weather_problem((16, 8), run, BATCH)
    seeds, steps = (SMOKE_SEEDS, SMOKE_STEPS) if run.scale == "smoke" else (SEEDS, STEPS)
    every = range(run.seed, run.seed + seeds)
    found = [_kept(problem, steps, seed, run) for seed in every]
    model, batch, likelihood = in_training(problem, steps, run.seed)
    fisher = Probe(model, likelihood).fisher(batch, kind="empirical")
    other = ("digits instead of the weather",) if problem.dataset == "digits" else ()
    details = (
        f"{problem.title}, ReLU network with hidden layers of 16 and 8 after {steps} steps of SGD (learning rate "
        f"{LR:g}), float64; the empirical Fisher of one mini-batch of {BATCH} (equation 7), {fisher.shape[0]} "
        f"parameters, factors of K-FAC and EKFAC from the same gradients; directions with β = {BETA:g}; {seeds} seeds"
    )
    caption = (
        "|entries| of the Fisher of one mini-batch and of its approximations on one linear scale, up to the 97 % "
        "quantile of the Fisher's cells; dashed lines part the layers."
    )
    setting = f"{problem.title}, hidden layers 16-8, batch {BATCH}, {seeds} seeds"
    return Outcome(_claims(found, other), setting, details, caption, _picture(fisher))


def _kept(problem: Problem, steps: int, seed: int, run: Run) -> Measured:
    what = {"approximations": list(METHODS), "dataset": problem.dataset, "model": problem.model_options,
            "limit": problem.limit, "steps": steps, "seed": seed, "beta": BETA}  # fmt: skip
    return kept(what, lambda: approximations_of(*in_training(problem, steps, seed)), run)


def approximations_of(model: nn.Module, batch: tuple[Tensor, Tensor], likelihood: str) -> dict[str, Any]:
    """How near the approximations come to the empirical Fisher of a batch.

    Args:
        model: in float64; left as it was.
        batch: inputs and targets.
        likelihood: by name.

    Returns:
        "within" (share of ‖F‖² within layers), "across" (largest |entry| between layers of any approximation), by
        method "errors" (‖F − X‖ / ‖F‖) and "block_errors" (the same within layers), "cosines" with the exact natural
        gradient, and "tengrad" (relative difference of TENGraD's step to the block-wise natural gradient's).
    """
    fisher = Probe(model, likelihood).fisher(batch, kind="empirical")
    exact, sizes = fisher.to_dense("unit"), torch.tensor(list(fisher.space.offsets)).diff()
    layer = torch.arange(len(sizes)).repeat_interleave(sizes)
    own = layer[:, None] == layer[None, :]
    gradient = fisher.gradient()
    direction = torch.linalg.solve(fisher.to_dense() + BETA * torch.eye(len(exact), dtype=exact.dtype), gradient)
    found: dict[str, Any] = {"errors": {}, "block_errors": {}, "cosines": {}, "across": 0.0}
    for name in METHODS:
        approximation = approximate(fisher, name)
        dense = approximation.to_dense("unit")
        found["errors"][name] = float((exact - dense).norm() / exact.norm())
        found["block_errors"][name] = float((exact - dense)[own].norm() / exact[own].norm())
        found["across"] = max(found["across"], float(dense[~own].abs().max()))
        found["cosines"][name] = float(F.cosine_similarity(approximation.solve(gradient, BETA), direction, dim=0))
    found["within"] = float(exact[own].norm() ** 2 / exact.norm() ** 2)
    blocks = approximate(fisher, "layer").damped(BETA).to_dense()
    found["tengrad"] = _apart(tengrad_step(model, batch, likelihood), torch.linalg.solve(blocks, gradient))
    return found


def tengrad_step(model: nn.Module, batch: tuple[Tensor, Tensor], likelihood: str, beta: float = BETA) -> Tensor:
    """What TENGraD subtracts from the parameters at learning rate 1, flat in torch order; the model stays as it was."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.TENGraD(
        model, likelihood, lr=1.0, damping=beta, momentum=0.0, kind="empirical", kl_clip=float("inf")
    )
    resolve(likelihood).nll(model(batch[0]), batch[1]).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        moved = [(before[name] - p).flatten() for name, p in model.named_parameters()]
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return torch.cat(moved)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _claims(found: list[Measured], other: tuple[str, ...]) -> tuple[Claim, ...]:
    errors, blocks, cosines = (
        {name: [one[key][name] for one in found] for name in METHODS} for key in ("errors", "block_errors", "cosines")
    )
    within, tengrad = ([one[key] for one in found] for key in ("within", "tengrad"))
    shown = ", ".join(f"{METHODS[name]} {spread(values, '.3f')}" for name, values in cosines.items())
    return (
        Claim(
            "most methods set the elements between layers to 0 (section 3)",
            "figure 1",
            f"they are 0 in {', '.join(METHODS.values())}; the Fisher has {spread(within, '.1%')} of its squared norm "
            "within layers",
            "all elements between layers are 0",
            max(one["across"] for one in found) == 0.0,
            other,
            values={"within layers": within[0]},
        ),
        Claim(
            "TENGraD inverts the blocks exactly: it is a block-wise natural gradient (sections 3 and 4)",
            "equation 40",
            f"its step differs from that of the dense blocks by {spread(tengrad, '.1e')} of it",
            f"at most {SAME:g}, on every seed",
            max(tengrad) <= SAME,
            other,
            values={"difference": tengrad[0]},
        ),
        Claim(
            "EKFAC improves the approximation of K-FAC by rescaling it (section 3)",
            "no number",
            "relative error within layers: "
            + ", ".join(f"{METHODS[name]} {spread(blocks[name], '.3f')}" for name in ("ekfac", "kfac")),
            "EKFAC's is smaller on every seed",
            all(one["block_errors"]["ekfac"] < one["block_errors"]["kfac"] for one in found),
            other,
            values={name: values[0] for name, values in blocks.items()},
        ),
        Claim(
            "TENGraD performs better in terms of approximation accuracy (section 3)",
            "no number",
            "relative error of the whole Fisher: "
            + ", ".join(f"{METHODS[name]} {spread(values, '.3f')}" for name, values in errors.items()),
            "that of TENGraD's blocks is the smallest, and its step the nearest to the exact natural gradient's in "
            "angle, on every seed",
            all(
                min(one["errors"], key=one["errors"].__getitem__) == "layer"
                and max(one["cosines"], key=one["cosines"].__getitem__) == "layer"
                for one in found
            ),
            other,
            f"cosine of the step with the exact natural gradient: {shown}",
            values={f"{name} cosine": values[0] for name, values in cosines.items()},
        ),
    )


def _picture(fisher: Fisher) -> bytes:
    matrices = {"F": fisher.to_dense("unit")}
    matrices |= {title: approximate(fisher, name).to_dense("unit") for name, title in METHODS.items()}
    edges = list(fisher.space.offsets)
    top = plotting.shared_maximum([plotting.heatmap_info(matrices["F"], edges=edges)], 0.97)
    names = [f"layer {i + 1}" for i in range(len(edges) - 1)]

    def fill(figure: Figure) -> None:
        for ax, (title, matrix) in zip(figure.subplots(1, len(matrices)), matrices.items(), strict=True):
            plotting.heatmap(matrix, ax=ax, edges=edges, layers=names, vmax=top, colorbar=False, title=title)

    return draw(9.6, 2.9, fill, heatmaps=True)


@exhibit(
    "shrestha.fisher", "equations 4, 8, 13 and 14: the Fisher as covariance, as Hessian and as distance",
    shows="that the score's mean is 0, that the Fisher is the Hessian of a KL divergence, and ½ tᵀFt its value nearby",
    desk=0.01, paper=0.01,
)  # fmt: skip
def equations(run: Run) -> Outcome:
    """Compare the exact Fisher of a classifier with plain autograd on the KL divergence.

    Args:
        run: scale and seed.

    Returns:
        The claims; there is no picture.
    """
    name = "ecoli" if at_hand("ecoli", run) else "digits"
    problem = Problem(name, "shrestha-mlp", (("hidden", (4,)),), batch=BATCH, limit=150 if name == "digits" else None)
    steps = SMOKE_STEPS if run.scale == "smoke" else STEPS
    what = {"equations": name, "limit": problem.limit, "steps": steps, "seed": run.seed}

    def measure() -> dict[str, Any]:
        model, (x, _), _ = in_training(problem, steps, run.seed)
        return fisher_and_divergence(model, x, run.seed)

    found = kept(what, measure, run)
    other = ("digits instead of the paper's tables",) if name == "digits" else ()
    ratios = {length: spread(values, ".2g") for length, values in zip(LENGTHS, found["off"], strict=True)}
    nearest = max(found["off"][LENGTHS.index(1e-3)])
    claims = (
        Claim(
            "the expected value of the score is 0",
            "equation 4",
            f"the mean over labels that the model draws is {found['score']:.1e} of the score's root mean square",
            f"at most {SAME:g}",
            found["score"] <= SAME,
            other,
            values={"score": found["score"]},
        ),
        Claim(
            "the Fisher is the Hessian of the KL divergence, and minus the expected Hessian of the log-likelihood",
            "equations 8 and 13",
            f"relative differences {found['divergence']:.1e} and {found['hessian']:.1e}",
            f"at most {SAME:g}",
            max(found["divergence"], found["hessian"]) <= SAME,
            other,
            values={"kl": found["divergence"], "log-likelihood": found["hessian"]},
        ),
        Claim(
            "KL(p_θ ‖ p_θ+t) is approximately ½ tᵀF t",
            "equation 14",
            "relative difference over random directions, by ‖t‖ / ‖θ‖: "
            + ", ".join(f"{length:g}: {shown}" for length, shown in ratios.items()),
            f"at most {SMALL:g} where t is a thousandth of θ, in each direction",
            nearest <= SMALL,
            other,
            values={f"at {length:g}": values[0] for length, values in zip(LENGTHS, found["off"], strict=True)},
        ),
    )
    details = (
        f"{name}, ReLU network with a hidden layer of 4 after {steps} steps of SGD, float64, one mini-batch of "
        f"{BATCH}; derivatives by plain autograd; {DIRECTIONS} random directions t"
    )
    return Outcome(claims, f"{name}, hidden layer of 4, batch {BATCH}", details, "Differences on one network.")


def fisher_and_divergence(model: nn.Module, x: Tensor, seed: int) -> dict[str, Any]:
    """The exact Fisher of a classifier beside plain autograd.

    Args:
        model: in float64.
        x: inputs (N, ...).
        seed: of the directions.

    Returns:
        "score" (norm of the mean score under the model, to the root mean square), "divergence" and "hessian" (relative
        differences of equations 13 and 8), "off" (for each of `LENGTHS` and direction, of equation 14).
    """
    named = {name: p.detach() for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in named.items()}
    theta = torch.cat([p.flatten() for p in named.values()])

    def logs(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(model, values, (x,)).log_softmax(-1)

    p = logs(theta).exp()

    def divergence(flat: Tensor) -> Tensor:
        return (p * (p.log() - logs(flat))).sum(-1).mean()

    def expected(flat: Tensor) -> Tensor:
        return (p * logs(flat)).sum(-1).mean()

    scores = torch.autograd.functional.jacobian(logs, theta)  # (N, labels, P)
    exact = torch.einsum("ny,nyi,nyj->ij", p, scores, scores) / len(x)
    fisher = Probe(model, "categorical").fisher(x).to_dense()
    mean = torch.einsum("ny,nyi->i", p, scores) / len(x)
    found: dict[str, Any] = {"score": float(mean.norm() / exact.trace().sqrt())}
    hessians: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        "divergence": (divergence, 1.0), "hessian": (expected, -1.0)
    }  # fmt: skip
    for name, (function, sign) in hessians.items():
        found[name] = _apart(sign * torch.autograd.functional.hessian(function, theta), fisher)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(len(theta), generator=generator, dtype=theta.dtype) for _ in range(DIRECTIONS)]
    steps = [t * theta.norm() / t.norm() for t in directions]
    found["off"] = [
        [abs(float(divergence(theta + length * t) / (0.5 * length**2 * (t @ fisher @ t)) - 1)) for t in steps]
        for length in LENGTHS
    ]
    return found
