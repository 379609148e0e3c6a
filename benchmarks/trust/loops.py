"""Training loops as users write them, each saying which examples of it count: what the rule of passes is tried on.

A loop gets a `Trial` and calls `counts` where by the manual's rule a pass counts, before it calls `step`. The trial
knows what the step has to be: by dense matrices (`dense`), or where a method has none, by an optimizer that sees the
passes that count and nothing else.
"""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from benchmarks.trust import dense

N = 12
Make = Callable[[nn.Module, Any], Any]


class Logged(fv.Categorical):
    """A likelihood that remembers which labels it drew for which outputs, or draws those of another one."""

    def __init__(self, other: Logged | None = None) -> None:
        super().__init__()
        self.other = other
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels, which are kept."""
        if self.other is not None:
            return self.other.labels(z)
        y = super().sample(z, generator)
        self.drawn.append((z.detach().clone(), y.clone()))
        return y

    def labels(self, z: Tensor) -> Tensor:
        """The labels last drawn for these outputs."""
        for outputs, y in reversed(self.drawn):
            if outputs.shape == z.shape and torch.allclose(outputs, z, rtol=1e-10, atol=1e-12):
                return y
        raise LookupError("no labels were drawn for these outputs")


class Trial:
    """One loop with one optimizer.

    Args:
        make: the optimizer, of a model and a likelihood.
        oracle: its steps by dense matrices; None: it is compared with one that sees what counts alone.
        seed: of the network and the data.
    """

    def __init__(self, make: Make, oracle: dense.Dense | None, seed: int = 0) -> None:
        self.make, self.oracle = make, oracle
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.model = dense.net(seed)
        self.likelihood = Logged()
        self.opt = make(self.model, self.likelihood)
        self.counted: list[dense.Examples] = []
        self.worst, self.steps, self.unsayable, self.unknown = 0.0, 0, False, False
        self.said: list[str] = []
        """What steps warned of."""
        if oracle is None:
            self.twin = dense.net(seed)
            self.alone = make(self.twin, Logged(self.likelihood))

    # ---- what loops are made of --------------------------------------------------------------------------------------

    def batch(self, n: int = N) -> tuple[Tensor, Tensor]:
        """New examples."""
        x = torch.randn(n, dense.WIDTHS[0], generator=self.generator, dtype=torch.float64)
        return x, torch.randint(dense.WIDTHS[-1], (n,), generator=self.generator)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a forward."""
        return F.cross_entropy(self.model(x), y)

    def rebuilt(self, model: nn.Module) -> None:
        """Train this model, which holds the same layers, with a new optimizer."""
        self.model = model
        self.opt = self.make(model, self.likelihood)

    def counts(
        self, x: Tensor, loss: Callable[[Tensor], Tensor], scale: float | None = None, layers: Sequence[int] = (0, 1, 2)
    ) -> None:
        """These examples count at the present weights, with this loss of their outputs, for these layers."""
        mine = 1 / len(x) if scale is None else scale
        own = x.detach().clone().requires_grad_(x.requires_grad)
        self.counted.append(dense.Examples(own, loss, dense.weights(self.model), mine, tuple(layers)))

    def train(self, x: Tensor, y: Tensor, layers: Sequence[int] = (0, 1, 2)) -> Tensor:
        """An ordinary pass, which counts."""
        self.counts(x, lambda z: F.cross_entropy(z, y), layers=layers)
        loss = self.loss(x, y)
        loss.backward()
        return loss

    def forget(self, layer: int | None = None) -> None:
        """What has counted no longer does: its gradient is dropped, of all layers or of one."""
        self.unknown |= self.oracle is None and layer is not None and bool(self.counted)
        left = [replace(made, layers=() if layer is None else _but(made.layers, layer)) for made in self.counted]
        self.counted = [made for made in left if made.layers]

    def cannot_be(self) -> None:
        """No Fisher of examples is that of the next step's gradient, and the step has to say so."""
        self.unsayable = True

    def step(self, through: Callable[..., Any] | None = None) -> None:
        """Step with the gradients as they stand, and compare; `through` calls the optimizer's `step`, as a scaler."""
        grads, before = dense.gradients(self.model), dense.weights(self.model)
        self.said += self._step(self.opt, self.model, through)
        moved = [new - old for new, old in zip(dense.weights(self.model), before, strict=True)]
        if not self.unsayable and not self.unknown:
            wanted = self._wanted(grads, before)
            self.worst = max(self.worst, *(_gap(m, w) for m, w in zip(moved, wanted, strict=True)))
        self.steps += 1
        self.counted.clear()

    def _step(self, opt: Any, model: nn.Module, through: Callable[..., Any] | None = None) -> list[str]:
        """One step, whose closure finds the gradients there when it is first evaluated."""
        begun: list[bool] = []

        def closure() -> Tensor:
            if not begun:
                begun.append(True)
                with torch.no_grad():
                    return self._value(model)
            value = self._value(model)
            value.backward()
            return value

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if through is not None:
                through(opt)
            else:
                opt.step(closure)
        return [str(w.message) for w in caught if "quadratic model" not in str(w.message)]

    def _value(self, model: nn.Module) -> Tensor:
        return sum((made.loss(model(made.x)) for made in self.counted), torch.zeros((), dtype=torch.float64))

    def _wanted(self, grads: list[Tensor | None], before: list[Tensor]) -> list[Tensor]:
        if self.oracle is not None:
            return self.oracle.step(self.counted, grads, before, self.likelihood.labels)
        self.alone.zero_grad()
        with torch.no_grad():
            for m, W in zip(dense.linears(self.twin), before, strict=True):
                m.weight.copy_(W[:, :-1])
                m.bias.copy_(W[:, -1])
        for made in self.counted:
            for i, m in enumerate(dense.linears(self.twin)):
                m.requires_grad_(i in made.layers)
            made.loss(self.twin(made.x)).backward()
        for m, own, g in zip(dense.linears(self.twin), dense.linears(self.model), grads, strict=True):
            m.requires_grad_(own.weight.requires_grad)
            m.weight.grad = None if g is None else g[:, :-1].clone()
            m.bias.grad = None if g is None else g[:, -1].clone()
        self._step(self.alone, self.twin)
        self.twin.requires_grad_(True)
        return [new - old for new, old in zip(dense.weights(self.twin), before, strict=True)]


def _but(layers: tuple[int, ...], layer: int) -> tuple[int, ...]:
    return tuple(i for i in layers if i != layer)


def _gap(moved: Tensor, wanted: Tensor) -> float:
    size = float(wanted.norm())
    return float((moved - wanted).norm()) / size if size else float(moved.norm())


LOOPS: dict[str, dict[str, Callable[[Trial], None]]] = {}
"""By kind, then by name."""


def loop(kind: str) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Enter a loop under its kind."""

    def enter(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        LOOPS.setdefault(kind, {})[function.__name__.replace("_", " ")] = function
        return function

    return enter


def ce(y: Tensor, scale: float = 1.0, **options: Any) -> Callable[[Tensor], Tensor]:
    """A loss of outputs."""
    return lambda z: scale * F.cross_entropy(z, y, **options)


# ---- the plain loop and what is done to gradients --------------------------------------------------------------------


@loop("one pass a step")
def plain(t: Trial) -> None:
    for _ in range(3):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()


@loop("one pass a step")
def batches_of_all_sizes(t: Trial) -> None:
    for n in (12, 5, 1, 20):
        t.opt.zero_grad()
        t.train(*t.batch(n))
        t.step()


@loop("one pass a step")
def zeros_in_place_of_None(t: Trial) -> None:
    for _ in range(3):
        t.opt.zero_grad(set_to_none=False)
        t.train(*t.batch())
        t.step()


@loop("one pass a step")
def label_smoothing(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y, label_smoothing=0.1))
        F.cross_entropy(t.model(x), y, label_smoothing=0.1).backward()
        t.step()


@loop("one pass a step")
def a_penalty_on_the_weights_in_the_loss(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y))
        (t.loss(x, y) + 0.1 * sum(p.square().sum() for p in t.model.parameters())).backward()
        t.step()


@loop("one pass a step")
def the_backward_names_its_inputs(t: Trial) -> None:
    x, y = t.batch()
    t.counts(x, ce(y))
    t.loss(x, y).backward(inputs=list(t.model.parameters()))
    t.step()


@loop("gradients that are changed")
def clipped_by_norm(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        nn.utils.clip_grad_norm_(t.model.parameters(), 0.1)
        t.step()


@loop("gradients that are changed")
def clipped_by_value(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        nn.utils.clip_grad_value_(t.model.parameters(), 0.01)
        t.step()


@loop("gradients that are changed")
def noise_is_added(t: Trial) -> None:
    t.train(*t.batch())
    for p in t.model.parameters():
        p.grad += 0.1 * torch.ones_like(p)
    t.step()


@loop("gradients that are changed")
def other_tensors_are_assigned(t: Trial) -> None:
    t.train(*t.batch())
    for p in t.model.parameters():
        p.grad = p.grad.sign()
    t.step()


@loop("gradients that are changed")
def a_hook_changes_them(t: Trial) -> None:
    handles = [p.register_hook(lambda g: 2 * g + 0.01) for p in t.model.parameters()]
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
    for handle in handles:
        handle.remove()


@loop("gradients that are changed")
def one_layer_s_is_set_to_None(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.model[0].zero_grad()
        t.step()


# ---- several passes --------------------------------------------------------------------------------------------------


@loop("several passes a step")
def accumulation(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        for n in (5, 12, 7):
            t.train(*t.batch(n))
        t.step()


@loop("several passes a step")
def accumulation_of_losses_divided(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        for _ in range(3):
            x, y = t.batch()
            t.counts(x, ce(y, 1 / 3))
            (t.loss(x, y) / 3).backward()
        t.step()


@loop("several passes a step")
def contrastive_pairs(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        (x, y), (other, _) = t.batch(), t.batch()
        with torch.no_grad():
            z, z_other = t.model(x), t.model(other)
        t.counts(x, lambda o, z=z_other, y=y: F.cross_entropy(o, y) + (o - z).square().mean())
        t.counts(other, lambda o, z=z, y=y: F.cross_entropy(o, y) + (z - o).square().mean())
        one, two = t.model(x), t.model(other)
        (F.cross_entropy(one, y) + F.cross_entropy(two, y) + (one - two).square().mean()).backward()
        t.step()


@loop("several passes a step")
def the_forwards_come_before_the_backwards(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        (x, y), (other, label) = t.batch(), t.batch()
        t.counts(x, ce(y))
        t.counts(other, ce(label))
        first, second = t.loss(x, y), t.loss(other, label)
        second.backward()
        first.backward()
        t.step()


@loop("several backwards of one forward")
def two_losses(t: Trial) -> None:
    w, v = torch.linspace(0.1, 0.9, N, dtype=torch.float64), torch.linspace(2.0, 0.5, N, dtype=torch.float64)
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, lambda z, y=y: ((w + v) * F.cross_entropy(z, y, reduction="none")).mean())
        each = F.cross_entropy(t.model(x), y, reduction="none")
        (w * each).mean().backward(retain_graph=True)
        (v * each).mean().backward()
        t.step()


@loop("several backwards of one forward")
def the_first_is_dropped(t: Trial) -> None:
    x, y = t.batch()
    loss = t.loss(x, y)
    (5 * loss).backward(retain_graph=True)
    t.opt.zero_grad()
    t.counts(x, ce(y))
    loss.backward()
    t.step()


@loop("several backwards of one forward")
def create_graph(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about cycles
            t.loss(x, y).backward(create_graph=True)
        for p in t.model.parameters():
            p.grad = p.grad.detach()
        t.step()


# ---- gradients that are dropped --------------------------------------------------------------------------------------


def dropping(drop: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def run(t: Trial) -> None:
        for _ in range(2):
            x, y = t.batch(9)
            t.loss(5 * x, y).backward()
            drop(t)
            t.train(*t.batch())
            t.step()
            t.opt.zero_grad()

    return run


def assign_None(t: Trial) -> None:
    for p in t.model.parameters():
        p.grad = None


LOOPS["gradients dropped"] = {
    "zero_grad": dropping(lambda t: t.opt.zero_grad()),
    "zeros": dropping(lambda t: t.opt.zero_grad(set_to_none=False)),
    "the model's zero_grad": dropping(lambda t: t.model.zero_grad()),
    "None": dropping(assign_None),
}


@loop("gradients dropped")
def then_the_next_are_taken_by_hand(t: Trial) -> None:
    for _ in range(2):
        x, y = t.batch(9)
        t.loss(5 * x, y).backward()
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y))
        parameters = list(t.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(t.loss(x, y), parameters), strict=True):
            p.grad = g
        t.step()
        t.opt.zero_grad()


@loop("gradients dropped")
def and_a_step_of_zeros(t: Trial) -> None:
    t.train(*t.batch())
    t.step()
    x, y = t.batch(9)
    t.loss(5 * x, y).backward()
    t.opt.zero_grad(set_to_none=False)
    t.step()
    t.train(*t.batch())
    t.step()


@loop("gradients dropped")
def a_generator_s_step(t: Trial) -> None:
    generator = nn.Linear(2, dense.WIDTHS[0]).double()
    for frozen in (False, True, False):
        t.opt.zero_grad()
        x, y = t.batch()
        fake = generator(x[:6, :2])
        t.counts(x, ce(y, 0.5))
        t.counts(fake, ce(y[:6] * 0, 0.5))
        (t.loss(x, y) / 2 + t.loss(fake.detach(), y[:6] * 0) / 2).backward()
        t.step()
        t.model.requires_grad_(not frozen)
        t.loss(fake, y[:6] * 0 + 1).backward()
        t.model.requires_grad_(True)


@loop("gradients dropped")
def an_inner_attack_by_backward(t: Trial) -> None:
    for _ in range(2):
        x, y = t.batch()
        near = x.clone()
        for _ in range(3):
            near = near.detach().requires_grad_()
            t.loss(near, y).backward()
            near = near + 0.1 * near.grad.sign()
        t.opt.zero_grad()
        t.train(near.detach(), y)
        t.step()


@loop("gradients dropped")
def a_batch_with_nan_is_skipped(t: Trial) -> None:
    for k in range(4):
        t.opt.zero_grad()
        x, y = t.batch()
        if k == 1:
            x[2, 1] = float("nan")
        loss = t.loss(x, y)
        loss.backward()
        if not loss.isfinite():
            continue
        t.counts(x, ce(y))
        t.step()


@loop("gradients dropped")
def a_batch_is_skipped_and_zeroed_later(t: Trial) -> None:
    for k in range(4):
        t.opt.zero_grad()
        x, y = t.batch()
        if k == 1:
            (100 * t.loss(x, y)).backward()
            continue
        t.train(x, y)
        t.step()


@loop("gradients dropped")
def an_exception_between_backward_and_step(t: Trial) -> None:
    for k in range(3):
        t.opt.zero_grad()
        x, y = t.batch()
        try:
            t.train(x, y)
            if k == 1:
                raise KeyboardInterrupt
            t.step()
        except KeyboardInterrupt:
            t.forget()


@loop("gradients dropped")
def an_exception_in_the_forward(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        with contextlib.suppress(RuntimeError):
            t.model(x[:, :-1])
        t.train(x, y)
        t.step()


# ---- passes that leave no gradient -----------------------------------------------------------------------------------


@loop("passes without a gradient")
def evaluation_in_between(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.model(5 * x)
        with torch.no_grad():
            t.model(3 * x)
        t.train(x, y)
        t.model.eval()
        t.model(2 * x)
        with torch.inference_mode():
            t.model(3 * x)
        t.model.train()
        t.step()


@loop("passes without a gradient")
def a_saliency_map(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        seen = x.clone().requires_grad_()
        torch.autograd.grad(t.model(seen).sum(), seen)
        t.train(x, y)
        seen = x.clone().requires_grad_()
        t.model(seen).sum().backward(inputs=[seen])
        t.step()


@loop("passes without a gradient")
def a_saliency_map_of_the_same_forward(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        seen = x.clone().requires_grad_()
        z = t.model(seen)
        torch.autograd.grad(z.sum(), seen, retain_graph=True)
        t.counts(x, ce(y))
        F.cross_entropy(z, y).backward()
        t.step()


@loop("passes without a gradient")
def an_attack_by_autograd_grad(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        near = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(t.loss(near, y), near)
        t.train((near + 0.1 * g.sign()).detach(), y)
        t.step()


@loop("passes without a gradient")
def gradients_looked_at_by_autograd_grad(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        torch.autograd.grad(t.loss(7 * x, y), list(t.model.parameters()))
        t.train(x, y)
        torch.autograd.grad(t.loss(7 * x, y), list(t.model.parameters()))
        t.step()


@loop("passes without a gradient")
def functional_derivatives(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        own = {k: p.detach() for k, p in t.model.named_parameters()}
        torch.func.grad(lambda q, x=x, y=y: F.cross_entropy(torch.func.functional_call(t.model, q, (3 * x,)), y))(own)
        torch.autograd.functional.jacobian(t.model, x[:1])
        t.train(x, y)
        t.step()


# ---- gradients by hand -----------------------------------------------------------------------------------------------


@loop("gradients by autograd.grad")
def assigned(t: Trial) -> None:
    parameters = list(t.model.parameters())
    for _ in range(2):
        x, y = t.batch()
        t.counts(x, ce(y))
        for p, g in zip(parameters, torch.autograd.grad(t.loss(x, y), parameters), strict=True):
            p.grad = g
        t.step()


@loop("gradients by autograd.grad")
def of_two_tasks_are_combined(t: Trial) -> None:
    parameters = list(t.model.parameters())
    for _ in range(2):
        found = []
        for _ in range(2):
            x, y = t.batch()
            t.counts(x, ce(y))
            found.append(torch.autograd.grad(t.loss(x, y), parameters))
        for p, g, h in zip(parameters, *found, strict=True):
            p.grad = g + h.clamp(min=0)
        t.step()


# ---- what changes during training ------------------------------------------------------------------------------------


@loop("a changing optimizer or model")
def freezing_and_thawing(t: Trial) -> None:
    for frozen in (False, True, True, False):
        t.opt.zero_grad()
        t.model[0].requires_grad_(not frozen)
        t.train(*t.batch(), layers=(1, 2) if frozen else (0, 1, 2))
        t.step()


@loop("a changing optimizer or model")
def a_schedule(t: Trial) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(t.opt, 1, gamma=0.5)
    scales = t.oracle
    for _ in range(3):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
        schedule.step()
        if scales is not None:
            scales.lr *= 0.5
        else:
            for group in t.alone.param_groups:
                group["lr"] *= 0.5


@loop("a changing optimizer or model")
def copies_and_averages(t: Trial) -> None:
    average = torch.optim.swa_utils.AveragedModel(t.model)
    for _ in range(3):
        t.opt.zero_grad()
        x, y = t.batch()
        twin = copy.deepcopy(t.model)
        F.cross_entropy(twin(5 * x), y).backward()
        t.train(x, y)
        average.update_parameters(t.model)
        average(x).sum().backward()
        t.step()


@loop("a changing optimizer or model")
def averaged_weights_swapped_in_for_evaluation(t: Trial) -> None:
    kept = [0.9 * p.detach().clone() for p in t.model.parameters()]
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        own = [p.detach().clone() for p in t.model.parameters()]
        for p, k in zip(t.model.parameters(), kept, strict=True):
            p.data.copy_(k)
        with torch.no_grad():
            t.model(t.batch()[0])
        for p, k in zip(t.model.parameters(), own, strict=True):
            p.data.copy_(k)
        t.step()


@loop("a changing optimizer or model")
def a_group_added_that_is_plain(t: Trial) -> None:
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    t.train(*t.batch())
    t.step()
    t.opt.add_param_group({"params": [other], "approximation": "none", "lr": 0.1})
    t.opt.zero_grad()
    t.train(*t.batch())
    t.step()


@loop("a changing optimizer or model")
def other_optimizers_watch_too(t: Trial) -> None:
    others = [fv.optim.FOOF(t.model, "categorical"), fv.optim.TENGraD(t.model, "categorical")]
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
        others.pop()


@loop("a changing optimizer or model")
def freezing_a_layer_in_the_middle(t: Trial) -> None:
    for frozen in (False, True, True, False):
        t.opt.zero_grad()
        t.model[2].requires_grad_(not frozen)
        t.train(*t.batch(), layers=(0, 2) if frozen else (0, 1, 2))
        t.step()


@loop("a changing optimizer or model")
def a_closure_evaluated_before_the_step(t: Trial) -> None:
    for _ in range(2):
        x, y = t.batch()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            t.opt.zero_grad()
            t.forget()
            return t.train(x, y)

        closure()
        closure()
        t.step()


@loop("a changing optimizer or model")
def a_replaced_optimizer(t: Trial) -> None:
    old = fv.optim.KFAC(t.model, "categorical", rescale=False, adapt=False)
    t.loss(*t.batch()).backward()
    old.step()
    old.zero_grad()
    del old
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()


# ---- torch's machinery -----------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A module behind a checkpoint that is not reentrant."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Recomputed in the backward."""
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def with_model(change: Callable[[nn.Module], nn.Module], first: bool) -> Callable[[Trial], None]:
    """Train a model that is changed before the optimizer is made, or after."""

    def run(t: Trial) -> None:
        inner = t.model
        if first:
            t.rebuilt(change(inner))
            changed = t.model
        else:
            changed = change(inner)
        for _ in range(2):
            t.opt.zero_grad()
            x, y = t.batch()
            t.counts(x, ce(y))
            F.cross_entropy(changed(x), y).backward()
            t.step()

    return run


def checkpoint_parts(model: nn.Module) -> nn.Module:
    """The layers of a network in two checkpoints."""
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(Checkpointed(model[:2]), Checkpointed(model[2:]))


LOOPS["torch's machinery"] = {
    "checkpoints": with_model(checkpoint_parts, first=True),
    "torch.compile": with_model(lambda m: torch.compile(m, backend="eager"), first=False),
}


@loop("torch's machinery")
def deterministic_algorithms(t: Trial) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            t.opt.zero_grad()
            t.train(*t.batch())
            t.step()
    finally:
        torch.use_deterministic_algorithms(before)


@loop("torch's machinery")
def a_scaler(t: Trial) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):
        t.opt.zero_grad()
        x, y = t.batch()
        if k == 1:
            x = x * float("inf")
        else:
            t.counts(x, ce(y))
        scaler.scale(t.loss(x, y)).backward()
        scaler.unscale_(t.opt)
        if k == 1:
            scaler.step(t.opt)  # which skips it
        else:
            t.step(scaler.step)
        scaler.update()


@loop("torch's machinery")
def an_evaluation_in_another_thread(t: Trial) -> None:
    inside, goes_on = threading.Event(), threading.Event()

    def halt(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        inside.set()
        assert goes_on.wait(60)

    def evaluate() -> None:
        assert inside.wait(60)
        with torch.no_grad():
            t.model(t.others)
        goes_on.set()

    t.others = t.batch()[0]
    for _ in range(2):
        t.opt.zero_grad()
        handle = t.model[1].register_forward_hook(halt)
        other = threading.Thread(target=evaluate)
        other.start()
        t.train(*t.batch())
        other.join()
        handle.remove()
        inside.clear()
        goes_on.clear()
        t.step()


@loop("torch's machinery")
def passes_of_several_threads(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        batches = [t.batch() for _ in range(4)]
        start = threading.Barrier(4)

        def run(x: Tensor, y: Tensor, start: threading.Barrier = start) -> None:
            start.wait(60)
            t.loss(x, y).backward()

        for x, y in batches:
            t.counts(x, ce(y))
        threads = [threading.Thread(target=run, args=batch) for batch in batches]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        t.step()


def with_workers(method: str) -> Callable[[Trial], None]:
    """Train on batches that another process makes."""

    def run(t: Trial) -> None:
        loader = DataLoader(TensorDataset(*t.batch(2 * N)), N, num_workers=1, multiprocessing_context=method)
        for x, y in loader:
            t.opt.zero_grad()
            t.train(x, y)
            t.step()

    return run


WORKERS = {f"loaders that {method} their workers": with_workers(method) for method in ("fork", "spawn")}


# ---- where no Fisher of examples is that of the gradient -------------------------------------------------------------


@loop("must be said")
def a_backward_in_evaluation_mode(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    t.model.eval()
    t.loss(*t.batch()).backward()
    t.model.train()
    t.step()


@loop("must be said")
def dropped_and_then_a_backward_in_evaluation_mode(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    t.opt.zero_grad()
    t.model.eval()
    t.loss(*t.batch()).backward()
    t.model.train()
    t.step()


@loop("must be said")
def a_module_called_by_itself(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    t.model[0](t.batch()[0]).square().mean().backward()
    t.step()


@loop("must be said")
def a_module_called_by_itself_in_the_same_loss(t: Trial) -> None:
    t.cannot_be()
    x, y = t.batch()
    t.counts(x, ce(y))
    (t.loss(x, y) + t.model[0](t.batch()[0]).square().mean()).backward()
    t.step()


@loop("must be said")
def a_gradient_kept_from_the_last_step(t: Trial) -> None:
    t.train(*t.batch())
    t.step()
    t.cannot_be()
    t.train(*t.batch())
    t.step()


@loop("must be said")
def a_second_step_with_the_same_gradient(t: Trial) -> None:
    t.train(*t.batch())
    t.step()
    t.cannot_be()
    t.step()


@loop("must be said")
def other_weights_in_the_model_s_place(t: Trial) -> None:
    t.cannot_be()
    fast = {k: 0.5 * p for k, p in t.model.named_parameters()}
    x, y = t.batch()
    F.cross_entropy(torch.func.functional_call(t.model, fast, (x,)), y).backward()
    t.counts(x, ce(y))
    t.step()


@loop("must be said")
def an_inner_step_that_is_differentiated(t: Trial) -> None:
    t.cannot_be()
    own = dict(t.model.named_parameters())
    x, y = t.batch()
    inner = F.cross_entropy(torch.func.functional_call(t.model, own, (x,)), y)
    g = torch.autograd.grad(inner, list(own.values()), create_graph=True)
    fast = {k: p - 0.1 * h for (k, p), h in zip(own.items(), g, strict=True)}
    x, y = t.batch()
    t.counts(x, ce(y))
    F.cross_entropy(torch.func.functional_call(t.model, fast, (x,)), y).backward()
    t.step()


@loop("must be said")
def a_copy_s_gradients_assigned(t: Trial) -> None:
    t.cannot_be()
    twin = copy.deepcopy(t.model)
    x, y = t.batch()
    F.cross_entropy(twin(x), y).backward()
    t.counts(x, ce(y))
    for p, q in zip(t.model.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad
    t.step()


@loop("must be said")
def a_backward_that_fails_midway(t: Trial) -> None:
    def fail(g: Tensor) -> None:
        raise KeyError("mine")

    handle = t.model[0].weight.register_hook(fail)
    with contextlib.suppress(KeyError):
        t.loss(*t.batch()).backward()
    assert t.model[4].weight.grad is not None
    handle.remove()
    t.cannot_be()
    t.train(*t.batch())
    t.step()


@loop("must be said")
def a_nan_whose_gradient_is_in_the_step(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    x, y = t.batch()
    x[0, 0] = float("nan")
    t.loss(x, y).backward()
    t.step()


@loop("must be said")
def a_penalty_with_a_backward_of_its_own(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    sum(p.square().sum() for p in t.model.parameters()).backward()
    t.step()


@loop("derivatives in the loss")
def a_gradient_penalty_on_other_inputs(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        other = t.batch()[0].requires_grad_()
        t.counts(x, ce(y))
        (g,) = torch.autograd.grad(t.model(other).sum(), other, create_graph=True)
        (t.loss(x, y) + (g.norm(dim=1) - 1).square().mean()).backward()
        t.step()


@loop("derivatives in the loss")
def a_gradient_penalty_on_the_same_inputs(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        seen = x.clone().requires_grad_()
        t.counts(x, ce(y))
        loss = t.loss(seen, y)
        (g,) = torch.autograd.grad(loss, seen, create_graph=True)
        (loss + g.square().sum()).backward()
        t.step()
