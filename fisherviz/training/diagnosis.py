"""Why a loss is not finite: the first layer whose weights or outputs are not, and the damping by then."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.training.optimizers import dampings


class StoppedRun(RuntimeError):
    """A run that cannot go on; the message names the step, and the checkpoint is the last good one."""


class NonFiniteLoss(StoppedRun):
    """The loss, or a weight, is not finite; the message names step, layer and damping."""


def finite(model: nn.Module) -> bool:
    """Whether all weights, and the gradients there are, are finite."""
    found = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    return all(bool(torch.isfinite(tensor).all()) for tensor in found)


def explain(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, loss: float | None, step: int, epoch: int
) -> NonFiniteLoss:
    """The error to raise.

    Args:
        model: the model.
        optimizer: what trains it.
        inputs: the batch (N, ...).
        loss: the loss; None: the weights are at fault.
        step: the step that failed, from 1.
        epoch: its epoch, from 1.
    """
    what = "a weight is not finite after" if loss is None else f"the loss is {loss} at"
    shown = dampings(optimizer)
    names = {"lambda": "damping λ", "gamma": "γ", "lr": "learning rate"}
    state = ", ".join(f"{names[key]} {shown[key]:g}" for key in ("lambda", "gamma", "lr") if key in shown)
    advice = "raise the damping or lower the learning rate" if "lambda" in shown else "lower the learning rate"
    return NonFiniteLoss(
        f"{what} step {step} (epoch {epoch}): {_first(model, inputs)}, with {state}; {advice}. "
        "The last good checkpoint is kept."
    )


def _first(model: nn.Module, inputs: Tensor) -> str:
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return f"{name!r} is not finite"
    largest: list[tuple[float, str]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                largest.append((float(output.abs().max()), name))

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for value, name in largest:
        if not math.isfinite(value):
            return f"layer {name!r} is the first whose output is not finite"
    if not bool(torch.isfinite(inputs).all()):
        return "the inputs are not finite"
    return f"layer {max(largest)[1]!r} has the largest output, {max(largest)[0]:.3g}"
