"""The public implementations of a step: how each trains, and what shows that its direction is ours.

Before a peer is timed, its preconditioned gradient on one batch must point where ours does: empirical kind, so that
both use the same labels, and a damping small enough to turn the gradient far away from itself. Timed are one sampled
label per example and factors averaged with 0.95, where the peer averages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.steps import DAMPING, LR, Problem
from fisherviz import optim

CHECK_DAMPING = 1e-3
ALIKE = 0.999
"""The cosine that two directions must have; the inverses are in float32."""
TURNED = 0.9
"""The largest cosine of our direction with the plain gradient, above which the comparison would show nothing."""


@dataclass(frozen=True)
class StepPeer:
    """One public implementation.

    Attributes:
        package: module that must be installed.
        trainer: makes the step for T steps between inverses; the step is timed.
        direction: its preconditioned gradients of the first batch, empirical kind, `CHECK_DAMPING`.
        note: how its work differs from ours.
    """

    package: str
    trainer: Callable[[Problem, int], Callable[[], None]]
    direction: Callable[[Problem], Sequence[Tensor]]
    note: str = ""

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None


def our_direction(problem: Problem) -> list[Tensor]:
    """KFAC's direction of the first batch."""
    own = problem.copy()
    before = [p.detach().clone() for p in own.model.parameters()]
    opt = optim.KFAC.paper(
        own.model, "categorical", rescale=False, adapt=False, lr=1.0, damping=CHECK_DAMPING, kind="empirical"
    )
    x, y = own.batches[0]
    own.loss(own.model(x), y).backward()
    opt.step()
    return [old - p.detach() for old, p in zip(before, own.model.parameters(), strict=True)]


def gradient(problem: Problem) -> list[Tensor]:
    """The plain gradient of the first batch."""
    own = problem.copy()
    x, y = own.batches[0]
    return list(torch.autograd.grad(own.loss(own.model(x), y), list(own.model.parameters())))


def check(problem: Problem, peer: StepPeer) -> dict[str, float]:
    """The cosine of a peer's direction with ours, and that of ours with the gradient.

    Raises:
        ValueError: the peer computes something else, or the comparison shows nothing.
    """
    ours = our_direction(problem)
    alike, turned = _cosine(list(peer.direction(problem)), ours), _cosine(gradient(problem), ours)
    if not alike >= ALIKE:
        raise ValueError(f"its direction has a cosine of {alike:.6f} with ours, less than {ALIKE:g}")
    if not turned <= TURNED:
        raise ValueError(f"our direction has a cosine of {turned:.6f} with the gradient: the damping is too large")
    return {"cosine": alike, "gradient_cosine": turned}


def _cosine(first: list[Tensor], second: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().reshape(-1) for t in tensors]).double() for tensors in (first, second))
    return float(a @ b / (a.norm() * b.norm()))


# ---- ASDL ------------------------------------------------------------------------------------------------------------


def _asdl_maker(problem: Problem, kind: str, **options: Any) -> Any:
    import asdl
    from asdl.precondition import natural_gradient

    if not torch.cuda.is_available():  # its profiler marks fail on builds without CUDA
        natural_gradient.nvtx = SimpleNamespace(range=nullcontext)
    config = asdl.PreconditioningConfig(data_size=len(problem.batches[0][0]), **options)
    return asdl.KfacGradientMaker(problem.model, config, fisher_type=kind)


def _asdl_pass(maker: Any, problem: Problem, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    dummy = maker.setup_model_call(problem.model, x)
    maker.setup_loss_call(problem.loss, dummy, y)
    maker.forward_and_backward()


def _asdl_direction(problem: Problem) -> list[Tensor]:
    own = problem.copy()
    maker = _asdl_maker(own, "fisher_emp", damping=CHECK_DAMPING)
    _asdl_pass(maker, own, own.batches[0])
    return [p.grad for p in own.model.parameters() if p.grad is not None]


def _asdl_trainer(problem: Problem, T: int) -> Callable[[], None]:
    own = problem.copy()
    opt = torch.optim.SGD(own.model.parameters(), lr=LR)
    # its decay is the weight of what is new
    maker = _asdl_maker(
        own, "fisher_mc", damping=DAMPING, ema_decay=0.05, curvature_upd_interval=1, preconditioner_upd_interval=T
    )
    batches = iter(_endless(own))

    def step() -> None:
        opt.zero_grad()
        _asdl_pass(maker, own, next(batches))
        opt.step()

    return step


# ---- curvlinops: an operator for one batch, made anew for every inverse ----------------------------------------------


def _curvlinops_inverse(problem: Problem, batch: tuple[Tensor, Tensor], kind: str, damping: float) -> Any:
    import curvlinops

    factors = curvlinops.KFACLinearOperator(
        problem.model, nn.CrossEntropyLoss(), list(problem.model.parameters()), [batch], check_deterministic=False,
        fisher_type=kind, separate_weight_and_bias=False, num_data=len(batch[0]), num_per_example_loss_terms=1,
    )  # fmt: skip
    return curvlinops.KFACInverseLinearOperator(factors, damping=damping, use_heuristic_damping=True)


def _curvlinops_direction(problem: Problem) -> list[Tensor]:
    own = problem.copy()
    inverse = _curvlinops_inverse(own, own.batches[0], "empirical", CHECK_DAMPING)
    return inverse @ gradient(own)


def _curvlinops_trainer(problem: Problem, T: int) -> Callable[[], None]:
    own = problem.copy()
    opt = torch.optim.SGD(own.model.parameters(), lr=LR)
    batches = iter(_endless(own))
    inverse: list[Any] = []
    steps = 0

    def step() -> None:
        nonlocal steps
        batch = next(batches)
        if steps % T == 0:
            inverse[:] = [_curvlinops_inverse(own, batch, "mc", DAMPING)]
        steps += 1
        opt.zero_grad()
        own.loss(own.model(batch[0]), batch[1]).backward()
        found = inverse[0] @ [p.grad for p in own.model.parameters()]
        for p, direction in zip(own.model.parameters(), found, strict=True):
            p.grad = direction
        opt.step()

    return step


def _endless(problem: Problem) -> Any:
    while True:
        yield from problem.batches


_ASDL = StepPeer("asdl", _asdl_trainer, _asdl_direction, "explicit inverses of all factors")
PEERS: dict[str, dict[str, StepPeer]] = {
    "kfac T=1": {
        "ASDL": _ASDL,
        "curvlinops": StepPeer("curvlinops", _curvlinops_trainer, _curvlinops_direction, "factors of the batch alone"),
    },
    "kfac T=100": {
        "ASDL": _ASDL,
        "curvlinops": StepPeer(
            "curvlinops", _curvlinops_trainer, _curvlinops_direction,
            "averages nothing: factors of one batch in a hundred, less work than the others'",
        ),
    },
}  # fmt: skip
"""kfac-pytorch, the FOOF authors' code and subsampled natural gradients are not run: see `Row.earlier`. ASDL's K-BFGS
never updates its inverses, so that its time would say nothing."""
