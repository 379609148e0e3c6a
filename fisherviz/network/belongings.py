"""What a forward pass may change of the model it belongs to: buffers, attributes, generators, sometimes its weights.

Kept when a visit begins, put back when it ends, and before every forward in between: each then sees the model as it
was found, whatever an earlier one has left there.
"""

from __future__ import annotations

import collections
import random
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, set, collections.deque)
_OWN = frozenset(vars(nn.Module()))
_rewriting: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


class Belongings:
    """All that a model holds as it is now, but the values of its weights; these too where its forward rewrites them.

    Args:
        model: the model.
        weights: keep the values of all weights, and note for later visits which of them the forward rewrites.
    """

    def __init__(self, model: nn.Module, weights: bool = False) -> None:
        self.model, self.weights = model, weights
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        # torch's own modules add neither parameters, buffers nor attributes: what is empty there stays so
        self.slots: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (held, dict(held)) for m in modules for held in (m._parameters, m._buffers) if held or not _torchs(type(m))
        ]
        buffers = {b: None for m in model.modules() for b in m._buffers.values() if b is not None}
        self.buffers = [(b, b._version, b.detach().clone()) for b in buffers]
        kept = _rewriting.get(model, frozenset()) | {
            f"{place}.{name}" if place else name
            for place, m in model.named_modules()
            if vars(m).get("max_norm") is not None  # an embedding then scales its own rows whenever it runs
            for name in m._parameters
        }
        self.parameters = [
            (name, p, p.data, p.detach().clone())
            for name, p in (model.named_parameters() if weights or kept else ())
            if weights or name in kept
        ]
        found = [(m, _attributes(m)) for m in modules]
        self.attributes = [(m, held) for m, held in found if held or not _torchs(type(m))]
        contents = [value for _, held in self.attributes for value in held.values() if isinstance(value, CONTAINERS)]
        self.contents = [(value, value.copy()) for value in contents]
        self.generators = [
            (value, _generator_state(value))
            for _, held in self.attributes
            for value in held.values()
            if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)
        ]

    def refresh(self) -> None:
        """Before a forward: what an earlier one changed is as it was, in new tensors: graphs hold the old ones."""
        self._hand_back()
        fresh = {b: saved.clone() for b, version, saved in self.buffers if not _same(b, version, saved)}
        if fresh:
            for held, _ in self.slots:
                for name, tensor in held.items():
                    if tensor in fresh:
                        held[name] = fresh[tensor]

    def restore(self) -> None:
        """At the end: everything is what and as it was."""
        self._hand_back()
        with torch.no_grad():
            for buffer, version, saved in self.buffers:
                if not _same(buffer, version, saved):
                    buffer.copy_(saved)
            rewritten = []
            for name, p, data, saved in self.parameters:
                moved = p.data_ptr() != data.data_ptr() or p.dtype != data.dtype
                if moved:
                    p.data = data
                if moved or not _same_bits(p, saved):
                    rewritten.append(name)
                    if not _same_bits(p, saved):
                        p.copy_(saved)
        for generator, state in self.generators:
            _set_generator_state(generator, state)
        if self.weights:
            _rewriting[self.model] = _rewriting.get(self.model, frozenset()) | frozenset(rewritten)

    def _hand_back(self) -> None:
        """Slots, attributes and the contents of lists and dictionaries."""
        for held, before in self.slots:
            if not _same_items(held, before):
                held.clear()
                held.update(before)
        for module, before in self.attributes:
            now = _attributes(module)
            if not _same_items(now, before):
                for key in now.keys() - before.keys():
                    del module.__dict__[key]
                module.__dict__.update(before)
        for value, copied in self.contents:
            if not _same_contents(value, copied):
                value.clear()
                (value.extend if isinstance(value, list | collections.deque) else value.update)(copied)


def _torchs(kind: type) -> bool:
    """Whether a class is of torch itself."""
    return kind.__module__.partition(".")[0] == "torch"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes; of torch's modules tensors alone (older weight norms leave their product there)."""
    torchs = _torchs(type(module))
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _OWN and (isinstance(value, Tensor) or not torchs)
    }


def _same_items(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[key] is value for key, value in before.items())


def _same_contents(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return _same_items(now, before)
    pairs: Iterable[tuple[Any, Any]] = zip(now, before, strict=True)
    return now == before if isinstance(now, set) else all(a is b for a, b in pairs)


def _same(buffer: Tensor, version: int, saved: Tensor) -> bool:
    """Whether a buffer holds what it held; what has no plain values is told by torch's count of changes."""
    plain = buffer.layout == torch.strided and not (buffer.is_meta or buffer.is_quantized)
    return _same_bits(buffer, saved) if plain else buffer._version == version


def _same_bits(p: Tensor, saved: Tensor) -> bool:
    return torch.equal(p, saved) or bool(((p == saved) | (p.isnan() & saved.isnan())).all())


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
