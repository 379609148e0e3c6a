"""The linear maps inside nn.MultiheadAttention, which torch computes as functions: no forward hook sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fisherviz.network.guest import eager
from fisherviz.network.layers import Layer


class Inside(TorchFunctionMode):
    """Shows the linear maps of attention that is computed under it.

    Args:
        layers: by their weights.
        show: called with a layer, its input and output, (T, N', d) or (T N', d), and the attention's own batch N', of
            examples or of windows of them.
    """

    def __init__(self, layers: Mapping[Tensor, Layer], show: Callable[[Layer, Tensor, Tensor, int], None]) -> None:
        super().__init__()
        self.layers, self.show = layers, show
        self._attend = eager(_attend)  # compiled code would not have the other functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            return self._attend(self.layers, self.show, args, kwargs or {})
        return func(*args, **kwargs or {})


def _attend(layers: Mapping[Tensor, Layer], show: Callable[..., None], args: Any, kwargs: Any) -> Any:
    """Torch's own attention with linear maps that show themselves; queries are (T, N', E), or (T, E)."""
    batch = args[0].shape[1] if args[0].dim() == 3 else 1

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = F.linear(x, weight, bias)
        if weight in layers:
            show(layers[weight], x, z, batch)
        return z

    attend = _rebound(
        F.multi_head_attention_forward,
        linear=linear,
        _in_projection_packed=_rebound(F._in_projection_packed, linear=linear),  # type: ignore[attr-defined]
        # a mode further out (a default device) would call the function as it is again
        has_torch_function=lambda tensors: False,
    )
    return attend(*args, **kwargs)


def _rebound(function: Any, **names: Callable[..., Any]) -> Callable[..., Any]:
    """The same code, in which some of the module's names mean other functions: no other thread sees them."""
    made = FunctionType(function.__code__, function.__globals__ | names, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
