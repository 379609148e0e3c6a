"""K-BFGS: inverses of Kronecker factors kept by BFGS with double damping (Goldfarb, Ren & Bahamou 2020).

Direction H_g ∇ H_a. H_a follows the averaged inputs by "Hessian-action" BFGS on A + √λ I; H_g follows pairs
(s, y) of mean
pre-activations and mean scores before and after the step on the same batch, labels being the data's as in
the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.capture.captures import Capture, concatenate
from fisherviz.network.batches import Batches
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim.averages import distributed
from fisherviz.optim.optimizer import Directions, NaturalGradient
from fisherviz.optim.revisit import capture_forward
from fisherviz.optim.selection import gradient_matrix, say_once, split_matrix
from fisherviz.optim.settings import check_number, check_positive
from fisherviz.optim.watcher import Inputs, Pass
from fisherviz.support import timing

SKIP = 1e-4
"""Pairs with sᵀy at most this times ‖s‖² times the mean score's norm are skipped (the authors' code)."""


class KBFGS(NaturalGradient):
    """Kronecker-factored quasi-Newton method (Goldfarb et al. 2020, algorithm 3).

    Each step takes an extra forward and backward pass of the closure at the new weights, for the curvature
    pairs.

    Args:
        model: the model; its layers have one position each (no convolutions, no sequences).
        likelihood: as for `fv.Probe`; the criterion is its mean nll unless `loss_scale` says otherwise.
        data: a re-iterable of batches for the first A; None: the first step's batch.
        params: parameter groups, None for all.
        lr: learning rate.
        damping: λ; √λ is added to A and is the second threshold of the double damping.
        momentum: of the gradient's moving average, m v + (1 − m) ∇.
        weight_decay: ℓ₂ coefficient.
        decay: of A.
        pair_decay: of the pairs.
        powell: first threshold of the double damping.
        loss_scale: c where the loss that is backpropagated is c times the sum of the examples' nll; None: 1/N, the
            mean. A GradScaler, which multiplies by a scale of its own, is refused.
        output: picks the output tensor from what the model returns.

    Raises:
        ValueError: an option is out of range, or there is data and no layer to precondition.
    """

    _needs_closure = "K-BFGS evaluates the loss again at the new weights for its curvature pairs: call step(closure)."

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        data: Any = None,
        params: Iterable[Any] | None = None,
        lr: float = 0.3,
        damping: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.9,
        pair_decay: float = 0.9,
        powell: float = 0.2,
        loss_scale: float | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        for name, value in (("pair_decay", pair_decay), ("powell", powell)):
            check_number(name, value, 0.0, 1.0)
        check_positive("damping", damping)
        self.pair_decay, self.powell = pair_decay, powell
        self._first = None if data is None else Batches(data)
        super().__init__(
            model, likelihood, "identity", params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, decay=decay, kind="empirical", loss_scale=loss_scale, output=output,
        )  # fmt: skip
        self._factors: dict[str, dict[str, Tensor]] = {}
        if self._first is not None and not self.layers:
            raise ValueError(
                "data is there for the first A of the preconditioned layers, and every parameter is frozen or in a "
                "group with approximation='none'; leave data out, or leave K-BFGS a layer."
            )

    def _reads_labels(self) -> bool:
        return True

    def _settle(self, generic: list[Layer]) -> list[Layer]:
        assert self._watcher is not None
        self._watcher.generic_diagonal = False
        if generic:
            say_once(
                f"layers {', '.join(repr(g.name) for g in generic)} have no structure and are left plain by K-BFGS."
            )
        return [layer for layer in self.layers if layer.structured]

    @timing.part("statistics")
    def _collect(self, made: Pass) -> None:
        kept = made.captures
        super()._collect(made)
        made.captures = kept

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: zeroes the gradients, evaluates the loss, backpropagates and returns it; evaluated twice.

        Returns:
            What the closure returned at the old weights.

        Raises:
            RuntimeError: no closure, or no statistics since the last step.
        """
        return self._step(closure)

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        if distributed():
            raise NotImplementedError("K-BFGS runs in one process; under torch.distributed use foof or kfac.")
        assert closure is not None
        layers = self._active() if self.moments is not None else []
        before = {layer.name: self._means(layer) for layer in layers}
        if self._first is not None and layers and not self._factors:
            self._average_data(layers)
        for layer in layers:
            self._update_inputs(layer)
        decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        directions: Directions = {}
        for layer in layers:
            own = self._factors[layer.name]
            v, m = gradient_matrix(layer, decays), self._group(layer)["momentum"]
            own["v"] = (1 - m) * v if "v" not in own else own["v"].mul_(m).add_(v, alpha=1 - m)
            directions |= split_matrix(layer, own["Hg"] @ own["v"] @ own["Ha"])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    d = directions.get(p)
                    d = p.grad.add(p, alpha=group["weight_decay"]) if d is None else d
                    p.add_(d, alpha=-float(group["lr"]))
        for layer in layers:
            own, mean_a = self._factors[layer.name], before[layer.name][0]
            s = own["Ha"] @ mean_a
            damped = own["A"] @ s + self._damping(layer) ** 0.5 * s
            own["Ha"] = bfgs(own["Ha"], s, damped, mean_a)
        self._again(closure)
        for layer in layers:
            self._update_outputs(layer, before[layer.name])

    def _group(self, layer: Layer) -> dict[str, Any]:
        p = next(iter(layer.parameters.values()))
        return next(group for group in self.param_groups if any(p is q for q in group["params"]))

    def _damping(self, layer: Layer) -> float:
        return float(self._group(layer)["damping"])

    def _capture(self, layer: Layer) -> Capture:
        parts = [made.captures[layer.name] for made in self._passes if layer.name in made.captures]
        capture = concatenate(parts)
        if not isinstance(capture, Capture) or not capture.factored:
            raise NotImplementedError(
                f"layer {layer.name!r} shares its weights over positions, for which K-BFGS is not defined; "
                "put it in a group with approximation='none'."
            )
        return capture

    def _means(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Mean input, mean pre-activation W̄ ā and mean score."""
        capture = self._capture(layer)
        a = capture.a[:, 0].mean(0)
        W = torch.cat([p.detach().reshape(layer.d_out, -1) for p in _weights(layer)], 1).to(a.dtype)
        if layer.da > W.shape[1]:
            raise RuntimeError(f"layer {layer.name!r} has a bias that is not trained here; train or leave both.")
        return a, W @ a, capture.g[0, :, 0].mean(0)

    @timing.part("statistics")
    def _update_inputs(self, layer: Layer) -> None:
        capture = self._capture(layer)
        a = capture.a[:, 0]
        own = self._factors.setdefault(layer.name, {})
        fresh = a.mT @ a / len(a)
        own["A"] = fresh if "A" not in own else own["A"].mul_(self.decay).add_(fresh, alpha=1 - self.decay)
        if "Ha" not in own:
            eye = torch.eye(len(fresh), dtype=a.dtype, device=a.device)
            own["Ha"] = torch.cholesky_inverse(torch.linalg.cholesky(own["A"] + self._damping(layer) ** 0.5 * eye))
            own["Hg"] = torch.eye(layer.d_out, dtype=a.dtype, device=a.device)

    @timing.part("statistics")
    def _update_outputs(self, layer: Layer, before: tuple[Tensor, Tensor, Tensor]) -> None:
        _, h, g = before
        _, h_new, g_new = self._means(layer)
        own, keep = self._factors[layer.name], self.pair_decay
        for key, change in (("s", h_new - h), ("y", g_new - g)):
            own[key] = (1 - keep) * change if key not in own else own[key].mul_(keep).add_(change, alpha=1 - keep)
        s, y = double_damping(own["s"], own["y"], own["Hg"], self.powell, self._damping(layer) ** 0.5)
        own["Hg"] = bfgs(own["Hg"], s, y, g)

    @timing.part("statistics")
    def _again(self, closure: Callable[[], Any]) -> None:
        """The closure at the new weights; its passes replace the step's, its gradients are dropped."""
        gradients = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        self._passes = []
        for p, _ in gradients:
            p.grad = None
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            closure()
        for p, g in gradients:
            p.grad = g
        for b, saved in buffers:
            b.copy_(saved)

    @timing.part("statistics")
    def _average_data(self, layers: list[Layer]) -> None:
        """A over one pass of the data."""
        assert self._watcher is not None
        assert self._first is not None
        totals: dict[str, Tensor] = {}
        count = 0
        device = next(iter(self._known)).device
        for batch, _ in self._first:
            inputs = batch if isinstance(batch, tuple | list) else (batch,)
            arguments: Inputs = (tuple(x.to(device) for x in inputs), {})
            captures, n = capture_forward(self._watcher, arguments, lambda z: torch.zeros_like(z).unsqueeze(0))
            count += n
            for layer in layers:
                a = captures[layer.name].a[:, 0]  # type: ignore[union-attr]
                totals[layer.name] = a.mT @ a + totals.get(layer.name, 0)
        for name, total in totals.items():
            self._factors[name] = {"A": total / count}

    def _own_state(self) -> dict[str, Any]:
        factors = {name: {key: t.clone() for key, t in own.items()} for name, own in self._factors.items()}
        return super()._own_state() | {"factors": factors}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        device = self.generator.device
        self._factors = {
            name: {key: t.to(device, copy=True) for key, t in own.items()} for name, own in state["factors"].items()
        }


def bfgs(H: Tensor, s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """BFGS update of an inverse, (I − ρsyᵀ) H (I − ρysᵀ) + ρssᵀ; skipped where the pair has no usable curvature."""
    sy = torch.dot(s, y)
    if not bool(sy > 0) or bool(sy <= SKIP * torch.dot(s, s) * gradient.norm()):
        return H
    Hy, rho = H @ y, 1 / sy
    return H + (rho**2 * torch.dot(y, Hy) + rho) * torch.outer(s, s) - rho * (torch.outer(s, Hy) + torch.outer(Hy, s))


def double_damping(s: Tensor, y: Tensor, H: Tensor, powell: float, second: float) -> tuple[Tensor, Tensor]:
    """Powell's damping with H on s, then with I on y.

    Args:
        s: change of the mean pre-activations.
        y: change of the mean scores.
        H: the inverse that is updated.
        powell: sᵀy is raised to at least this times yᵀHy.
        second: and then to at least this times sᵀs.

    Returns:
        The damped pair.
    """
    Hy = H @ y
    sy, yHy = torch.dot(s, y), torch.dot(y, Hy)
    if bool(sy < powell * yHy):
        theta = (1 - powell) * yHy / (yHy - sy)
        s = theta * s + (1 - theta) * Hy
    ss, sy = torch.dot(s, s), torch.dot(s, y)
    if bool(sy < second * ss):
        theta = (1 - second) * ss / (ss - sy)
        y = theta * y + (1 - theta) * s
    return s, y


def _weights(layer: Layer) -> list[nn.Parameter]:
    own = [layer.module._parameters.get(key) for key in ("weight", "bias")]
    return [p for p in own if p is not None and any(p is q for q in layer.parameters.values())]
