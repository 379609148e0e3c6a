"""How independent the gradients of different output units are: Sang et al. 2022, equations 4 to 7, in networks.

Networks are trained by CW-NGD with the paper's options (COST a mean); F is
summed over one batch, as in algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.approximations import approximate
from fisherviz.capture.captures import Capture
from fisherviz.capture.formed import FormedCapture
from fisherviz.exact.fisher import Fisher
from fisherviz.network.likelihoods import resolve
from fisherviz.operators.factorise import eigenvalues
from fisherviz.papers.sang.optimizers import MeanCostCWNGD
from fisherviz.papers.trials.problems import Problem, at_hand, build
from fisherviz.papers.trials.steps import advance
from fisherviz.papers.trials.work import Run, kept
from fisherviz.probe import Probe
from fisherviz.statistics.gradients import block_square_norm
from fisherviz.training.data import Batches
from fisherviz.training.evaluation import evaluate

GAMMA = 1e-4
"""The paper's damping."""
METHODS = {"component-wise": "cw-ngd", "K-FAC": "kfac", "entry-wise": "diagonal"}
"""Approximations by what they are called here."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        batch: of training, and of F.
        epochs: of training.
        seeds: how many networks.
        limit: first training images that are kept; None: all.
    """

    batch: int
    epochs: int
    seeds: int
    limit: int | None = None


SCALES = {"smoke": Scale(64, 2, 2, 128), "desk": Scale(1024, 1, 3), "paper": Scale(1024, 100, 3)}


def problem(run: Run, model: str, options: tuple[tuple[str, Any], ...] = (), size: int | None = None) -> Problem:
    """A network on MNIST, or on the embedded digits where its files are not at hand.

    Args:
        run: scale.
        model: name of the network.
        options: of it.
        size: side that images are scaled to; None: 28.
    """
    scale, name = SCALES[run.scale], "mnist" if at_hand("mnist", run) else "digits"
    size = 28 if size is None and name == "digits" else size
    return Problem(name, model, options, batch=scale.batch, limit=scale.limit, size=size)


@lru_cache(maxsize=16)
def network(problem: Problem, epochs: int, seed: int, device: str) -> nn.Module:
    """A network after some epochs of CW-NGD, in float64.

    Args:
        problem: what is trained.
        epochs: how many; 0: the initial weights.
        seed: of weights and batches.
        device: where.
    """
    data = problem.data().to(device)
    model, likelihood = build(problem, data, seed).to(device), resolve(data.likelihood)
    batches = Batches(*data.train, problem.batch, None, seed)
    optimizer = MeanCostCWNGD(model, likelihood, batch=problem.batch)
    advance(model, likelihood, optimizer, batches, epochs * -(-len(batches) // problem.batch))
    return model.double().eval()


def fisher(problem: Problem, epochs: int, seed: int, kind: str, device: str) -> Fisher:
    """F of a network summed over the first batch of training images: eq. 1 for "empirical", eq. 3 for "exact".

    Args:
        problem: what was trained.
        epochs: how long.
        seed: from which weights.
        kind: of the labels.
        device: where.
    """
    data = problem.data().to(device)
    x, y = (part[: problem.batch] for part in (data.train.inputs, data.train.targets))
    model = network(problem, epochs, seed, device)
    return Probe(model, data.likelihood).fisher((x.double(), y), kind=kind, reduction="sum")


def measured(problem: Problem, run: Run, seed: int) -> dict[str, Any]:
    """What is measured of one network, by layer.

    Args:
        problem: what is trained.
        run: scale, device, where it is kept.
        seed: of weights and batches.

    Returns:
        "accuracy" on the training images, and of "empirical", "exact" and "initial" (empirical, before training) the
        layers' shares and errors; of "empirical" also what `independence` and `conditions` give.
    """
    epochs = SCALES[run.scale].epochs
    what = {"components": asdict(problem), "epochs": epochs, "seed": seed, "device": run.device}

    def measure() -> dict[str, Any]:
        trained = fisher(problem, epochs, seed, "empirical", run.device)
        data = problem.data().to(run.device).to(dtype=torch.float64)
        accuracy = evaluate(network(problem, epochs, seed, run.device), resolve(data.likelihood), data.train, 10_000)
        return {
            "accuracy": accuracy["accuracy"],
            "empirical": joined(errors(trained), independence(trained), conditions(trained, problem.batch)),
            "exact": errors(fisher(problem, epochs, seed, "exact", run.device)),
            "initial": errors(fisher(problem, 0, seed, "empirical", run.device)),
        }

    return kept(what, measure, run)


Numbers = dict[str, dict[str, float]]
"""By layer and name."""


def joined(*found: Numbers) -> Numbers:
    """Several measurements of the same layers."""
    return {layer: {name: value for one in found for name, value in one[layer].items()} for layer in found[0]}


def errors(of: Fisher) -> Numbers:
    """Of each layer: the share of ‖F_l‖² off its components ("off_unit"), and the approximations' relative errors."""
    fitted = {name: approximate(of, method).matrix for name, method in METHODS.items()}
    found: Numbers = {}
    for i, (layer, capture) in enumerate(of.example_space().items()):
        total = of.scale**2 * block_square_norm(capture, capture)
        found[layer] = {}
        for name, matrix in fitted.items():
            operator = matrix.operator(i, i)
            inner = sum(
                of.scale * float((rows * (operator @ rows.mT).mT).sum())  # ⟨F, F̂⟩, a vector of each example at a time
                for rows in (capture.select_vectors(k, k + 1).gradients[0] for k in range(capture.vectors))
            )
            found[layer][name] = math.sqrt(max(0.0, total - 2 * inner + operator.norm() ** 2) / total)
        found[layer]["off_unit"] = found[layer]["component-wise"] ** 2
    return found


def independence(of: Fisher) -> Numbers:
    """Of each layer: the share of ‖cov‖² between different units (eq. 5), and ‖E D‖² / E ‖D‖² (eqs. 6 and 7)."""
    found: Numbers = {}
    for name, capture in of.example_space().items():
        assert isinstance(capture, Capture | FormedCapture)
        gradients = capture.gradients[0].double()  # (N, P) in unit order; data's labels: one vector per example
        mean = gradients.mean(0)
        found[name] = {
            "covariance": between_units(gradients - mean, capture.width),
            "mean": float(mean.square().sum() / gradients.square().sum(1).mean()),
        }
    return found


def between_units(gradients: Tensor, width: int) -> float:
    """The share of ‖DᵀD‖² off the blocks of single units.

    Args:
        gradients: D, (N, units * width), unit by unit.
        width: parameters of a unit.
    """
    own = sum(float((unit.mT @ unit).square().sum()) for unit in gradients.unflatten(1, (-1, width)).unbind(1))
    return 1.0 - own / float((gradients @ gradients.mT).square().sum())


def conditions(of: Fisher, batch: int) -> Numbers:
    """Of each layer: the largest condition number of its damped components, for F summed and for COST a mean.

    "singular" is the share of the components that have none undamped, by their rounding in float64.
    """
    found: Numbers = {}
    for name in of.space.names:
        values = torch.stack([eigenvalues(block) for block in of.units(name)])
        low, high = values.amin(1).clamp(min=0.0), values.amax(1)
        rounding = high * values.shape[1] * torch.finfo(values.dtype).eps
        found[name] = {
            "condition": float(((high + GAMMA) / (low + GAMMA)).max()),
            "condition_mean_cost": float(((high / batch**2 + GAMMA) / (low / batch**2 + GAMMA)).max()),
            "singular": float((low <= rounding).double().mean()),
        }
    return found


def medians(networks: list[dict[str, Any]], kind: str, name: str) -> Mapping[str, float]:
    """The seeds' median of a measurement by layer."""
    return {layer: median(one[kind][layer][name] for one in networks) for layer in networks[0][kind]}


def leak(layer: nn.Module, inputs: Tensor, units: int) -> tuple[float, int]:
    """How far groups of weights reach into each other's outputs.

    Args:
        layer: a dense or convolutional layer.
        inputs: (N, ...).
        units: how many groups; the first dimension of its weight.

    Returns:
        Largest |∂s_o'/∂θ_o| for groups o ≠ o', and the number of output nodes of one example that one weight reaches.
    """
    weight = dict(layer.named_parameters())["weight"].detach()
    rest = {name: p.detach() for name, p in layer.named_parameters() if name != "weight"}

    def outputs(w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w, **rest}, (inputs,))

    largest, nodes = 0.0, 0
    for unit in range(units):
        change = torch.func.jvp(outputs, (weight,), (_only(weight, unit),))[1]
        others = change.abs().transpose(0, 1)
        nodes = max(nodes, int((others[unit].reshape(len(inputs), -1) > 0).sum(1).max()))
        others[unit] = 0.0
        largest = max(largest, float(others.detach().max()))
    return largest, nodes


def _only(weight: Tensor, unit: int) -> Tensor:
    """A direction that moves the weights of one unit."""
    direction = torch.zeros_like(weight)
    direction[unit] = 1.0
    return direction
