"""The data sets of the papers as tensors: `load(name)` and the `Dataset` it returns.

Looked for in FISHERVIZ_DATA, then in the user's cache, then fetched. Everything is deterministic: splits,
order, standardisation on the training examples. Readers of single sources stand beside this file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisherviz.datasets import curves as _curves
from fisherviz.datasets import cuts as _cuts
from fisherviz.datasets import images as _images
from fisherviz.datasets import locate as _locate
from fisherviz.datasets import tables as _tables
from fisherviz.datasets.raw import Raw
from fisherviz.support.choices import one_of, unknown
from fisherviz.support.tables import paragraph

TASKS = ("classification", "regression", "autoencoder")


class Split(NamedTuple):
    """Examples as a pair that `Probe.fisher` takes as its data: inputs, then targets."""

    inputs: Tensor
    targets: Tensor


class Standard(NamedTuple):
    """What was subtracted and divided by: `raw = value * scale + mean`; 0 and 1 where nothing was done."""

    mean: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """One data set, ready for a network.

    Args:
        name: the name it was loaded by.
        train: inputs (N, D), or (N, C, H, W) for images, and targets: labels (N,), values (N, 1), or for
            autoencoders the flattened inputs (N, D).
        test: like `train`.
        task: "classification", "regression" or "autoencoder".
        likelihood: the likelihood that goes with the targets, by name.
        shape: shape of one example as the source has it: (C, H, W), or (D,) for tables.
        features: names of a table's columns.
        classes: names of the classes.
        input_standard: what standardised the inputs.
        target_standard: what standardised the targets.
        notes: what was done to the source, one sentence each.
    """

    name: str
    train: Split
    test: Split
    task: str
    likelihood: str
    shape: tuple[int, ...]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    input_standard: Standard
    target_standard: Standard
    notes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """How many outputs a network for this task has."""
        return len(self.classes) if self.task == "classification" else self.train.targets.shape[1]

    @property
    def inputs(self) -> int:
        """How many numbers one example consists of."""
        return int(np.prod(self.shape))

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of all tensors, their shapes and dtypes."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def subset(self, train: int | None = None, test: int | None = None) -> Dataset:
        """The first examples of each part.

        Args:
            train: how many training examples to keep; None: all.
            test: how many test examples to keep; None: all.

        Raises:
            ValueError: a number is not between 1 and what there is.
        """
        for part, wanted, split in (("train", train, self.train), ("test", test, self.test)):
            if wanted is not None and not 1 <= wanted <= len(split.inputs):
                raise ValueError(f"{part}={wanted} examples of {self.name!r}; choose 1 to {len(split.inputs)}.")
        first, second = Split(*(t[:train] for t in self.train)), Split(*(t[:test] for t in self.test))
        return dataclasses.replace(self, train=first, test=second)

    def images(self) -> Dataset:
        """The same data with inputs of shape (N, C, H, W).

        Raises:
            ValueError: the data set is a table.
        """
        if len(self.shape) == 1:
            raise ValueError(f"{self.name!r} is a table and has no images; use its inputs as they are.")
        return self._map(lambda split: Split(split.inputs.reshape(-1, *self.shape), split.targets))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dataset:
        """The same data on another device or in another floating-point type; labels stay integers."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        moved = self._map(lambda split: Split(move(split.inputs), move(split.targets)))
        first, second = Standard(*map(move, self.input_standard)), Standard(*map(move, self.target_standard))
        return dataclasses.replace(moved, input_standard=first, target_standard=second)

    def _map(self, change: Callable[[Split], Split]) -> Dataset:
        return dataclasses.replace(self, train=change(self.train), test=change(self.test))

    def __repr__(self) -> str:
        counts = f"{len(self.train.inputs)} + {len(self.test.inputs)} examples"
        sizes = f"{self.shape} -> {self.outputs}"
        return f"Dataset({self.name!r}, {self.task}, {self.likelihood}, {counts}, {sizes})"

    def _repr_html_(self) -> str:
        return "".join(paragraph(line) for line in (repr(self), *self.notes))


@dataclass(frozen=True)
class _Entry:
    read: Callable[..., Raw]  # takes what it depends on of task, seed, limit and progress
    examples: int
    about: str
    tasks: tuple[str, ...]
    source: _locate.Source | None = None
    table: bool = False
    made_from: str | None = None  # the data set whose files these are


_IMAGES = ("classification", "autoencoder")
_TABLE: dict[str, _Entry] = {
    "digits": _Entry(_images.digits, 1_797, "handwritten digits, 8 x 8 (embedded)", _IMAGES),
    "mnist": _Entry(_images.mnist, 70_000, "handwritten digits, 28 x 28", _IMAGES, _images.MNIST),
    "fashion-mnist": _Entry(_images.fashion, 70_000, "pieces of clothing, 28 x 28", _IMAGES, _images.FASHION),
    "ecoli": _Entry(
        _tables.ecoli, 336, "proteins, 7 features, 8 classes", ("classification",), _tables.ECOLI, table=True
    ),
    "house": _Entry(_tables.house, 21_612, "sale prices in King County", ("regression",), _tables.HOUSE, table=True),
    "weather": _Entry(
        _tables.weather, 95_119, "hourly temperatures in Szeged", ("regression",), _tables.WEATHER, table=True
    ),
    "weather-apparent": _Entry(
        _tables.weather_apparent,
        95_119,
        "the same, with the apparent temperature",
        ("regression",),
        _tables.WEATHER,
        table=True,
    ),
    "curves": _Entry(_curves.curves, 30_000, "drawn curves, 28 x 28 (generated)", ("autoencoder",)),
    "faces": _Entry(_images.faces, 400, "Olivetti faces, 64 x 64", _IMAGES[::-1], _images.FACES),
    "faces-cut": _Entry(
        _cuts.face_cuts,
        400 * _cuts.EACH,
        "pieces of faces, 25 x 25 (cut from faces)",
        ("autoencoder",),
        _images.FACES,
        made_from="faces",
    ),
    "cifar10-subset": _Entry(_images.cifar_subset, 5_000, "images of CIFAR-10, 32 x 32", _IMAGES, _images.CIFAR),
}


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return tuple(_TABLE)


def describe(name: str) -> str:
    """One line on a data set: what it is.

    Raises:
        ValueError: there is no data set of that name.
    """
    entry = _entry(name)
    return f"{entry.examples:,} {entry.about}"


def examples(name: str) -> int:
    """How many examples a data set has, training and test parts together.

    Raises:
        ValueError: there is no data set of that name.
    """
    return _entry(name).examples


def source(name: str) -> _locate.Source | None:
    """Where a data set's files come from, and their licence; None where it needs none.

    Raises:
        ValueError: there is no data set of that name.
    """
    return _entry(name).source


def made_from(name: str) -> str | None:
    """The data set that another one is made from; None for one that stands alone.

    Raises:
        ValueError: there is no data set of that name.
    """
    return _entry(name).made_from


def files(name: str) -> tuple[str, ...]:
    """The files that a data set is read from, relative to FISHERVIZ_DATA; empty where it needs none.

    Raises:
        ValueError: there is no data set of that name.
    """
    origin = source(name)
    return origin.files if origin else ()


def where(name: str) -> Path | None:
    """The directory that holds all files of a data set; None where they are not at hand or it needs none.

    Raises:
        ValueError: there is no data set of that name, or FISHERVIZ_DATA is no directory.
    """
    origin = source(name)
    paths = _locate.present(origin) if origin else None
    if origin is None or paths is None:
        return None
    return paths[origin.files[0]].parents[len(Path(origin.files[0]).parts) - 1]


def load(
    name: str,
    *,
    size: int | None = None,
    task: str | None = None,
    standardise: bool | None = None,
    flatten: bool = True,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Load one of the papers' data sets, with a fixed split into training and test examples.

    `digits`, `mnist`, `fashion-mnist`, `cifar10-subset` and `ecoli` classify, `house` predicts a price and
    `weather` a temperature, `faces`, `faces-cut` and `curves` are for autoencoders. What is done to each source:

    * `digits`: scikit-learn's, pixels divided by 16; the last 360 rows are the test set.
    * `mnist`, `fashion-mnist`, `cifar10-subset`: the published split, pixels divided by 255.
    * `faces`: pixels divided by 242; people 30 to 39 are the test set (for classification, two pictures of
      everybody).
    * `faces-cut`: 414 pieces of 25 x 25 from each of `faces`, cut and turned at random as the autoencoder papers
      describe theirs (`datasets.cuts`), 124,200 + 41,400; people 30 to 39 are the test set. With limit=3000 ten of
      each picture are cut, of the test people's too.
    * `curves`: generated: 20,000 + 10,000 parabolas through three random points.
    * `ecoli`: the sequence name is left out; a fifth of each class is the test set.
    * `house`: the row with 33 bedrooms (a typing error) is left out, so are the columns id, zipcode and
      sqft_basement; a fifth of the houses is the test set, every sale of a house on one side.
    * `weather`: exact duplicates and rows with pressure 0 or humidity 0 (missing values) are left out, so is
      the apparent temperature (computed from the target); the last fifth of the hours is the test set.
    * `weather-apparent`: the same with the apparent temperature among the inputs, as the source has it.

    Args:
        name: one of `names()`.
        size: height and width that images are scaled to: down by averaging areas (28 to the K-FAC paper's
            16), up bilinearly (the digits' 8 to 16); None: as they are.
        task: "classification", "regression" or "autoencoder"; None: the usual one. An autoencoder's targets
            are its flattened inputs: Bernoulli while pixels are in [0, 1], Gaussian once standardised.
        standardise: subtract the mean of the training examples and divide by their standard deviation, column
            by column for tables (and the target of a regression), by one number for all pixels of images, in
            `faces-cut` with the mean of each pixel; columns that are constant in training are only centred. None:
            tables and faces only.
        flatten: inputs as (N, D); False: images as (N, C, H, W).
        limit: keep only the first training examples, before standardisation.
        seed: of the drawn curves, of the pieces of `faces-cut` and of the splits of `ecoli` and `house`; the other
            sets have one split.
        progress: show a bar while fetching.

    Returns:
        The data set, in float32 with int64 labels.

    Raises:
        ValueError: an unknown name, task or size, or a damaged file.
        RuntimeError: the files are nowhere and can't be fetched; the message says which to put where.

    Example:
        >>> from fisherviz import datasets
        >>> datasets.load("digits", size=16)
        Dataset('digits', classification, categorical, 1437 + 360 examples, (1, 16, 16) -> 10)
    """
    entry = _entry(name)
    task = entry.tasks[0] if task is None else task
    one_of(f"task of {name!r}", task, entry.tasks)
    if size is not None and (entry.table or size < 1):
        reason = "it is a table" if entry.table else "a size is at least 1"
        raise ValueError(f"size={size} does not go with {name!r}: {reason}; leave it out or choose another.")
    given = {"task": task, "seed": seed, "limit": limit, "progress": progress}
    raw = entry.read(**{key: given[key] for key in inspect.signature(entry.read).parameters})
    if limit is not None and not 1 <= limit <= len(raw.train_inputs):
        raise ValueError(f"limit={limit} training examples of {name!r}; choose 1 to {len(raw.train_inputs)}.")
    if standardise is None:
        standardise = entry.table or "faces" in (name, entry.made_from)
    inputs = [raw.train_inputs[:limit], raw.test_inputs]
    if size is not None:
        inputs = [_images.resize(part, size) for part in inputs]
    shape = inputs[0].shape[1:]
    by = "column" if entry.table else "pixel" if entry.made_from else "set"
    inputs, input_standard = _standardised(inputs, standardise, by)
    tensors = [torch.from_numpy(part.astype(np.float32)) for part in inputs]
    flat = [part.flatten(1) for part in tensors]
    if task == "autoencoder":
        targets, target_standard = flat, input_standard
    else:
        assert raw.train_targets is not None
        assert raw.test_targets is not None
        values = [raw.train_targets[:limit], raw.test_targets]
        values, target_standard = _standardised(values, standardise and task == "regression", "column")
        kind = np.float32 if task == "regression" else np.int64
        targets = [torch.from_numpy(part.astype(kind)) for part in values]
    likelihood = {
        "classification": "categorical",
        "regression": "gaussian",
        "autoencoder": "gaussian" if standardise else "bernoulli",
    }[task]
    train, test = (Split(*pair) for pair in zip(flat if flatten else tensors, targets, strict=True))
    return Dataset(
        name=name,
        train=train,
        test=test,
        task=task,
        likelihood=likelihood,
        shape=tuple(shape),
        features=raw.features,
        classes=raw.classes if task == "classification" else (),
        input_standard=input_standard,
        target_standard=target_standard,
        notes=raw.notes,
    )


def _entry(name: str) -> _Entry:
    if name not in _TABLE:
        raise ValueError(unknown("data set", name, _TABLE))
    return _TABLE[name]


def _standardised(parts: list[np.ndarray], wanted: bool, by: str) -> tuple[list[np.ndarray], Standard]:
    """Standardise on the first part: each "column" on its own, all of the "set" alike, or only the mean by "pixel"."""
    if not wanted:
        return parts, Standard(torch.zeros((), device="cpu"), torch.ones((), device="cpu"))
    mean = parts[0].mean(axis=None if by == "set" else 0, dtype=np.float64)
    scale = parts[0].std(axis=None if by == "set" else 0, dtype=np.float64)
    if by == "pixel":
        mean, scale = mean.ravel(), np.sqrt(np.mean(scale**2))
    scale = np.where(scale > 0, scale, 1.0)
    done = [(part - mean.reshape(part.shape[1:] if by == "pixel" else mean.shape)) / scale for part in parts]
    return done, Standard(*(torch.as_tensor(value, dtype=torch.float32, device="cpu") for value in (mean, scale)))
