"""K-BFGS: inverses of Kronecker factors kept by BFGS with double damping (Goldfarb, Ren & Bahamou 2020).

Direction H_g ∇ H_a. H_a follows the averaged inputs by "Hessian-action" BFGS on A + √λ I; H_g follows pairs (s, y) of
mean pre-activations and mean scores before and after the step on the same batch, labels being the data's as in the
authors' code. K-BFGS(L) keeps the last pairs in place of H_g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fisherviz.capture.captures import Capture
from fisherviz.capture.joined import concatenate
from fisherviz.network.batches import Batches
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood, resolve
from fisherviz.operators.damping import as_damping
from fisherviz.operators.factorise import SingularMatrixError, cholesky
from fisherviz.optim.bfgs import Inverse, LastPairs, bfgs, double_damping
from fisherviz.optim.directions import Directions, Step
from fisherviz.optim.gradients import Moves, add_direction, balanced, gradient_matrix, matrix_of, split_matrix
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.options import require_known
from fisherviz.optim.passes import Pass
from fisherviz.optim.rules import StepRule, descend, require_finite
from fisherviz.optim.watcher import at_least_float32
from fisherviz.support import choices, timing
from fisherviz.support.processes import Processes, grouped, summed
from fisherviz.support.warning import warn

Means = tuple[Tensor, Tensor, Tensor]
"""Mean input, mean pre-activation and mean score of a layer."""


class QuasiNewton(Directions):
    """H_g v H_a of each layer, v the moving average of its gradients.

    Args:
        data: batches for the first A; None: the first step's.
        likelihood: whose targets they may have.
        pair_decay: of the pairs.
        powell: first threshold of the double damping.
        memory: number of pairs that stand for H_g; None: H_g itself.
    """

    needs_closure = "K-BFGS evaluates the loss again at the new weights for its curvature pairs: call step(closure)."

    def __init__(
        self, data: Any, likelihood: Likelihood, pair_decay: float = 0.9, powell: float = 0.2, memory: int | None = None
    ) -> None:
        if memory is not None:
            choices.count("memory", memory)
        self.memory = memory
        choices.number("pair_decay", pair_decay, 0.0, 1.0)
        choices.number("powell", powell, 0.0, 1.0)
        self.first = None if data is None else Batches(data, likelihood=likelihood)
        self.pair_decay, self.powell = pair_decay, powell
        self.factors: dict[str, dict[str, Tensor]] = {}

    def of(self, step: Step) -> Moves:
        """Directions at the old weights."""
        if self.first is not None and step.active and not self.factors:
            self.average_data(step)
        self.update_inputs(step)
        moves: Moves = {}
        for layer in step.active:
            own = self.factors[layer.name]
            v = gradient_matrix(layer, step.decays)
            m = step.group_of[next(iter(layer.parameters.values()))]["momentum"]
            own["v"] = (1 - m) * v if "v" not in own else own["v"].mul_(m).add_(v, alpha=1 - m)
            moves |= split_matrix(layer, _outputs(own) @ own["v"] @ own["Ha"])
        return moves

    def means(self, step: Step) -> dict[str, Means]:
        """Mean input, mean pre-activation W̄ ā and mean score of each layer."""
        found = self._averages(step, lambda capture: capture.a[:, 0].sum(0), lambda capture: capture.g[0, :, 0].sum(0))
        out = {}
        for layer, (a, g) in zip(step.active, found, strict=True):
            W = matrix_of(layer, {p: p.detach() for p in layer.parameters.values()}).to(a.dtype)
            if layer.da > W.shape[1]:
                raise RuntimeError(f"layer {layer.name!r} has a bias that is not trained here; train or leave both.")
            out[layer.name] = a, W @ a, g
        return out

    def learn(self, step: Step, before: Mapping[str, Means]) -> None:
        """H_a and H_g from the means before and after the weights have changed."""
        if not step.active:
            return
        for layer in step.active:
            own, mean_a = self.factors[layer.name], before[layer.name][0]
            s = own["Ha"] @ mean_a
            damped = own["A"] @ s + _root(step, layer) * s
            own["Ha"] = bfgs(own["Ha"], s, damped, mean_a)
        self.again(step)
        after = self.means(step)
        for layer in step.active:
            self.update_outputs(step, layer, before[layer.name], after[layer.name])

    def _capture(self, step: Step, layer: Layer) -> Capture:
        parts = [made.captures[layer.name] for made in step.passes if made.examples and layer.name in made.captures]
        if not parts:  # nothing of this process's examples counts
            like = at_least_float32(next(iter(layer.parameters.values())))
            return Capture(like.new_zeros(0, 1, layer.da), like.new_zeros(1, 0, 1, layer.d_out))
        capture = concatenate(parts)
        if not isinstance(capture, Capture) or not capture.factored:
            raise NotImplementedError(
                f"layer {layer.name!r} shares its weights over positions, for which K-BFGS is not defined; "
                "put it in a group with approximation='none'."
            )
        return capture

    def _averages(self, step: Step, *sums: Callable[[Capture], Tensor]) -> list[list[Tensor]]:
        """By layer, means over the examples of all processes that train together, from sums over each one's own."""
        processes, captures = Processes.training(), [self._capture(step, layer) for layer in step.active]
        counts = summed([capture.examples for capture in captures], step.moments.device)
        return [
            [processes.total(sum_of(capture)) / n for sum_of in sums]
            for capture, n in zip(captures, counts, strict=True)
        ]

    @timing.part("statistics")
    def update_inputs(self, step: Step) -> None:
        """A, and at the first step the two inverses."""
        found = self._averages(step, lambda capture: capture.a[:, 0].mT @ capture.a[:, 0])
        for layer, (fresh,) in zip(step.active, found, strict=True):
            own = self.factors.setdefault(layer.name, {})
            own["A"] = fresh if "A" not in own else own["A"].mul_(step.decay).add_(fresh, alpha=1 - step.decay)
            if "Ha" not in own:
                try:
                    factor = cholesky(own["A"], f"the first A of layer {layer.name!r}", shift=_root(step, layer))
                except SingularMatrixError as error:  # what is added to A is √λ
                    what, size, smallest = error.what, error.size, error.smallest
                    raise SingularMatrixError(what, size, smallest, error.damping**2, error.why) from error
                own["Ha"] = torch.cholesky_inverse(factor)
                if self.memory is None:
                    own["Hg"] = torch.eye(layer.d_out, dtype=fresh.dtype, device=fresh.device)
                else:
                    own["S"] = own["Y"] = fresh.new_zeros(0, layer.d_out)

    @timing.part("statistics")
    def update_outputs(self, step: Step, layer: Layer, before: Means, after: Means) -> None:
        """H_g, or the pairs that stand for it, from the pair of the step."""
        (_, h, g), (_, h_new, g_new) = before, after
        own, keep = self.factors[layer.name], self.pair_decay
        for key, change in (("s", h_new - h), ("y", g_new - g)):
            own[key] = (1 - keep) * change if key not in own else own[key].mul_(keep).add_(change, alpha=1 - keep)
        inverse = _outputs(own)
        pair = balanced(own["s"], own["y"])  # its scale is no matter, and the products of small ones would vanish
        s, y = double_damping(*pair, inverse, self.powell, _root(step, layer))
        if isinstance(inverse, LastPairs):
            assert self.memory is not None
            pairs = inverse.with_pair(s, y, g, self.memory)
            own["S"], own["Y"] = pairs.S, pairs.Y
        else:
            own["Hg"] = bfgs(inverse, s, y, g)

    @timing.part("statistics")
    def again(self, step: Step) -> None:
        """The closure at the new weights; its passes replace the step's, its gradients are dropped."""
        assert step.closure is not None
        # by value where the next backward of DistributedDataParallel may overwrite the memory of those that it gave
        gradients = [(p, p.grad.clone() if p.grad is not None and grouped() else p.grad) for p in step.group_of]
        buffers = [(b, b.clone()) for b in step.watcher.model.buffers()]
        step.passes.clear()
        for p, _ in gradients:
            p.grad = None
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            step.closure()
        for p, g in gradients:
            p.grad = g
        for b, saved in buffers:
            b.copy_(saved)

    @timing.part("statistics")
    def average_data(self, step: Step) -> None:
        """A over one pass of the data."""
        assert self.first is not None
        totals: dict[str, Tensor] = {}
        count = 0.0
        for batch, targets in self.first:
            inputs = step.watcher.weighed(batch, targets)
            captures, n = step.watcher.captures_of(inputs, lambda z: torch.zeros_like(z).unsqueeze(0))
            count += n
            for layer in step.active:
                a = captures[layer.name].a[:, 0]  # type: ignore[union-attr]
                totals[layer.name] = a.mT @ a + totals.get(layer.name, 0)
        processes, (count,) = Processes.training(), summed([count], step.moments.device)
        for name, total in totals.items():
            self.factors[name] = {"A": processes.total(total) / count}

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """A, H_a, H_g or its pairs, and the averages of each layer."""
        return {"factors": {name: {k: t.clone() for k, t in own.items()} for name, own in self.factors.items()}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of K-BFGS where this is K-BFGS(L), or the other way round."""
        if any(("Hg" in own) != (self.memory is None) for own in state["factors"].values()):
            raise ValueError("the state is that of a KBFGS with another memory=; create this one as it was then.")

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave."""
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.factors = {
            name: {key: t.to(device, copy=True) for key, t in own.items()} for name, own in state["factors"].items()
        }


class Follow(StepRule[QuasiNewton]):
    """θ ← θ − lr · direction, whose momentum is in it already; then the curvature pairs."""

    def take(self, step: Step, directions: QuasiNewton) -> None:
        """Change the weights."""
        before = directions.means(step)
        moves = directions.of(step)
        require_finite(step, moves)
        for p, d in moves.items():
            if p.grad is not None:
                add_direction(p, d, -float(step.group_of[p]["lr"]))
        descend(step.groups, step.state, {}, done=moves)
        directions.learn(step, before)


class KBFGSKeywords(TypedDict, total=False):
    """Rare options of `KBFGS`."""

    pair_decay: float
    powell: float
    memory: int | None


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
        momentum: of the gradient's moving average, m v + (1 − m) ∇; of a plain group, SGD's.
        weight_decay: ℓ₂ coefficient.
        decay: of A.
        pair_decay: of the pairs.
        powell: first threshold of the double damping.
        memory: K-BFGS(L): the last so many pairs stand for H_g, from the identity (the authors take 100); None: H_g is
            kept itself.
        loss_scale: c where the loss that is backpropagated is c times the sum of the examples' nll; None: 1/N, the
            mean, but for a categorical likelihood whose outputs have positions, or some of them left out, what the
            loss's own gradient tells. A GradScaler, which multiplies by a scale of its own, is refused.
        output: picks the output tensor from what the model returns.

    Raises:
        ValueError: an option is out of range, or there is data and no layer to precondition.
    """

    Options: ClassVar[type] = KBFGSKeywords

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
        loss_scale: float | None = None,
        output: Callable[[Any], Tensor] | None = None,
        **options: Unpack[KBFGSKeywords],
    ) -> None:
        require_known(type(self), options)
        choices.positive("damping", damping)
        self._newton = QuasiNewton(data, resolve(likelihood), **options)
        super().__init__(
            model, likelihood, "identity", params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, decay=decay, kind="empirical", loss_scale=loss_scale, output=output,
        )  # fmt: skip
        plain = {layer.name: "it has no Kronecker factors" for layer in self.layers if layer.own_inputs}
        plain |= {layer.name: "it shares its parameters with another module" for layer in self.layers if layer.ties}
        self.network.settle(self.network.structure.without(plain))
        if data is not None and not self.layers:
            raise ValueError(
                "data is there for the first A of the preconditioned layers, and every parameter is frozen or in a "
                "group with approximation='none'; leave data out, or leave K-BFGS a layer."
            )

    def _compose(self, options: Any, defaults: dict[str, Any]) -> tuple[Directions, StepRule[Any]]:
        return self._newton, Follow()

    def _reads_labels(self) -> bool:
        return True

    def _settle(self, generic: list[Layer]) -> list[Layer]:
        assert self._watcher is not None
        self._watcher.generic_diagonal = False
        if generic:
            warn(f"layers {', '.join(repr(g.name) for g in generic)} have no factors and are left plain by K-BFGS.")
        return [layer for layer in self.layers if layer.structured]

    @timing.part("statistics")
    def _collect(self, made: Pass) -> None:
        if not made.retained:
            made.leave_out()
        kept = made.captures
        super()._collect(made)
        made.captures = kept


def _outputs(own: Mapping[str, Tensor]) -> Inverse:
    """A layer's H_g."""
    return own["Hg"] if "Hg" in own else LastPairs(own["S"], own["Y"])


def _root(step: Step, layer: Layer) -> float:
    """√λ of a layer."""
    rule = as_damping(step.damping(layer))
    assert rule is not None
    return rule.strength**0.5
