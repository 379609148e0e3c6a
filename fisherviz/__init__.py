"""fisherviz: how far is each approximation of the Fisher from the exact one, and what does that do to training?

Attach a `Probe` to a trained network, ask for its exact `Fisher`, `approximate` it, `compare` the approximations.
"""

from fisherviz import optim
from fisherviz.approximations import Approximation, approximate, approximations, register
from fisherviz.comparison import compare
from fisherviz.cumulants import CumulantBound, cumulants
from fisherviz.damping import FactoredTikhonov, Tikhonov
from fisherviz.fisher import Fisher
from fisherviz.layers import LayerInfo
from fisherviz.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fisherviz.probe import Probe
from fisherviz.results import Comparison, load_comparison

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
    "Probe",
    "Tikhonov",
    "approximate",
    "approximations",
    "compare",
    "cumulants",
    "load_comparison",
    "optim",
    "register",
]
