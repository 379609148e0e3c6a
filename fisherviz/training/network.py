"""The network of a run, one of the papers' or the user's own, on its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fisherviz import models
from fisherviz.datasets.catalogue import Dataset
from fisherviz.network.guest import as_guest
from fisherviz.support.choices import unknown
from fisherviz.support.errors import OptionError, option, sentence
from fisherviz.support.importing import imported
from fisherviz.training.config import Config

TRIED = 7
"""Examples that a network is tried on: a number that its channels seldom have."""


@option("model")
def build_model(config: Config, dataset: Dataset) -> nn.Module:
    """The network of a run, on its device.

    Raises:
        ValueError: it is unknown, an option is, or it does not fit the data.
    """
    if config.model in models.names():
        try:
            model: nn.Module = models.build(config.model, seed=config.seed, dataset=dataset, **config.model_options)
        except TypeError as error:
            raise OptionError(f"model_options: {error}") from error
    elif ":" in config.model:
        model = imported(config.model)(**config.model_options)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{config.model} gave {type(model).__name__}; it must give a torch.nn.Module.")
    else:
        raise ValueError(unknown("network", config.model, models.names()))
    _require_weights(model)
    return model.to(device=config.device, dtype=getattr(torch, config.dtype)).train()


def _require_weights(model: nn.Module) -> None:
    """Refuse a network that cannot be trained as it was made."""
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{name!r}, of a lazy layer, has no shape yet; run the network on an example beforehand.")
        if p.is_meta:
            raise ValueError(f"{name!r} is on the meta device and holds no numbers; make the network on a real one.")
        if not bool(torch.isfinite(p).all()):
            raise ValueError(f"{name!r} is not finite from the start; look at where the network is made.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the network has no parameter with requires_grad=True: there is nothing to train.")


def usable(name: str) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        ValueError: it is unknown or not there.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from error


def shaped_for(dataset: Dataset, model: nn.Module, output: Callable[[Any], Tensor] | None = None) -> Dataset:
    """The same data in the shape and type that a network takes: images as they are, or each as one row of pixels.

    A few examples show it, while the network is left as it was: the form in which it runs and gives as many outputs as
    the task has; images come first.

    Args:
        dataset: any; tables, and images that are in their own shape already, stay as they are.
        model: the network.
        output: picks the output from what it returns.

    Raises:
        ValueError: the network takes neither form.
    """
    own = next((p for p in model.parameters() if p.is_floating_point()), None)
    if own is not None:
        dataset = dataset.to(dtype=own.dtype)
    if len(dataset.shape) != 3 or dataset.train.inputs.dim() != 2:
        return dataset
    forms = (dataset.images(), dataset)
    count = len(dataset.train.inputs[:TRIED])
    tried = [_tried(model, form.train.inputs[:TRIED], output, own) for form in forms]
    shapes = [found if isinstance(found, torch.Size) else None for found in tried]
    for fits in (lambda shape: tuple(shape) == (count, dataset.outputs), lambda shape: shape[:1] == (count,)):
        for form, shape in zip(forms, shapes, strict=True):
            if shape is not None and fits(shape):
                return form
    told = [found if isinstance(found, str) else f"its output has the shape {tuple(found)}" for found in tried]
    raise ValueError(
        f"the network takes examples of {dataset.name} neither as {dataset.shape} ({told[0]}) nor as "
        f"({dataset.inputs},) ({told[1]})."
    )


def _tried(
    model: nn.Module, inputs: Tensor, output: Callable[[Any], Tensor] | None, own: Tensor | None
) -> torch.Size | str:
    """The shape of a network's output for some inputs, or what it said against them."""
    with as_guest(model), torch.no_grad():
        try:
            out = model.eval()(inputs if own is None else inputs.to(own.device))
        except Exception as error:  # the network is the user's own: anything can come out of it
            return sentence(error)
        found = out if output is None else output(out)
        return found.shape if isinstance(found, Tensor) else f"it returns {type(found).__name__}, not a tensor"
