"""The data sets of the papers as tensors: `load(name)` and the `Dataset` it returns."""

from fisherviz.datasets.catalogue import (
    TASKS,
    Dataset,
    Split,
    Standard,
    describe,
    examples,
    files,
    load,
    names,
    source,
    where,
)
from fisherviz.datasets.checking import check

__all__ = [
    "TASKS",
    "Dataset",
    "Split",
    "Standard",
    "check",
    "describe",
    "examples",
    "files",
    "load",
    "names",
    "source",
    "where",
]
