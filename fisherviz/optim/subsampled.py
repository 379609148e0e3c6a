"""Natural gradients with the exact Fisher of a sub-sample, by Woodbury (Benzing 2021, appendix E).

(λI + UUᵀ)⁻¹ v = (v − U (λI + UᵀU)⁻¹ Uᵀ v) / λ with U's columns the sampled gradients of a mini-batch that is, by
default, independent of the gradient's; everything comes from inputs and pseudo-gradients (`statistics.examples`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.network.batches import Arguments, Batches, move
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood, resolve
from fisherviz.network.vectors import KINDS
from fisherviz.operators.damping import Damping, Tikhonov, as_damping
from fisherviz.optim.directions import Directions, Step
from fisherviz.optim.gradients import Moves, gradient_matrix, layer_gradients, matrix_of, split_matrix, split_rows
from fisherviz.optim.optimizer import NaturalGradient
from fisherviz.optim.options import DIRECTION, require_known
from fisherviz.optim.packing import pack, unpack
from fisherviz.optim.rules import Momentum, StepRule
from fisherviz.statistics.examples import Examples, Woodbury
from fisherviz.statistics.gradients import columns_product, rows_product
from fisherviz.support import choices, timing

STRUCTURES = ("full", "layer")


class SubsampledFisher(Directions):
    """(F + λI)⁻¹ with F of a mini-batch, all layers jointly or each by itself.

    Args:
        structure: "full" or "layer".
        data: where the mini-batches come from; None: the previous step's inputs; "same": the step's own.
        likelihood: whose targets they may have.
    """

    inputs = True
    captures = False
    reads_rows = True

    def __init__(self, structure: str, data: Any, likelihood: Likelihood) -> None:
        self.structure, self._same = structure, isinstance(data, str)
        self._data = None if data is None or self._same else Batches(data, repeats=False, likelihood=likelihood)
        self._batches: Iterator[Any] | None = None
        self._drawn = 0
        self._previous: list[Arguments] | None = None
        self.fisher: dict[str, AnyCapture] = {}
        self._factors: dict[tuple[Any, ...], list[tuple[list[Layer], Woodbury]]] = {}

    def of(self, step: Step) -> Moves:
        """Natural gradients of all layers with a gradient."""
        inputs = step.inputs
        if not step.any_inputs:
            return {}
        if step.due:
            own = inputs if self._same or self._previous is None else self._previous
            batches = own if self._data is None else [step.watcher.weighed(*self._draw())]
            self.estimate(step, batches)
        if any(layer.name not in self.fisher for layer in step.active):
            self.estimate(step, inputs)  # the Fisher's mini-batch did not run a layer that the gradient's did
        if self._data is None and not self._same and step.k % step.T == 0:
            self._previous = inputs  # the next factorisation comes with the next step
        if absent := [layer.name for layer in step.active if layer.name not in self.fisher]:
            raise RuntimeError(
                f"layer {absent[0]!r} has a gradient, but no forward on the step's inputs ran it, so that its Fisher "
                "is not known; pass fisher_data= that runs it, or put it in a group with approximation='none'."
            )
        return self.woodbury(step)

    def _draw(self) -> tuple[Any, Tensor | None]:
        """The next batch of the data, inputs and targets."""
        assert self._data is not None
        for _ in range(2):
            if self._batches is None:
                self._batches, self._drawn = iter(self._data), 0
            found = next(self._batches, None)
            if found is not None:
                self._drawn += 1
                return found
            self._batches = None
        raise ValueError("fisher_data has no batches.")

    @timing.part("statistics")
    def estimate(self, step: Step, batches: Sequence[Arguments]) -> None:
        """The Fisher of a mini-batch at the present weights, of all processes' examples."""
        parts = [step.watcher.captures_of(batch, step.source) for batch in batches]
        step.moments.forget()
        for captures, examples in parts:
            step.moments.window.append(captures)
            step.moments.examples += examples
        step.moments.gather(captures=True)
        found = {layer.name: step.moments.capture(layer.name) for layer in step.moments.space.layers}
        self.fisher = {name: capture for name, capture in found.items() if capture is not None}
        self._factors = {}

    def _blocks(self, layers: list[Layer], damping: float) -> list[tuple[list[Layer], Woodbury]]:
        """The damped Fisher factorised, of all layers together or of each."""
        key = (damping, *(layer.name for layer in layers))
        if key not in self._factors:
            together = [layers] if self.structure == "full" else [[layer] for layer in layers]
            self._factors[key] = []
            for members in together:
                captures = [self.fisher[layer.name] for layer in members]
                for layer, capture in zip(members, captures, strict=True):
                    if capture.examples != captures[0].examples:
                        raise RuntimeError(
                            f"layers {members[0].name!r} and {layer.name!r} were seen on {captures[0].examples} and on "
                            f"{capture.examples} examples, since one was frozen or thawed between the passes of this "
                            "step, and structure='full' couples them; freeze before zero_grad(), or take "
                            "structure='layer'."
                        )
                examples = Examples(captures, 1 / captures[0].examples)
                self._factors[key].append((members, Woodbury(examples, damping)))
        return self._factors[key]

    @timing.part("inversion")
    def woodbury(self, step: Step) -> Moves:
        """(F + λI)⁻¹ times the gradients."""
        values = {layer.name: _value(step.damping(layer)) for layer in step.active}
        dampings = set(values.values())
        if len(dampings) > 1 and self.structure == "full":
            raise ValueError("structure='full' couples layers, which then need one damping; the groups give several.")
        out: Moves = {}
        for damping in sorted(dampings):
            mine = [layer for layer in step.active if values[layer.name] == damping]
            for members, solver in self._blocks(mine, damping):
                out |= (self._solved if solver.widened else self._once)(step, members, solver)
        return out

    def _once(self, step: Step, layers: list[Layer], solver: Woodbury) -> Moves:
        """(v − U (λN I + UᵀU)⁻¹ Uᵀ v) / λ, where v or its product with U is never written down without need."""
        damping = solver.damping
        parts = []
        for layer in layers:
            capture = self.fisher[layer.name]
            rows = step.rows(layer, partial(_outer_pays, capture))
            parts.append(
                _rows(capture, gradient_matrix(layer, step.decays)) if rows is None else _rows_of_outer(capture, *rows)
            )
        w = solver.factor.solve(torch.stack(parts).sum(0))
        out: Moves = {}
        for layer in layers:
            capture, gradients = self.fisher[layer.name], layer_gradients(layer, step.decays)
            if isinstance(capture, Capture) and capture.factored:
                combined = (capture.g[:, :, 0] * (w.reshape(capture.vectors, -1, 1) / -damping)).sum(0)
                out |= split_rows(layer, capture.a[:, 0], combined, gradients, 1 / damping)
            else:
                v = matrix_of(layer, gradients).reshape(-1, 1)
                out |= split_matrix(layer, (v - columns_product(capture, w)).div_(damping))
        return out

    def _solved(self, step: Step, layers: list[Layer], solver: Woodbury) -> Moves:
        """The same in float64, where the difference loses too many digits of float32."""
        gradients = [gradient_matrix(layer, step.decays).reshape(-1, 1) for layer in layers]
        out: Moves = {}
        for layer, direction in zip(layers, solver.solve(gradients), strict=True):
            out |= split_matrix(layer, direction)
        return out

    # ---- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """The Fisher's captures, and where its batches come from next."""
        return {
            "structure": self.structure,
            "fisher": pack(self.fisher),
            "drawn": self._drawn,
            "previous": [[list(given.args), dict(given.kwargs), given.weight] for given in self._previous or ()],
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what `state_dict` gave."""
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.fisher, self._factors = unpack(state["fisher"], device), {}
        self._previous = [
            move(Arguments(tuple(args), dict(kwargs), *weight), device) for args, kwargs, *weight in state["previous"]
        ] or None
        self._batches, self._drawn = None, 0
        if self._data is not None:
            for _ in range(state["drawn"]):
                self._draw()


class SubsampledKeywords(TypedDict, total=False):
    """Rare options of `SubsampledNaturalGradient`."""

    samples: int
    kl_clip: float


class SubsampledNaturalGradient(NaturalGradient):
    """The exact natural gradient of a mini-batch's Fisher (Benzing 2021, section 2 and appendix E).

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        structure: "full" (all layers jointly) or "layer" (block-diagonal).
        fisher_data: where the Fisher's mini-batches come from: a re-iterable of batches, best a loader that
            shuffles (after `load_state_dict` in an order of its own, where one that does not goes on in place);
            None: the previous step's inputs at the current weights; "same": the gradient's own inputs.
        params: parameter groups, None for all.
        lr: learning rate.
        damping: λ.
        momentum: of the preconditioned gradient.
        weight_decay: ℓ₂ coefficient.
        T: steps between mini-batches for the Fisher.
        kind: "mc" or "exact".
        samples: labels per example for kind "mc".
        kl_clip: κ, as for `NaturalGradient`; of the damped Fisher that the mini-batch gives.
        output: picks the output tensor from what the model returns.

    Raises:
        ValueError: an option is unknown.
        TypeError: `fisher_data` is a one-shot iterator.
    """

    Options: ClassVar[type] = SubsampledKeywords
    PAPER: ClassVar[Mapping[str, Any]] = {"lr": 1e-2, "damping": 1e-2, "momentum": 0.0, "kl_clip": math.inf}

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        structure: str = "full",
        fisher_data: Any = None,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        damping: float | Damping = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        T: int = 1,
        kind: str = "mc",
        output: Callable[[Any], Tensor] | None = None,
        **options: Unpack[SubsampledKeywords],
    ) -> None:
        require_known(type(self), options)
        options.setdefault("kl_clip", DIRECTION["kl_clip"])
        choices.one_of("structure", structure, STRUCTURES)
        choices.one_of("kind", kind, KINDS)
        if kind == "empirical":
            raise ValueError("the Fisher's mini-batch has no labels; use kind='mc' or 'exact', or TENGraD.")
        if isinstance(fisher_data, str) and fisher_data != "same":
            raise ValueError(f"fisher_data must be a re-iterable of batches, None or 'same', got {fisher_data!r}.")
        self._fisher = SubsampledFisher(structure, fisher_data, resolve(likelihood))
        super().__init__(
            model, likelihood, "layer", params=params, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, T=T, decay=0.0, kind=kind, output=output, dense_parameters=0,
            **options,
        )  # fmt: skip

    def _compose(self, options: Any, defaults: dict[str, Any]) -> tuple[Directions, StepRule[Any]]:
        return self._fisher, Momentum()


def _value(damping: float | Damping) -> float:
    rule = as_damping(damping)
    if not isinstance(rule, Tikhonov) or rule.value <= 0:
        raise ValueError("Woodbury needs a positive Tikhonov damping: the sub-sampled Fisher is singular without.")
    return rule.value


def _rows(capture: AnyCapture, V: Tensor) -> Tensor:
    """Uᵀ v, (K N, 1), from the layer's matrix V (dg, da)."""
    if isinstance(capture, Capture) and capture.factored:
        return (capture.g[:, :, 0] * (capture.a[:, 0] @ V.mT)).sum(2).reshape(-1, 1)
    return rows_product(capture, V.reshape(-1, 1))


def _outer_pays(capture: AnyCapture, rows: int) -> bool:
    """Whether Uᵀ v costs less from the rows behind v than from v itself."""
    if not isinstance(capture, Capture) or not capture.factored:
        return False
    da, dg = capture.a.shape[-1], capture.g.shape[-1]
    return rows * (da + capture.vectors * dg) <= da * dg


def _rows_of_outer(capture: AnyCapture, a: Tensor, g: Tensor) -> Tensor:
    """Uᵀ v for v = gᵀ a from Gram matrices, (K N, 1), where `_outer_pays`."""
    assert isinstance(capture, Capture)
    inputs, outputs = capture.a[:, 0] @ a.mT, capture.g[:, :, 0].flatten(0, 1) @ g.mT
    products = outputs.unflatten(0, (capture.vectors, -1)).mul_(inputs)
    return products.sum(2).reshape(-1, 1)
