"""What a forward pass may change of the model it belongs to: buffers, attributes, generators, sometimes its weights.

Kept when a visit begins, put back when it ends, and before every forward in between: each then sees the model as it
was found, whatever an earlier one has left there.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fisherviz.network.contents import Contents
from fisherviz.network.items import ATOMS, CALM, Items
from fisherviz.network.values import same_bits
from fisherviz.support.warning import warn

COPIED = 2**22
"""Bytes of weights that are copied in every visit: a forward may rewrite them for some examples only."""
_OWN = frozenset(vars(nn.Module()))
_rewriting: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


class Belongings:
    """All that a model holds as it is now; of many weights the values only where its forward rewrites them.

    Buffers have all their values put back, other attributes what `Contents` says.

    Args:
        model: the model.
        weights: keep the values of all weights and large attributes, and note for later visits which of them the
            forward rewrites.
    """

    def __init__(self, model: nn.Module, weights: bool = False) -> None:
        self.model, self.weights = model, weights
        named = list(model.named_modules())
        modules = [m for _, m in named if not isinstance(m, torch.jit.ScriptModule)]
        # torch's own modules add neither parameters nor buffers: what is empty there stays so
        self.slots = [
            Items(held) for m in modules for held in (m._parameters, m._buffers) if held or not _torchs(type(m))
        ]
        kept = _rewriting.get(model, frozenset()) | {
            f"{place}.{name}" if place else name
            for place, m in named
            if m.__dict__.get("max_norm") is not None  # an embedding then scales its own rows whenever it runs
            for name in m._parameters
        }
        here = list(model.named_parameters())
        size = _bytes(p for _, p in here)
        every = weights or size <= COPIED
        self.parameters = [(name, p, p.data, p.detach().clone()) for name, p in here if every or name in kept]
        told = not every and size < math.inf
        rest = [(name, p) for name, p in here if name not in kept and not p.is_inference()] if told else []
        self.versions = [(name, p, p._version) for name, p in rest]
        self.attributes = [_Own(m) for m in modules]
        self.contents = Contents(large=weights)
        for _, m in named:
            for key, buffer in m._buffers.items() if m._buffers else ():
                if buffer is not None:
                    self.contents.look_at_buffer(m._buffers, key, buffer)
        for own in self.attributes:
            for key in own.to_look_at:
                self.contents.look(own.held, key)

    def refresh(self) -> None:
        """Before a forward: what an earlier one changed is as it was, in new tensors: graphs hold the old ones."""
        self._hand_back()
        self.contents.refresh()

    def restore(self) -> None:
        """At the end: everything is what and as it was."""
        self._hand_back()
        self.contents.restore()
        rewritten = []
        with torch.no_grad():
            for name, p, data, saved in self.parameters:
                moved = p.data_ptr() != data.data_ptr() or p.dtype != data.dtype
                if moved:
                    p.data = data
                if moved or not same_bits(p, saved):
                    rewritten.append(name)
                    if not same_bits(p, saved):
                        p.copy_(saved)
        lost = [name for name, p, version in self.versions if p._version != version]
        if lost:
            warn(
                f"a forward rewrote the weight {lost[0]!r} for some examples only, before it was known to: its values "
                "are those after the passes; rewrite a copy in the forward."
            )
        if self.weights or rewritten or lost:
            _rewriting[self.model] = _rewriting.get(self.model, frozenset()) | {*rewritten, *lost}

    def _hand_back(self) -> None:
        """Slots, attributes, and what is inside these."""
        for slots in self.slots:
            slots.put_back()
        for own in self.attributes:
            own.put_back()
        self.contents.hand_back()


def _bytes(parameters: Iterable[nn.Parameter]) -> float:
    """Of parameters that have values of their own here; infinite where one has none."""
    plain = [p for p in parameters if p.layout == torch.strided]
    odd = any(p.is_meta or isinstance(p, UninitializedParameter) or type(p.data) is not Tensor for p in plain)
    return math.inf if odd else sum(p.nbytes for p in plain)


class _Own:
    """A module's own attributes; of torch's machinery (not of its layers) tensors alone, since it works with others."""

    __slots__ = ("before", "held", "last", "machinery", "to_look_at")

    def __init__(self, module: nn.Module) -> None:
        self.held, kind = module.__dict__, type(module)
        self.machinery = _machinery(kind)
        self.before, self.last = self.held.copy(), next(reversed(self.held))
        calm = CALM if _torchs(kind) else ATOMS  # torch's layers hold nothing in tuples
        held = [key for key, value in self.before.items() if type(value) not in calm and key not in _OWN]
        self.to_look_at = [key for key in held if self._is_own(key, self.before[key])] if self.machinery else held

    def _is_own(self, key: str, value: Any) -> bool:
        return key not in _OWN and (not self.machinery or isinstance(value, Tensor))

    def put_back(self) -> None:
        """They are those that were there."""
        held, before = self.held, self.before
        same = len(held) == len(before) and next(reversed(held)) == self.last
        if same and all(map(operator.is_, held.values(), before.values())):
            return
        for key in [key for key, value in held.items() if key not in before and self._is_own(key, value)]:
            del held[key]
        held.update({key: value for key, value in before.items() if self._is_own(key, value)})


def _torchs(kind: type) -> bool:
    """Whether a class is of torch itself."""
    return kind.__module__.partition(".")[0] == "torch"


def _machinery(kind: type) -> bool:
    """Whether a class of torch is no layer but runs one: in several processes, compiled."""
    return _torchs(kind) and not kind.__module__.startswith(("torch.nn.modules.", "torch.nn.utils.", "torch.ao.nn."))
