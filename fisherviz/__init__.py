"""fisherviz: how far is each approximation of the Fisher from the exact one, and what does that do to training?

Attach a `Probe` to a trained network, ask for its exact `Fisher`, `approximate` it, `compare` the approximations.
"""

import importlib
from typing import Any

from fisherviz import optim
from fisherviz.approximations import Approximation, approximate, approximations, load_approximation, register
from fisherviz.comparison.compare import compare
from fisherviz.comparison.monitor import Monitor
from fisherviz.exact.cumulants import CumulantBound, cumulants
from fisherviz.exact.fisher import Fisher
from fisherviz.network.layers import LayerInfo
from fisherviz.network.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fisherviz.operators.damping import FactoredTikhonov, Tikhonov
from fisherviz.probe import Probe
from fisherviz.results.comparison import Comparison, load_comparison
from fisherviz.results.outputs import set_output
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
    "approximate",
    "approximations",
    "compare",
    "config",
    "cumulants",
    "datasets",
    "load_approximation",
    "load_comparison",
    "models",
    "optim",
    "plot",
    "register",
]

# what draws, loads data or builds the papers' networks is imported when it is first asked for
_LATER = {
    "plot": "fisherviz.plotting",
    "datasets": "fisherviz.datasets",
    "models": "fisherviz.models",
}

# what results turn into lies below them; it is imported when it is first asked for, too
set_output("page", lambda *given: importlib.import_module("fisherviz.report").write_page(*given))
set_output("plot of a monitor", lambda *given, **options: __getattr__("plot").monitor(*given, **options))


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(_LATER[name])
    raise AttributeError(f"module 'fisherviz' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
