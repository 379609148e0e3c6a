"""Names that a shell completes; kept here since the registries that they are in import torch, and shells do not wait.

A test holds them equal to the registries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fisherviz.results.metrics import METRICS

METHODS = (
    "identity", "diagonal", "layer", "cw-ngd", "kfac-full", "kfac", "kfac-tridiagonal", "kfra", "ekfac", "foof",
    "centred", "nearest-kronecker",
)  # fmt: skip
DATASETS = (
    "digits", "mnist", "fashion-mnist", "ecoli", "house", "weather", "weather-apparent", "curves", "faces", "faces-cut",
    "cifar10-subset",
)  # fmt: skip
MODELS = (
    "kfac-mlp", "foof-mlp", "cwngd-convnet", "shrestha-mlp", "mnist-autoencoder", "curves-autoencoder",
    "faces-autoencoder",
)  # fmt: skip
OPTIMIZERS = (
    "kfac", "foof", "cw-ngd", "ekfac", "tengrad", "natural-gradient", "subsampled", "kbfgs", "hessian-free", "ksd",
    "sgd", "nesterov", "adam", "lbfgs",
)  # fmt: skip
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
KINDS = ("exact", "mc", "empirical")
TASKS = ("classification", "regression", "autoencoder")
EXHIBITS = (
    "kfac.fig2", "kfac.cumulants", "kfac.fig3", "kfac.fig5", "kfac.fig6", "kfac.labels", "kfac.caption2",
    "kfac.invariance", "kfac.fig7", "kfac.fig9", "kfac.fig10", "kfac.fig11", "sang.table1", "sang.fig5", "sang.tuned",
    "sang.fig1", "sang.fig2", "sang.fig3", "sang.complexity", "benzing.fig1", "benzing.fig5", "benzing.fig2",
    "benzing.fig6", "benzing.fig3", "benzing.fig7", "benzing.fig1a", "benzing.fig5a", "benzing.fig4a",
    "benzing.fig4b", "benzing.fig4c", "benzing.fig8", "benzing.fig9", "benzing.fig10", "benzing.a1", "shrestha.fig1",
    "shrestha.fisher", "shrestha.fig2", "shrestha.fig3", "shrestha.fig4", "shrestha.table1", "shrestha.stability",
    "shrestha.fig5", "beyond.floor", "beyond.empirical", "beyond.speed",
)  # fmt: skip
SCALES = ("smoke", "desk", "paper")
PRESETS = ("benzing", "benzing-adam", "benzing-sgd")
SAMPLERS = ("grid", "random", "tpe")

COMPLETED: dict[str, Sequence[str]] = {
    "methods": METHODS, "monitor_methods": METHODS, "metrics": tuple(METRICS), "data": DATASETS, "dataset": DATASETS,
    "optimizer": OPTIMIZERS, "likelihood": LIKELIHOODS, "kind": KINDS, "task": TASKS,
    "dtype": ("float32", "float64"), "defaults": ("training", "paper"), "device": ("cpu", "cuda"),
}  # fmt: skip
"""By option, whichever command it is of."""


def completion(names: Sequence[str]) -> Callable[[str], list[str]]:
    """What completes one of these names, or the last of several between commas.

    Args:
        names: all there are.
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return complete
