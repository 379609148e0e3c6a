"""Optimizers that train with exactly the approximations that the analysis compares (DESIGN section 7).

    NaturalGradient(model, likelihood, method="exact", *, params=None, lr, damping, momentum=0.0,
    weight_decay=0.0, T=1,
                    decay=0.95, ramp=False, kind=None, samples=1, reduction="mean", loss_scale=None,
                    output=None,
                    **options of the approximation)
    FOOF(model, likelihood, *, params=None, lr=0.3, damping=1.0, momentum=0.0, weight_decay=0.0, T=1,
    decay=0.95,
         output=None)
    CWNGD(model, likelihood, *, params=None, lr=1.0, damping=1e-4, momentum=0.0, weight_decay=0.0, T=1,
          loss_scale=None, kind="empirical", output=None)
    KFAC(model, likelihood, *, inverse="block-diagonal" | "block-tridiagonal", params=None, lr=1.0,
    damping=150.0,
         momentum=None, weight_decay=None, T=None, decay=0.95, kind="mc", samples=1, rescale=True, adapt=True,
         T1=5, T2=20, tau1=1/8, tau2=1/4, omega1=None, omega2=None, heuristic_damping=True, setting=None,
         output=None)
        complete (default): `step(closure)` is required; weight_decay is η (1e-5), T is T₃ (20), momentum=0
        turns the
        2 × 2 system off; `opt.lam`, `opt.gamma`, `opt.last` (alpha, mu, rho, decrease) show what it did
        plain: KFAC(..., rescale=False, adapt=False, momentum=0.9, lr=..., damping=..., T=1)
    EKFAC(model, likelihood, *, params=None, lr=1e-2, damping=1e-2, momentum=0.9, weight_decay=0.0, T=20,
    decay=0.95,
          kind="mc", samples=1, setting="expand", output=None)
    TENGraD(model, likelihood, *, params=None, lr=0.01, damping=0.1, momentum=0.9, weight_decay=0.0, T=1,
            kind="empirical", loss_scale=None, output=None)
    SubsampledNaturalGradient(model, likelihood, *, structure="full" | "layer", fisher_data=None,
    params=None, lr,
                              damping, momentum=0.0, weight_decay=0.0, T=1, kind="mc", samples=1, output=None)
    KBFGS(model, likelihood, *, data=None, params=None, lr=0.3, damping=0.3, momentum=0.9, weight_decay=0.0,
          decay=0.9, pair_decay=0.9, powell=0.2, output=None)            step(closure)
    HessianFree(model, likelihood, *, params=None, lr=1.0, damping=1.0, weight_decay=0.0, preconditioner=None,
                iterations=50, tolerance=5e-4, kind="exact", output=None)  step(closure)

All are `torch.optim.Optimizer`s. `damping` may be a float, `fv.Tikhonov` or `fv.FactoredTikhonov`; a
parameter group may
set its own lr, damping, momentum, weight_decay, or approximation="none" for plain SGD.
"""

from fisherviz.optim.hessian_free import HessianFree
from fisherviz.optim.kbfgs import KBFGS
from fisherviz.optim.kfac import KFAC
from fisherviz.optim.natural_gradient import NaturalGradient
from fisherviz.optim.presets import CWNGD, EKFAC, FOOF, TENGraD
from fisherviz.optim.subsampled import SubsampledNaturalGradient

__all__ = [
    "CWNGD",
    "EKFAC",
    "FOOF",
    "KBFGS",
    "KFAC",
    "HessianFree",
    "NaturalGradient",
    "SubsampledNaturalGradient",
    "TENGraD",
]
