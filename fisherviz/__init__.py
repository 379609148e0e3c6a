"""fisherviz: how far is each approximation of the Fisher from the exact one, and what does that do to training?

Attach a `Probe` to a trained network, ask for its exact `Fisher`, `approximate` it, `compare` the approximations.
"""

import sys

# `python -m fisherviz` looks into the current directory first: a stray typing.py there would be imported
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

import importlib
from typing import TYPE_CHECKING, Any

from fisherviz._version import __version__
from fisherviz.results.outputs import set_output
from fisherviz.support.lazily import lazily

if TYPE_CHECKING:
    from fisherviz import datasets, models, optim, training
    from fisherviz import plotting as plot
    from fisherviz.approximations import Approximation, approximate, approximations, register
    from fisherviz.comparison.compare import compare
    from fisherviz.comparison.monitor import Monitor
    from fisherviz.exact.cumulants import CumulantBound, cumulants
    from fisherviz.exact.fisher import Fisher
    from fisherviz.matrices.saved import load_approximation
    from fisherviz.network.layers import LayerInfo
    from fisherviz.network.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
    from fisherviz.operators.damping import FactoredTikhonov, Tikhonov
    from fisherviz.probe import Probe
    from fisherviz.report import compare_reports
    from fisherviz.results.comparison import Comparison, load_comparison
    from fisherviz.support.memory import config
    from fisherviz.support.plan import Plan

__all__ = [
    "Approximation",
    "Bernoulli",
    "Categorical",
    "Comparison",
    "CumulantBound",
    "FactoredTikhonov",
    "Fisher",
    "Gaussian",
    "LayerInfo",
    "Likelihood",
    "Monitor",
    "Plan",
    "Probe",
    "Tikhonov",
    "__version__",
    "approximate",
    "approximations",
    "compare",
    "compare_reports",
    "config",
    "cumulants",
    "datasets",
    "load_approximation",
    "load_comparison",
    "models",
    "optim",
    "plot",
    "register",
    "training",
]

lazily(
    __name__,
    {
        "fisherviz.approximations": ("Approximation", "approximate", "approximations", "register"),
        "fisherviz.comparison.compare": ("compare",),
        "fisherviz.comparison.monitor": ("Monitor",),
        "fisherviz.exact.cumulants": ("CumulantBound", "cumulants"),
        "fisherviz.exact.fisher": ("Fisher",),
        "fisherviz.matrices.saved": ("load_approximation",),
        "fisherviz.network.layers": ("LayerInfo",),
        "fisherviz.network.likelihoods": ("Bernoulli", "Categorical", "Gaussian", "Likelihood"),
        "fisherviz.operators.damping": ("FactoredTikhonov", "Tikhonov"),
        "fisherviz.probe": ("Probe",),
        "fisherviz.report": ("compare_reports",),
        "fisherviz.results.comparison": ("Comparison", "load_comparison"),
        "fisherviz.support.memory": ("config",),
        "fisherviz.support.plan": ("Plan",),
    },
    modules={
        "datasets": "fisherviz.datasets",
        "models": "fisherviz.models",
        "optim": "fisherviz.optim",
        "plot": "fisherviz.plotting",
        "training": "fisherviz.training",
    },
)


# what results turn into lies below them, and is imported when it is first made
def _write_page(*given: Any) -> Any:
    return importlib.import_module("fisherviz.report").write_page(*given)


def _plot_monitor(*given: Any, **options: Any) -> Any:
    return importlib.import_module("fisherviz.plotting").monitor(*given, **options)


set_output("page", _write_page)
set_output("plot of a monitor", _plot_monitor)
