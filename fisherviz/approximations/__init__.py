"""Approximations of the Fisher, one file per family, and the registry that `fv.approximate` and the optimizers use."""

from fisherviz.approximations.base import Approximation, Values, fit_all
from fisherviz.approximations.centred import Centred
from fisherviz.approximations.exact import LayerWise
from fisherviz.approximations.fitting import FAILURES
from fisherviz.approximations.kfac_full import KFACFull, KFACTridiagonal
from fisherviz.approximations.kfra import KFRA
from fisherviz.approximations.kronecker import EKFAC, FOOF, KFAC
from fisherviz.approximations.nearest import NearestKronecker
from fisherviz.approximations.registry import approximate, approximations, make, register, resolve
from fisherviz.approximations.simple import Diagonal, Identity
from fisherviz.approximations.units import CWNGD

_OURS: dict[str, type[Approximation]] = {
    "identity": Identity,
    "diagonal": Diagonal,
    "layer": LayerWise,
    "cw-ngd": CWNGD,
    "kfac-full": KFACFull,
    "kfac": KFAC,
    "kfac-tridiagonal": KFACTridiagonal,
    "kfra": KFRA,
    "ekfac": EKFAC,
    "foof": FOOF,
    "centred": Centred,
    "nearest-kronecker": NearestKronecker,
}
for _name, _class in _OURS.items():
    register(_name, _class)

__all__ = [
    "CWNGD",
    "EKFAC",
    "FAILURES",
    "FOOF",
    "KFAC",
    "KFRA",
    "Approximation",
    "Centred",
    "Diagonal",
    "Identity",
    "KFACFull",
    "KFACTridiagonal",
    "LayerWise",
    "NearestKronecker",
    "Values",
    "approximate",
    "approximations",
    "fit_all",
    "make",
    "register",
    "resolve",
]
