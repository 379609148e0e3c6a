"""Training a classifier until it makes few enough errors, as the networks of the K-FAC paper's figures are.

Full-batch Adam: nothing to tune, nothing random. For real training runs see `fisherviz.training`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.support.modes import keeping_modes
from fisherviz.support.progress import progress_bar


def train_to_error(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    error: float = 0.05,
    seed: int = 0,
    *,
    learning_rate: float = 1e-2,
    max_steps: int = 5000,
    progress: bool = True,
) -> dict[str, Any]:
    """Train with full-batch Adam until at most a share `error` of the training examples is wrong.

    Error and loss belong to the weights before each step, so that training stops at the first weights that
    are good enough. Modes, gradients and the global random state are afterwards as they were before.

    Args:
        model: maps `inputs` to logits (N, C); trained in place.
        inputs: (N, ...).
        targets: (N,) labels.
        error: share of wrong training examples to reach, in [0, 1).
        seed: of the random numbers that the model itself draws (Dropout); nothing else is random.
        learning_rate: of Adam.
        max_steps: how many steps to try.
        progress: show a bar.

    Returns:
        "loss" and "error": lists with one entry per weights seen; "steps": how many steps were made.

    Raises:
        ValueError: targets that are no labels, or an error outside [0, 1).
        RuntimeError: the loss is not finite, or the error is not reached in `max_steps` steps.
    """
    if targets.is_floating_point() or targets.ndim != 1 or len(targets) != len(inputs) or not len(inputs):
        raise ValueError(
            f"Targets of shape {tuple(targets.shape)} and type {targets.dtype} are no labels of "
            f"{len(inputs)} examples; give one integer per example."
        )
    if not 0 <= error < 1:
        raise ValueError(f"error={error} is no share of wrong examples; choose a number from 0 to below 1.")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses: list[float] = []
    errors: list[float] = []
    with (
        _restored(model, seed),
        progress_bar(max_steps, f"training to {error:.0%} error", "step", progress) as bar,
    ):
        for step in range(max_steps + 1):
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits, targets)
            losses.append(loss.item())
            errors.append((logits.argmax(1) != targets).double().mean().item())
            bar.set_postfix(loss=f"{losses[-1]:.3g}", error=f"{errors[-1]:.2%}", refresh=False)
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"The loss is {losses[-1]} after {step} steps; lower learning_rate={learning_rate}.")
            if errors[-1] <= error:
                return {"loss": losses, "error": errors, "steps": step}
            if step < max_steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
    raise RuntimeError(
        f"The training error is {errors[-1]:.2%} after {max_steps} steps instead of {error:.2%}; "
        "raise max_steps=, change learning_rate=, or allow a larger error=."
    )


@contextmanager
def _restored(model: nn.Module, seed: int) -> Iterator[None]:
    """Training mode, gradients and a seeded random state, all put back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), keeping_modes(model):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            model.train()
            for parameter in model.parameters():
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
