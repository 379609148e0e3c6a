"""NaturalGradient: any approximation, any damping, one step rule, in a plain training loop.

θ ← θ − lr · (F̂ + damping)⁻¹ ∇h with momentum after preconditioning. Statistics come from the user's own forwards
and backwards (`watch`), averages from `moments`, solves from `preconditioner`; the presets only set defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.approximations.registry import make
from fisherviz.capture.hooks import Call
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood, resolve
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.optim import settings
from fisherviz.optim.averages import Moments, distributed, positions_and_neighbours
from fisherviz.optim.exact import ExactFisher
from fisherviz.optim.low_rank import Direction, add_direction, dense, split_rows
from fisherviz.optim.passes import Source, make_source
from fisherviz.optim.preconditioner import INVERT_FROM, Preconditioner, Rows
from fisherviz.optim.processes import summed
from fisherviz.optim.revisit import evaluate
from fisherviz.optim.selection import (
    choose_layers,
    gradient_matrix,
    one_damping,
    refuse_thawed,
    rows_explain,
    say_once,
    settle,
    split_matrix,
    unwrap,
)
from fisherviz.optim.structure import decide, later
from fisherviz.optim.watcher import Pass, Wanted, Watcher
from fisherviz.support import timing

Directions = dict[nn.Parameter, Direction]


class NaturalGradient(torch.optim.Optimizer):
    """Preconditions the gradient with a damped approximation of the Fisher.

    Args:
        model: the model that is trained; its forwards in training mode are watched.
        likelihood: as for `fv.Probe`; the criterion is its mean nll over the batch unless `loss_scale` says otherwise.
        method: "exact" (dense, small networks), any name in `fv.approximations`, or an `Approximation`.
        params: torch parameter groups, None for all; a group with approximation="none" is left to plain SGD.
        lr: learning rate.
        damping: λ, added to the matrix, or a `Tikhonov` or `FactoredTikhonov`; a group may have its own.
        momentum: of the preconditioned gradient.
        weight_decay: ℓ₂ coefficient, added to the gradient before it is preconditioned.
        T: steps between factorisations.
        decay: weight of the past in the moving averages; 0 for the statistics of the step's own passes.
        ramp: whether the decay starts as min(1 − 1/k, decay), as in the K-FAC paper.
        kind: "exact", "mc" or "empirical"; None: "exact" for method "exact", otherwise "mc".
        samples: sampled labels per example for kind "mc".
        reduction: whether the Fisher is the "mean" or the "sum" over the step's examples.
        loss_scale: c where the loss that is backpropagated is c times the sum of the examples' nll, for kind
            "empirical", whose scores are read from that backward; None: 1/N. A loss multiplied by s by hand, its
            gradients divided again before the step, has c = s/N; a GradScaler, whose s changes, is refused.
        output: picks the output tensor from what the model returns.
        **options: of the approximation, such as setting="reduce".

    Raises:
        ValueError: an option is out of range or unknown.
        TypeError: the model is no module, the likelihood cannot be told, or damping or loss_scale is no number.
        RuntimeError: the model is compiled already.

    Example:
        >>> import torch, fisherviz as fv
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = fv.optim.NaturalGradient(model, "categorical", "kfac", lr=0.1, damping=1e-2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.step(); opt.zero_grad()
    """

    _needs_inputs = False
    _captures = True
    _needs_closure = ""
    """What is said where `step` needs a closure and gets none."""
    grad_scale: Tensor | None
    found_inf: Tensor
    """Both there only while a GradScaler calls `step`."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        method: str | type[Approximation] | Approximation = "exact",
        *,
        params: Iterable[Any] | None = None,
        lr: float,
        damping: float | Damping,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        T: int = 1,
        decay: float = 0.95,
        ramp: bool = False,
        kind: str | None = None,
        samples: int = 1,
        reduction: str = "mean",
        loss_scale: float | None = None,
        output: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        model = unwrap(model)
        self.likelihood = resolve(likelihood)
        self.approximation = ExactFisher(**options) if method == "exact" else make(method, **options)
        self.kind = ("exact" if method == "exact" else "mc") if kind is None else kind
        settings.check_averages(T, decay, ramp, self.kind, samples, reduction)
        settings.check_loss_scale(loss_scale)
        settings.check_output(output)
        self.T, self.decay, self.ramp, self.reduction, self.samples = T, decay, ramp, reduction, samples
        self.k = 0
        """Steps taken."""
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay, "approximation": None,
        }  # fmt: skip
        settings.check_group(defaults)
        super().__init__(list(model.parameters()) if params is None else settings.as_groups(params), defaults)
        for group in self.param_groups:
            settings.check_group(group)
        self.model = model
        self.layers = choose_layers(model, self.param_groups)
        self._known = {p for layer in self.layers for p in layer.parameters.values()}
        device = next(iter(self._known)).device if self._known else torch.device("cpu")
        self.generator = torch.Generator(device=device).manual_seed(torch.initial_seed())
        self.moments: Moments | None = None
        self._passes: list[Pass] = []
        self._preconditioner: tuple[tuple[Any, ...], Preconditioner] | None = None
        self._watcher: Watcher | None = None
        self._guesses_scale = False
        if self.layers:
            wanted = self._wanted(loss_scale)
            self._guesses_scale = wanted.scores and loss_scale is None
            self._watcher = Watcher(model, self.layers, output, wanted, self._collect, self._describe)

    # ---- what passes show ----------------------------------------------------------------------------------

    def _wanted(self, loss_scale: float | None) -> Wanted:
        labels = self._reads_labels()
        return Wanted(
            source=self._source() if labels and self.kind != "empirical" else None,
            scores=labels and self.kind == "empirical",
            loss_scale=loss_scale,
            local=self.approximation.name in ("kfac", "foof")
            and (not self._needs_inputs or not any(group["weight_decay"] for group in self.param_groups)),
            inputs=self._needs_inputs,
            captures=self._captures,
        )

    def _reads_labels(self) -> bool:
        structured = [layer for layer in self.layers if layer.structured]
        return not structured or any(
            self.approximation.wants_capture(layer)
            or any(s.needs_gradients for s in self.approximation.statistics(layer).values())
            for layer in structured
        )

    def _source(self) -> Source:
        return make_source(self.likelihood, self.kind, self.samples, self.generator, lambda: self.k + 1)

    @property
    def _defers(self) -> bool:
        return self.T >= INVERT_FROM

    def _describe(self, calls: dict[str, list[Call]], z: Tensor) -> None:
        """Settle which layers have structure, at the first pass; those that it leaves out when they first run."""
        if self.moments is not None:
            self.moments.positions |= later(self.moments.positions, calls, z)
            return
        decide(self.layers, calls, z)
        kept = self._settle([layer for layer in self.layers if not layer.structured])
        structured = {name: made for name, made in calls.items() if made[0].layer.structured}
        positions, adjacent = positions_and_neighbours(structured)
        self.moments = Moments(self.approximation, kept, positions, adjacent, self._defers)

    def _settle(self, generic: list[Layer]) -> list[Layer]:
        """Layers that are preconditioned; what happens to those without structure is said once."""
        assert self._watcher is not None
        kept = settle(self.model, self.layers, generic, self.approximation, self._reads_labels())
        self._watcher.generic_diagonal = any(not layer.structured for layer in kept)
        return kept

    @timing.part("statistics")
    def _collect(self, made: Pass) -> None:
        if self.moments is not None and self._captures:
            self.moments.collect(made.captures, made.examples)
        made.captures = {}
        self._passes.append(made)

    # ---- the step ------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the loss and its gradients once more; its forward counts.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a preconditioned layer has a gradient but no statistics since the last step, or a GradScaler
                scaled the scores that kind "empirical" reads.
        """
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """The step itself: torch puts step hooks around each class's `step`, so that none may call another's."""
        self._refuse_scaler()
        if self._needs_closure and closure is None:
            raise RuntimeError(self._needs_closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = next(iter(self._known)).device.type if self._known else "cpu"
        with torch.autocast(device, enabled=False):
            self._check_passes()
            if any(p.grad is not None for group in self.param_groups for p in group["params"]):
                self.k += 1
                self._advance(loss, closure)
        self._forget()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Torch's protocol: a GradScaler announces itself before `step` to optimizers that say True here."""
        return bool(self._needs_closure) or (self._watcher is not None and self._watcher.wanted.scores)

    def _refuse_scaler(self) -> None:
        if not hasattr(self, "found_inf"):
            return
        del self.found_inf, self.grad_scale  # torch leaves them there when `step` raises
        self._forget()
        raise RuntimeError(settings.SCALED_CLOSURE if self._needs_closure else settings.SCALED)

    def _forget(self) -> None:
        self._passes = []
        if self.moments is not None:
            self.moments.forget()

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        self._apply(self._directions())

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The closure's loss at the present weights: not a training pass, and the gradients are put back."""
        assert self._watcher is not None
        return evaluate(self._watcher, closure, [p for group in self.param_groups for p in group["params"]])

    def _active(self) -> list[Layer]:
        """Preconditioned layers with a gradient."""
        layers = self.layers if self.moments is None else self.moments.space.layers
        return [layer for layer in layers if any(p.grad is not None for p in layer.parameters.values())]

    def _check_passes(self) -> None:
        seen = [sum(made.bad for made in self._passes), sum(made.examples for made in self._passes)]
        bad, examples = summed(seen, self.generator.device)  # all processes raise, or none: none waits for another
        if bad:
            self._forget()
            raise ValueError(settings.NOT_FINITE.format(self.k + 1, int(bad), int(examples)))
        if len(self._passes) > 1 and self._guesses_scale:
            say_once(settings.ACCUMULATED.format(len(self._passes)))
            self._guesses_scale = False
        refuse_thawed(self.param_groups, self._known)
        for layer in self._active():
            if not self._seen(layer):
                raise RuntimeError(
                    f"layer {layer.name!r} has a gradient but no statistics since the last step: no forward of the "
                    "model in training mode ran it and was backpropagated. Call model.train() and the model itself "
                    "(not a copy), create the optimizer before a compiled model first runs, pass checkpoint "
                    "use_reentrant=False, or put the layer in a group with approximation='none'."
                )

    def _seen(self, layer: Layer) -> bool:
        return self.moments is not None and self.moments.saw(layer)

    def _due(self) -> bool:
        """Whether this step factorises anew."""
        return (self.k - 1) % self.T == 0

    def _decay_now(self) -> float:
        return min(1 - 1 / self.k, self.decay) if self.ramp else self.decay

    def _directions(self) -> Directions:
        """Preconditioned gradients of all layers with a gradient."""
        active = self._active()
        if self.moments is None or not active:
            return {}
        self._update_moments(self._due())
        made = self._preconditioner_now()
        if not all(made.has(layer) for layer in active):
            self._update_moments(True, blend=False)  # a layer ran for the first time
            made = self._preconditioner_now()
        return self._solve(made, active)

    @timing.part("statistics")
    def _update_moments(self, due: bool, blend: bool = True) -> None:
        assert self.moments is not None
        if blend:
            self.moments.advance(self._decay_now(), due, keep=self.T > 1)
        else:
            self.moments.snapshot(keep=self.T > 1, missing=True)
        if due or self.moments.refines:
            self._preconditioner = None

    @timing.part("inversion")
    def _solve(self, preconditioner: Preconditioner, active: list[Layer]) -> Directions:
        decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        out: Directions = {}
        whole: dict[str, Tensor] = {}
        for layer in active:
            rows = self._rows(preconditioner, layer, decays)
            if rows is not None:
                out |= split_rows(layer, *preconditioner.solve_rows(layer, rows))
            else:
                whole[layer.name] = gradient_matrix(layer, decays).reshape(-1)
        if whole:
            solved = preconditioner.solve(whole)
            for layer in active:
                if layer.name in solved:
                    out |= split_matrix(layer, solved[layer.name])
        return out

    def _rows(self, preconditioner: Preconditioner, layer: Layer, decays: dict[nn.Parameter, float]) -> Rows | None:
        """The rows behind the layer's gradient, if it is exactly one unmodified local backward and they cost less."""
        return self._gradient_rows(layer, decays, partial(preconditioner.low_rank_pays, layer))

    def _gradient_rows(
        self, layer: Layer, decays: Mapping[nn.Parameter, float], pays: Callable[[int], bool]
    ) -> Rows | None:
        """The rows behind the layer's gradient, if their number pays and they are one unmodified local backward."""
        if len(self._passes) != 1 or distributed() or any(decays[p] for p in layer.parameters.values()):
            return None
        rows = self._passes[0].rows_behind(layer)
        if rows is None or not pays(len(rows[0])):
            return None
        return rows if rows_explain(layer, *rows) else None

    @timing.part("inversion")
    def _preconditioner_now(self) -> Preconditioner:
        """The damped matrix, factorised anew after a snapshot or a change of damping."""
        assert self.moments is not None
        dampings = self._dampings()
        rules = {layer.name: self._rule(one_damping(layer, dampings)) for layer in self.moments.space.layers}
        key = tuple(rules.values())
        if self._preconditioner is None or self._preconditioner[0] != key:
            matrix = self.moments.build()
            if self.reduction == "sum" and self.approximation.follows_scale:
                matrix = matrix.scale(self.moments.snapshot_examples)
            self._preconditioner = (key, Preconditioner(matrix, rules, self.T >= INVERT_FROM))
        return self._preconditioner[1]

    def _dampings(self) -> dict[nn.Parameter, float | Damping]:
        return {p: group["damping"] for group in self.param_groups for p in group["params"]}

    def _rule(self, damping: float | Damping) -> Tikhonov | FactoredTikhonov | None:
        """What a group's damping means for this optimizer."""
        return as_damping(damping)

    def _apply(self, directions: Directions) -> None:
        """θ ← θ − lr · (momentum buffer of the direction); parameters without a direction take their gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = directions.get(p)
                if d is None:
                    d = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                if group["momentum"]:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = dense(d).clone()
                    else:
                        add_direction(state["momentum_buffer"], d, 1.0, group["momentum"])
                    d = state["momentum_buffer"]
                add_direction(p, d, -float(group["lr"]))

    # ---- saving --------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Refused: hooks and averages belong to one model, and a copy would have neither."""
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled; use state_dict() and load_state_dict().")

    def state_dict(self) -> dict[str, Any]:
        """Torch's state and "fisherviz": generator, averages and what the cached factorisations are made from."""
        made = super().state_dict()
        return made | {"param_groups": settings.plain_groups(made["param_groups"]), "fisherviz": self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`; training goes on bit for bit.

        Raises:
            ValueError: the state is another optimizer's, network's or method's.
        """
        settings.check_state(state_dict, self._own_state())
        groups = settings.whole_groups(state_dict["param_groups"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "fisherviz"} | {"param_groups": groups})
        try:
            self._load_own_state(state_dict["fisherviz"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(settings.DAMAGED.format(error)) from error

    def _own_state(self) -> dict[str, Any]:
        return {
            "method": self.approximation.name,
            "shapes": settings.shapes_of(self.layers),
            "k": self.k,
            "generator": self.generator.get_state(),
            "moments": None if self.moments is None else self.moments.state_dict(),
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.k = state["k"]
        self.generator.set_state(state["generator"].cpu())
        self._preconditioner, self._passes, self.moments = None, [], None
        if state["moments"] is not None:
            self.moments = Moments.from_state(self.approximation, self.layers, state["moments"], self._defers)
            if self._watcher is not None:
                self._watcher.generic_diagonal = any(not layer.structured for layer in self.moments.space.layers)
