"""Optimizers that train with exactly the approximations that the analysis compares (DESIGN section 7).

All are `torch.optim.Optimizer`s made from a model and its likelihood. `damping` may be a float, `fv.Tikhonov` or
`fv.FactoredTikhonov`; a parameter group may set its own lr, damping, momentum, weight_decay, or approximation="none"
for plain SGD. `T` is the number of steps between factorisations; the signatures are in the classes.

    NaturalGradient            any method of `fv.approximate`, or "exact"; with rescale=True, adapt=True its steps are
                               scaled, joined with momentum and damped as algorithm 2 of the K-FAC paper does
    FOOF, EKFAC, CWNGD         presets with their papers' defaults; CWNGD reads the scores of the user's backward
    KFAC                       complete (default): needs `step(closure)`, weight_decay is η, T is T₃; `opt.lam`,
                               `opt.gamma` and `opt.last` show what it did.
                               Plain: KFAC(rescale=False, adapt=False, lr=..., damping=...)
    TENGraD                    exact layer blocks by Woodbury
    SubsampledNaturalGradient  the whole Fisher or its layers by Woodbury, from `fisher_data=`
    KBFGS, HessianFree         need `step(closure)`

A pass of the model counts if its gradient is in the step. Gradients that were dropped (`zero_grad()`, `p.grad = None`)
take their pass with them, and what leaves none in `.grad` (a saliency map, a GAN's generator behind a frozen
discriminator, evaluation) is no pass. Several backwards through one forward are one pass. A batch whose gradient is
NaN may be skipped; if it is in the step, `step()` raises.
"""

from fisherviz.optim.hessian_free import HessianFree
from fisherviz.optim.kbfgs import KBFGS
from fisherviz.optim.kfac import KFAC
from fisherviz.optim.optimizer import NaturalGradient
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
