"""Optimizers that train with exactly the approximations that the analysis compares.

All are `torch.optim.Optimizer`s made from a model and its likelihood. `damping` may be a float, `fv.Tikhonov` or
`fv.FactoredTikhonov`; a parameter group may set its own lr, damping, momentum, weight_decay, or approximation="none"
for plain SGD. `T` is the number of steps between factorisations; the signatures are in the classes.

- `NaturalGradient`: any method of `fv.approximate`, or "exact"; with rescale=True, adapt=True its steps are scaled,
  joined with momentum and damped as algorithm 2 of the K-FAC paper does.
- `FOOF`, `EKFAC`, `CWNGD`: presets; CWNGD reads the scores of the user's backward.
- `KFAC`: complete (default) it needs `step(closure)`, weight_decay is η, T is T₃, and `opt.lam`, `opt.gamma` and
  `opt.last` show what it did; plain it is KFAC(rescale=False, adapt=False).
- `TENGraD`: exact layer blocks by Woodbury.
- `SubsampledNaturalGradient`: the whole Fisher or its layers by Woodbury, from fisher_data=.
- `KBFGS`, `HessianFree`, `KSD`: need `step(closure)`.
- `penalty`: no optimizer, but what keeps earlier tasks while a later one is trained (elastic weight consolidation),
  from any approximation.

Defaults are for training by mini-batches: steps along directions take lr 0.1, momentum 0.9 and the norm constraint κ =
1e-3 (kl_clip) of the public K-FAC optimizers; λ is 0.1 where factors are averaged over steps and 1 where F is that of
one mini-batch, which is of low rank. Steps of the quadratic model (complete KFAC, HessianFree) take κ = 0.1 and a λ of
1 or more (min_damping). `FOOF.paper(model, likelihood, ...)`, and so every preset, has the paper's values instead.

A pass of the model counts if its gradient is in the step. Gradients that were dropped (`zero_grad()`, `p.grad = None`)
take their pass with them, and what leaves none in `.grad` (a saliency map, a GAN's generator behind a frozen
discriminator, evaluation) is no pass. Several backwards through one forward are one pass. A batch whose gradient is
NaN may be skipped; if it is in the step, `step()` raises.
"""

from fisherviz.optim.hessian_free import HessianFree
from fisherviz.optim.kbfgs import KBFGS
from fisherviz.optim.kfac import KFAC
from fisherviz.optim.ksd import KSD
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.penalty import Penalty, penalty
from fisherviz.optim.presets import CWNGD, EKFAC, FOOF, TENGraD
from fisherviz.optim.subsampled import SubsampledNaturalGradient

__all__ = [
    "CWNGD",
    "EKFAC",
    "FOOF",
    "KBFGS",
    "KFAC",
    "KSD",
    "HessianFree",
    "NaturalGradient",
    "Penalty",
    "SubsampledNaturalGradient",
    "TENGraD",
    "penalty",
]
