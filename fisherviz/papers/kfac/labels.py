"""Martens & Grosse 2015, section 5: how good the Fisher statistics of one backward pass with sampled targets are.

On the example network of figure 2, for a mini-batch: what the re-scaled K-FAC update wins of the quadratic model, with
factors from sampled targets beside factors from the exact expectation over the model's labels.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor, nn

from fisherviz.approximations import approximate
from fisherviz.exact.fisher import Fisher
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.papers.kfac.network import KFACNetwork, kfac_networks
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run
from fisherviz.probe import Probe

BATCH = 1000
"""Images: the paper's m₁."""
DRAWS, MORE = 5, 10
METHOD = "kfac-tridiagonal"


@exhibit(
    "kfac.labels", "section 5: the Fisher's statistics from one backward pass with sampled targets",
    shows="in words, that one additional backward pass gives a good estimate of the statistics",
    desk=0.03, paper=0.03,
)  # fmt: skip
def labels(run: Run) -> Outcome:
    """Compare K-FAC's update from one sampled label for each image with that from exact statistics.

    Args:
        run: scale, seed and device.

    Returns:
        The claim; there is no picture.
    """
    networks = kfac_networks(run)
    found = networks.damped(sampled)
    net = networks.first
    one, worst, more = found["one"], found["worst"], found["more"]
    images = min(BATCH, len(net.batches[0][0]))
    claim = Claim(
        "just one modified backwards pass is sufficient to obtain a good quality estimate in practice",
        "section 5 (no number)",
        f"with one label for each of {images:,} images the update lowers the quadratic model by {spread(one, '.3f')} "
        f"of what it does with exact statistics (median of {DRAWS} draws; worst draw of any seed "
        f"{min(worst):.3f}); with {MORE} labels {spread(more, '.3f')}",
        "at least 0.9 of it, on every seed and draw",
        min(worst) >= 0.9,
        net.recipe.departures,
        values={"one": one[0], "worst": worst[0], "more": more[0]},
    )
    caption = (
        "Decrease of the quadratic model ½ δᵀ(F + γ²I)δ + ∇hᵀδ of a mini-batch by the re-scaled block-tridiagonal "
        "update at K-FAC's own γ, to that with the exact expectation over labels."
    )
    return networks.outcome((claim,), caption)


def sampled(net: KFACNetwork, gamma: float) -> dict[str, float]:
    """Of a mini-batch: decrease with sampled labels to that with exact statistics, median and worst of the draws.

    Args:
        net: the network.
        gamma: strength of the factored damping.
    """
    x, y = (part[:BATCH] for part in net.batches[0])
    parameters = list(net.model.parameters())
    gradient = torch.autograd.grad(nn.functional.cross_entropy(net.model(x), y), parameters)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    probe = Probe(net.model, "categorical")
    exact = probe.fisher(x)

    def share(samples: int, draw: int) -> float:
        generator = torch.Generator(x.device).manual_seed(draw)
        drawn = probe.fisher(x, kind="mc", samples=samples, generator=generator)
        return decrease(drawn, exact, flat, gamma) / whole

    whole = decrease(exact, exact, flat, gamma)
    one, more = ([share(samples, draw) for draw in range(DRAWS)] for samples in (1, MORE))
    return {"one": median(one), "worst": min(one), "more": median(more)}


def decrease(statistics: Fisher, exact: Fisher, gradient: Tensor, gamma: float) -> float:
    """What −F̂⁻¹∇h, re-scaled, wins of the quadratic model (section 6.4): ½ (∇hᵀΔ)² / Δᵀ(F + γ²I)Δ.

    Args:
        statistics: whose factors make F̂.
        exact: F of the quadratic model.
        gradient: ∇h, flat.
        gamma: strength of the factored damping of F̂.
    """
    proposal = approximate(statistics, METHOD).solve(gradient, FactoredTikhonov(gamma))
    curvature = float(proposal @ (exact @ proposal)) + gamma**2 * float(proposal @ proposal)
    return 0.5 * float(gradient @ proposal) ** 2 / curvature
