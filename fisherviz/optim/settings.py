"""What an optimizer's numbers must be, and which saved states it takes.

Checked before anything is changed: a refused option or state leaves the optimizer as it was. Others rely on
`check_state` having seen every key and every shape that loading reads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fisherviz.operators.damping import FactoredTikhonov, Tikhonov, as_damping
from fisherviz.support import choices

FOREIGN = "this is no state of a fisherviz optimizer; load one that its state_dict() gave."

UNCHANGED = "load one that state_dict() of this class gave, unchanged."
DAMAGED = "the state under 'fisherviz' cannot be read ({!r}); " + UNCHANGED
ACCUMULATED = (
    "the step averages {} passes, and without loss_scale each loss is taken for the mean over its own pass's "
    "examples; where losses were divided for gradient accumulation, give the optimizer loss_scale=c, each loss "
    "being c times the sum of its examples' nll."
)

LATE = (
    "layers {} turn out to have no structure ({}), which earlier passes of the same step did not show; let the first "
    "pass be such a batch, of two examples or more, or put them in a group with approximation='none'."
)

NOT_FINITE_GRADIENT = (
    "the gradient {} is NaN or infinite at step {}, and nothing has moved; look at the loss and the targets, leave "
    "such a batch out (zero_grad() and no step), and where training has diverged, lower lr or raise damping."
)
ANEW = (
    "at step {} layers {} turn out to have no structure ({}), and the averages of all layers begin anew; show such a "
    "batch in one of the first four steps, or put these layers in a group with approximation='none'."
)
NOT_FINITE_DIRECTION = (
    "the direction of {!r} is NaN or infinite at step {}, and no weight has moved; raise damping: the gradient over it "
    "must be a number in {}."
)
UNSEEN = (
    "layer {!r} has a gradient but no statistics since the last step: no forward of the model in training mode ran it "
    "with the optimizer's own parameters and was backpropagated to this gradient. Call model.train() and the model "
    "itself (not a copy, nor by functional_call with other weights), compute the loss from the tensor that output= "
    "picks as the model returned it (not inside forward: call Hugging Face's models without labels), create the "
    "optimizer before a compiled model first runs, pass checkpoint use_reentrant=False, or put the layer in a group "
    "with approximation='none'."
)
MIXED = (
    "a part of the gradient of the layers {} comes from no pass that the Fisher is of: from a forward in evaluation "
    "mode or with other weights, from a layer called by itself, from a loss computed inside forward, from a backward "
    "that failed, from a penalty with a backward of its own, or, where scores are read, from derivatives in the loss "
    "(create_graph=True), and is preconditioned by the other passes' Fisher; add "
    "penalties to the loss, and let the model's own forwards in training mode give the rest."
)
SILENT = (
    "the loss's gradient is zero at the outputs of {} of {} examples, of which {} cannot tell whether the loss leaves "
    "them out or fits them: they count in the Fisher; run the model on the examples that the loss is of."
)
KEPT = (
    "the gradients of the layers {} hold those of the last step, of whose passes the Fisher no longer is; call "
    "zero_grad() after each step."
)

LOSS = "step's closure must return its loss, one number, which others are compared with; it returned {}."
CONVERTED = (
    "the model's parameters are {} now, and the optimizer's averages are of {}; convert the model before the optimizer "
    "is created, or create a new one."
)

SCALED = (
    "kind 'empirical' reads its scores from the backward of the loss, which torch.amp.GradScaler has multiplied by a "
    "scale of its own; use bfloat16 autocast, which needs no scaler, or kind='mc' where the optimizer has it."
)
SCALED_POSITIONS = (
    "the quadratic model reads from the backward of the loss what it is a mean over, and torch.amp.GradScaler has "
    "multiplied it by a scale of its own; use bfloat16 autocast, which needs no scaler, or rescale=False."
)
SCALED_CLOSURE = (
    "torch.amp.GradScaler cannot be used with an optimizer that evaluates a closure; use bfloat16 autocast, which "
    "needs no scaler."
)


def value_of(loss: Any) -> float:
    """The number that a closure has returned.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(loss, str | bytes):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(loss.detach() if isinstance(loss, Tensor) else loss)
    raise TypeError(LOSS.format(f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__))


def check_output(value: Any) -> None:
    """Refuse what cannot pick an output."""
    if value is not None and not callable(value):
        raise TypeError(f"output must be a function of what the model returns, or None, got {value!r}.")


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse options of a parameter group, or defaults, that are out of range."""
    for name, high in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
        choices.number(name, group[name], 0.0, high)
    check_damping(group["damping"])
    if group["approximation"] not in (None, "none"):
        raise ValueError(f"a group's approximation must be 'none' or left out, got {group['approximation']!r}.")


def group_rows(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The settings of parameter groups as text, by name."""
    rows = []
    for group in groups:
        rule = as_damping(group["damping"])
        row = {name: f"{float(group[name]):.3g}" for name in ("lr", "momentum", "weight_decay")}
        rows.append(
            {"parameters": f"{sum(p.numel() for p in group['params']):,}", "damping": str(rule or "none")}
            | row
            | {"preconditioned": "no" if group["approximation"] == "none" else "yes"}
        )
    return rows


def as_groups(params: Any) -> list[Any]:
    """Parameters, or groups of them, as a list; what they are is for `torch.optim` to check."""
    if isinstance(params, Tensor | str | Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"params must be parameters or a list of parameter groups, got {type(params).__name__}.")
    return list(params)


def check_loss_scale(value: Any) -> None:
    """Refuse what is neither None nor a positive number."""
    if value is None:
        return
    if not choices.is_number(value):
        raise TypeError(f"loss_scale must be a positive number or None, got {value!r}.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"loss_scale must be positive and finite, got {value!r}.")


def check_damping(value: Any) -> None:
    """Refuse what is no damping; None would silently be none at all."""
    if value is None:
        raise TypeError("damping must be a number, a Tikhonov or a FactoredTikhonov, got None; 0.0 means none at all.")
    as_damping(value)


def plain_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups with dampings as containers of numbers, all that `torch.load` takes unless told otherwise."""
    return [
        {k: vars(v).copy() if isinstance(v, Tikhonov | FactoredTikhonov) else v for k, v in group.items()}
        for group in groups
    ]


def whole_groups(groups: Any) -> list[dict[str, Any]]:
    """What `plain_groups` was given.

    Raises:
        ValueError: a group lacks an option, or has one that is out of range.
    """
    try:
        whole = [group | {"damping": _whole(group["damping"])} for group in groups]
        for group in whole:
            check_group(group)
            list(group["params"])
        return whole
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the state's param_groups cannot be read ({error!r}); {UNCHANGED}") from error


def _whole(damping: Any) -> Any:
    if not isinstance(damping, Mapping):
        return damping
    return FactoredTikhonov(**damping) if "gamma" in damping else Tikhonov(**damping)


LATER = ("region", "precision", "groups")
"""What states that were saved before lack."""


def group_names(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of each group's parameters in their order; "" of those that are not the model's."""
    names = {p: name for name, p in model.named_parameters()}
    return [[names.get(p, "") for p in group["params"]] for group in groups]


def _unlike(key: str, saved: Any, own: Any) -> str:
    """How the types or the groups of a state differ from the optimizer's."""
    if key == "precision":
        return f"the state is one of {saved} parameters, and here they are {own}; load it into a model of that type."
    place = next((k for k, (there, here) in enumerate(zip(saved, own, strict=False)) if there != here), None)
    if place is None:
        return f"the state has {len(saved)} parameter groups, and here are {len(own)}; give params= as it was then."
    there, here = (", ".join(map(repr, part[place][:4])) or "nothing" for part in (saved, own))
    return (
        f"group {place} of the state begins with {there}, and here with {here}; give params= in the order of then, by "
        "which torch tells the momentum and the settings of each parameter."
    )


def check_state(state: Any, own: Mapping[str, Any]) -> None:
    """Refuse a state that another optimizer, network or method gave.

    Args:
        state: what was passed to `load_state_dict`.
        own: what this optimizer would save now under "fisherviz".

    Raises:
        ValueError: it is none of a fisherviz optimizer, of another method or network, or incomplete.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("fisherviz"), Mapping):
        raise ValueError(FOREIGN)
    saved = state["fisherviz"]
    if lacking := [key for key in ("state", "param_groups") if key not in state]:
        raise ValueError(f"the state lacks {lacking[0]!r}; load all of what state_dict() gave.")
    kept = state["state"]
    if not isinstance(kept, Mapping) or not all(isinstance(each, Mapping) for each in kept.values()):
        raise ValueError(f"the state's 'state' is no mapping of what is kept by parameter; {UNCHANGED}")
    if any("momentum_buffer" in each and not isinstance(each["momentum_buffer"], Tensor) for each in kept.values()):
        raise ValueError(f"the state's momentum of a parameter is no tensor; {UNCHANGED}")
    for key in ("method", "structure"):
        if key in saved and key in own and saved[key] != own[key]:
            raise ValueError(f"the state is one of {key} {saved[key]!r}, this optimizer's is {own[key]!r}.")
    for key, default in (("precision", ""), ("groups", [])):  # states saved before have none
        if saved.get(key, default) not in (default, own[key]):
            raise ValueError(_unlike(key, saved[key], own[key]))
    if "moments" in saved and ("adaptive" in saved) != ("adaptive" in own):
        raise ValueError("the state is that of an optimizer with another rescale=; create this one as it was then.")
    if lacking := [key for key in own if key not in saved and key not in LATER]:
        raise ValueError(f"the state under 'fisherviz' lacks {lacking[0]!r}; load one of the same optimizer's class.")
    for name in {**own["shapes"], **saved["shapes"]}:
        here, there = own["shapes"].get(name), saved["shapes"].get(name)
        if here != there:
            raise ValueError(
                f"the state is one of another network: parameter {name!r} has shape {there} there and {here} here."
            )
