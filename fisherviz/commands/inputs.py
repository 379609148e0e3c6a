"""What the command line names, turned into objects: a trained network, its data, its weights.

Names are `pkg.mod:attribute` or those of the package's own data sets. Whatever goes wrong becomes one
sentence that names the option to change (`OptionError`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz import datasets
from fisherviz.support.choices import did_you_mean
from fisherviz.support.errors import OptionError, option
from fisherviz.support.importing import imported


@dataclass(frozen=True)
class Data:
    """What the Fisher is taken over.

    Args:
        batches: what `Probe.fisher` takes: a pair (inputs, targets), inputs alone, or a list of batches.
        name: for the page.
        likelihood: the one that goes with it, if the data set knows.
        dataset: the package's own data set, if it is one.
        notes: sentences about it.
    """

    batches: Any
    name: str
    likelihood: str | None = None
    dataset: datasets.Dataset | None = None
    notes: tuple[str, ...] = field(default=())

    def shaped_for(self, model: nn.Module) -> Data:
        """The same data; images of the package's own sets as a network that begins with a convolution takes them.

        Args:
            model: the network.
        """
        if self.dataset is None or self.dataset.shaped_for(model) is self.dataset:
            return self
        inputs, targets = self.batches
        return replace(self, batches=(inputs.reshape(-1, *self.dataset.shape), targets))


def load_model(name: str) -> nn.Module:
    """Make the network that a factory builds.

    Args:
        name: `pkg.mod:factory`, a function without arguments, or a module that is there already.

    Returns:
        The network, in evaluation mode.

    Raises:
        OptionError: there is none.
    """
    with option("--model"):
        found = imported(name)
        model = found if isinstance(found, nn.Module) else found()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} gave {type(model).__name__}; it must give a torch.nn.Module.")
        return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Read weights into a network; pickled code is never run.

    Args:
        model: gets the weights.
        path: a .safetensors file, or what `torch.save` made of a state_dict.

    Raises:
        OptionError: the file is missing, is something else, or does not fit the network.
    """
    with option("--weights"):
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"{path} holds more than weights, or none; save model.state_dict() with torch.save or safetensors."
                ) from error
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path} holds no state_dict; save model.state_dict().")
        own = model.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        if missing or unknown:
            which = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the network lacks"
            raise ValueError(f"{path} does not fit the network of --model: it {which}.")
        if wrong:
            name = min(wrong)
            raise ValueError(
                f"{path} does not fit the network of --model: {name!r} has the shape "
                f"{tuple(state[name].shape)}, the network's {tuple(own[name].shape)}."
            )
        model.load_state_dict(dict(state))


def load_data(name: str, examples: int | None, *, progress: bool = True) -> Data:
    """Load the data that an option names.

    Args:
        name: one of the package's data sets ("digits", "mnist:16" for images scaled to 16 × 16), or
            `pkg.mod:loader`, a function without arguments that returns inputs, a pair (inputs, targets), a
            `torch.utils.data.Dataset` or a list or DataLoader of batches.
        examples: how many of the first examples to take; None: all.
        progress: show a bar while fetching.

    Returns:
        The data.

    Raises:
        OptionError: there is none.
    """
    if examples is not None and examples < 1:
        raise OptionError(f"--examples: {examples} examples make no Fisher; choose at least 1.")
    with option("--data"):
        base, _, size = name.partition(":")
        if base in datasets.names():
            if size and not size.isdigit():
                raise ValueError(f"{size!r} is no size of images; write for example {base}:16.")
            loaded = datasets.load(base, size=int(size) if size else None, progress=progress)
            return _own(loaded, name, examples)
        if not size:
            raise ValueError(
                f"there is no data set {name!r}; choose one of {', '.join(datasets.names())}, "
                f"or write package.module:loader{did_you_mean(name, datasets.names())}"
            )
        found = imported(name)
        given = found() if callable(found) and not isinstance(found, torch.utils.data.Dataset) else found
        if isinstance(given, datasets.Dataset):
            return _own(given, name, examples)
        return Data(_taken(given, examples), name)


def _own(dataset: datasets.Dataset, name: str, examples: int | None) -> Data:
    inputs, targets = dataset.train
    count = len(inputs) if examples is None else min(examples, len(inputs))
    pair = (inputs[:count], targets[:count])
    return Data(pair, name, dataset.likelihood, dataset, tuple(dataset.notes))


def _taken(given: Any, examples: int | None) -> Any:
    """The first examples of whatever a loader returns, in the same form."""
    if isinstance(given, torch.utils.data.Dataset):
        given = torch.utils.data.DataLoader(given, batch_size=256)
    if isinstance(given, Tensor):
        return given[:examples]
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        return tuple(part[:examples] for part in given)
    if iter(given) is given:
        raise ValueError("the loader gave a one-shot iterator; return a list or a DataLoader of batches.")
    if examples is None:
        return given
    batches, left = [], examples
    for batch in islice(given, examples):
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        cut = tuple(part[:left] if isinstance(part, Tensor) else part for part in parts)
        batches.append(cut if len(cut) > 1 else cut[0])
        left -= len(parts[0])
        if left <= 0:
            break
    return batches
