"""The data sets of the papers as tensors: `load(name)` and the `Dataset` it returns."""

from fisherviz.datasets.catalogue import TASKS, Dataset, Split, Standard, describe, files, load, names, where

__all__ = ["TASKS", "Dataset", "Split", "Standard", "describe", "files", "load", "names", "where"]
