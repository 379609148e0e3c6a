"""Updates with and without re-scaling: against plain torch, and both verdicts of each rule."""

import pytest
import torch
from torch import nn

from fisherviz.papers.kfac.deep import ETA, deep_autoencoder
from fisherviz.papers.kfac.rescaling import (
    ALL,
    MOMENTUM,
    RAW,
    RESCALED,
    SCALES,
    _Iterate,
    claims_of,
    improvements,
    powers,
)
from fisherviz.papers.trials.problems import Method
from fisherviz.papers.trials.work import Run


def at(raw, scaled, norms=(1.0, 2.0), joined=5.0):
    """Updates with given improvements."""
    return {
        RAW: {"improvement": raw, "norm": norms[0]},
        RESCALED: {"improvement": scaled, "norm": norms[1]},
        MOMENTUM: {"improvement": joined, "norm": 1.0},
    }


def verdicts(found, part=None, whole=None):
    part = part or at(0.0, 1.0)
    return [row.verdict for row in claims_of(found, part, whole or part, ())]


def test_the_papers_picture_reproduces_its_claims():
    found = {0.1: at(-50.0, 1.0), 1.0: at(-9.0, 4.0), 10.0: at(-1.0, 2.0), 100.0: at(0.5, 0.6)}
    assert verdicts(found) == ["reproduced"] * 4


def test_a_proposal_that_improves_by_itself_does_not():
    found = {0.1: at(0.1, 1.0), 1.0: at(3.0, 4.0, norms=(3.0, 2.0)), 10.0: at(1.0, 2.0)}
    part, whole = at(0.0, 1.0), at(0.0, 1.2)
    assert verdicts(found, part, whole) == ["not reproduced"] * 4


def test_a_proposal_that_never_improves_is_told():
    rows = claims_of({0.1: at(-5.0, 1.0), 1.0: at(-1.0, 0.5)}, at(0.0, 1.0), at(0.0, 1.0), ())
    assert "improvement from no γ that was tried" in rows[0].measured


def test_strengths_are_powers_of_ten():
    assert powers(-1, 1, 2) == pytest.approx([0.1, 10**-0.5, 1.0, 10**0.5, 10.0])


def test_the_rescaled_update_minimises_the_quadratic_model_along_the_proposal(tmp_path):
    """α* of section 6.4, with the exact F and ∇h by plain autograd."""
    scale = SCALES["smoke"]
    run = Run("smoke", progress=False, work=tmp_path)
    problem = deep_autoencoder(run, 50, 100, full_at=scale.iteration)
    method = Method("K-FAC", "kfac", {"inverse": "block-tridiagonal", "weight_decay": ETA})
    here = _Iterate(problem, method, scale, run)
    found = improvements(here, 0.3, ALL)

    start, (scaled, last) = here.model(), here.step(0.3, ALL, momentum=False)
    delta = [(q - p).detach() for p, q in zip(start.parameters(), scaled.parameters(), strict=True)]
    proposal = [d / last["alpha"] for d in delta]
    x, y = here.reached.batch
    z = start(x)
    loss = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1).mean()
    gradient = torch.autograd.grad(loss, list(start.parameters()), retain_graph=True)
    gradient = [g + ETA * p.detach() for g, p in zip(gradient, start.parameters(), strict=True)]
    names = [name for name, _ in start.named_parameters()]
    given = {name: p.detach() for name, p in start.named_parameters()}
    _, images = torch.func.jvp(
        lambda v: torch.func.functional_call(start, v, x), (given,), (dict(zip(names, proposal, strict=True)),)
    )
    p = z.detach().sigmoid()
    curvature = float((images.square() * p * (1 - p)).sum(1).mean())
    square = sum(float(d.square().sum()) for d in proposal)
    linear = sum(float((g * d).sum()) for g, d in zip(gradient, proposal, strict=True))
    lam = here.reached.optimizer["fisherviz"]["adaptive"]["lam"]
    assert last["alpha"] == pytest.approx(-linear / (curvature + (lam + ETA) * square), rel=1e-4)
    assert found[RESCALED]["alpha"] == pytest.approx(last["alpha"], rel=1e-6)
    assert found[RESCALED]["improvement"] == pytest.approx(here.objective(start) - here.objective(scaled), rel=1e-6)
