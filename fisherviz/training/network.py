"""The network of a run, one of the papers' or the user's own, on its device."""

from __future__ import annotations

import torch
from torch import nn

from fisherviz import models
from fisherviz.datasets.catalogue import Dataset
from fisherviz.support.choices import unknown
from fisherviz.support.errors import OptionError, option
from fisherviz.support.importing import imported
from fisherviz.training.config import Config


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
    return model.to(device=config.device, dtype=getattr(torch, config.dtype)).train()


def usable(name: str) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        ValueError: it is unknown or not there.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from error
