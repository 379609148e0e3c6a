"""What the command line names, turned into objects: a network and its data.

Names are `pkg.mod:attribute`, `folder/file.py:attribute` or those of the package's own data sets. Whatever goes wrong
becomes one sentence that names the option to change (`OptionError`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherviz import datasets
from fisherviz.network.batches import Batches, count_examples, split_batch
from fisherviz.network.forms import is_split_batch
from fisherviz.network.likelihoods import Likelihood, resolve
from fisherviz.support.choices import did_you_mean
from fisherviz.support.errors import OptionError, option, sentence
from fisherviz.support.importing import imported
from fisherviz.training.network import shaped_for


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

    def shaped_for(self, model: nn.Module, output: Callable[[Any], Tensor]) -> Data:
        """The same data; examples of the package's own sets in the shape and type that a network takes.

        Args:
            model: the network.
            output: picks its output from what it returns.

        Raises:
            OptionError: it takes none.
        """
        if self.dataset is None:
            return self
        with option("--data"):
            inputs, targets = shaped_for(self.dataset, model, output).train
        count = len(self.batches[0])
        return replace(self, batches=(inputs[:count], targets[:count]))

    def likelihood_for(self, asked: str | None, entry: str | None) -> tuple[str, str]:
        """The likelihood by name, and where it comes from: asked for, the data set's own, or guessed from targets.

        Args:
            asked: --likelihood.
            entry: of the batches' dictionaries that holds the targets.

        Raises:
            OptionError: there are no batches in it.
        """
        try:
            _, targets = next(iter(Batches(self.batches, entry, likelihood=None if asked is None else resolve(asked))))
        except (ValueError, TypeError) as error:
            about = "--targets" if "targets=" in str(error) else "--data"
            raise OptionError(f"{about}: {sentence(error)}") from error
        if asked is not None or self.likelihood is not None:
            return asked or self.likelihood or "", "" if asked else "the data set's own"
        if targets is not None and targets.dtype == torch.bool:
            return "bernoulli", "a guess: the targets are true or false"
        if targets is None or not targets.is_floating_point():
            return "categorical", "a guess: the targets are " + ("not given" if targets is None else "whole numbers")
        if bool(((targets == 0) | (targets == 1)).all()):
            return "bernoulli", "a guess: the targets are zeros and ones"
        return "gaussian", "a guess: the targets are real numbers"


def load_model(name: str) -> nn.Module:
    """Make the network that a factory builds.

    Args:
        name: `pkg.mod:factory` or `folder/file.py:factory`, a function without arguments, or a network.

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


def load_data(name: str, examples: int | None, *, likelihood: Likelihood | None = None, progress: bool = True) -> Data:
    """Load the data that an option names.

    Args:
        name: one of the package's data sets ("digits", "mnist:16" for images scaled to 16 × 16), or
            `pkg.mod:loader` or `folder/file.py:loader`, a function without arguments that returns inputs, a pair
            (inputs, targets), a `torch.utils.data.Dataset` or a list or DataLoader of batches.
        examples: how many of the first examples to take; None: all.
        likelihood: whose targets they are, which may tell what a list of two tensors is; None: of any.
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
                f"or write package.module:loader or folder/file.py:loader{did_you_mean(name, datasets.names())}"
            )
        found = imported(name)
        given = found() if callable(found) and not isinstance(found, torch.utils.data.Dataset) else found
        if isinstance(given, datasets.Dataset):
            return _own(given, name, examples)
        return Data(_taken(given, examples, likelihood), name)


def _own(dataset: datasets.Dataset, name: str, examples: int | None) -> Data:
    inputs, targets = dataset.train
    count = len(inputs) if examples is None else min(examples, len(inputs))
    pair = (inputs[:count], targets[:count])
    return Data(pair, name, dataset.likelihood, dataset, tuple(dataset.notes))


def _taken(given: Any, examples: int | None, likelihood: Likelihood | None) -> Any:
    """The first examples of whatever a loader returns, in the same form."""
    if isinstance(given, torch.utils.data.Dataset):
        given = torch.utils.data.DataLoader(given, batch_size=256)
    if isinstance(given, list) and is_split_batch(given, likelihood):
        given = tuple(given)
    if isinstance(given, Tensor | tuple | Mapping):
        return _first(given, examples)
    if not isinstance(given, Iterable):
        raise TypeError(f"the loader gave {type(given).__name__}; return tensors, or a list or DataLoader of batches.")
    if iter(given) is given:
        raise ValueError("the loader gave a one-shot iterator; return a list or a DataLoader of batches.")
    if examples is None:
        return given
    batches, left = [], examples
    for batch in given:
        batches.append(_first(batch, left))
        left -= count_examples(batches[-1])
        if left <= 0:
            break
    return batches


def _first(batch: Any, count: int | None) -> Any:
    """The first examples of a batch; what has no row for each of them stays as it is."""
    if isinstance(batch, Mapping):
        batch = dict(batch)  # also Hugging Face's BatchEncoding, a mapping that is no dict
    elif isinstance(batch, tuple | list):
        batch = tuple(dict(part) if isinstance(part, Mapping) else part for part in batch)  # also of named fields
        if len(batch) == 2 and not isinstance(batch[1], Tensor | Mapping):  # numpy, pandas, lists
            batch = split_batch(batch)
    total = count_examples(batch)

    def cut(leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == total else leaf

    return pytree.tree_map(cut, batch)
