"""A trial of one loop with one optimizer: what counts is noted, and every step is compared with what it has to be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherviz as fv
from benchmarks.trust import dense

N = 12
"""Examples of a batch, where a loop does not say another number."""
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
        self.hook: Callable[[Tensor], Tensor] | None = None
        """What the loop has on the gradients of all parameters: it acts on whatever a step evaluates on its way too."""
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
        on = [] if self.hook is None else [p for p in self.twin.parameters() if p.requires_grad]
        handles = [p.register_hook(self.hook) for p in on]
        self._step(self.alone, self.twin)
        for handle in handles:
            handle.remove()
        self.twin.requires_grad_(True)
        return [new - old for new, old in zip(dense.weights(self.twin), before, strict=True)]


def _but(layers: tuple[int, ...], layer: int) -> tuple[int, ...]:
    return tuple(i for i in layers if i != layer)


def _gap(moved: Tensor, wanted: Tensor) -> float:
    size = float(wanted.norm())
    return float((moved - wanted).norm()) / size if size else float(moved.norm())


ENTERED: dict[str, dict[str, Callable[[Trial], None]]] = {}
"""By kind, then by name, as the files of this folder enter them."""


def loop(kind: str) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Enter a loop under its kind."""

    def enter(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        ENTERED.setdefault(kind, {})[function.__name__.replace("_", " ")] = function
        return function

    return enter


def ce(y: Tensor, scale: float = 1.0, **options: Any) -> Callable[[Tensor], Tensor]:
    """A loss of outputs."""
    return lambda z: scale * F.cross_entropy(z, y, **options)
