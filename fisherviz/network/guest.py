"""The model is a guest: what a pass may touch is put back afterwards, also after an exception (DESIGN section 4)."""

from __future__ import annotations

import hashlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_visits = threading.local()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """One lock for each model: its hooks and modes serve one pass at a time."""
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


def visiting() -> bool:
    """Whether a pass of our own is running, which no optimizer takes for training."""
    return getattr(_visits, "depth", 0) > 0


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves out of its graphs; with fullgraph=True its error gives the reason.

    Made when a hook is made, not when its class is: as long as nobody compiles (torch's optimizers count as such),
    torch's compiler, whose import takes as long as torch's own, need not be loaded.
    """
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    reason = "fisherviz watches this model; compile it without fullgraph=True, or detach the probe or optimizer"
    try:
        return torch.compiler.disable(function, reason=reason)
    except TypeError:  # torch before 2.7 takes no reason
        return torch.compiler.disable(function)


@contextmanager
def as_guest(model: nn.Module) -> Iterator[None]:
    """Run with gradients on; restore buffers, training modes and the global random state afterwards."""
    with lock_of(model), _restored(model):
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    buffers = [
        (module, name, b, b._version, b.clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        _visits.depth = getattr(_visits, "depth", 0) + 1
        try:
            yield
        finally:
            _visits.depth -= 1
            with torch.no_grad():
                for owner, name, buffer, version, saved in buffers:
                    owner._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(saved)
            for module, mode in modes:
                module.training = mode


def check_modes(model: nn.Module) -> None:
    """Refuse modules whose outputs couple examples or are random: training BatchNorm, active Dropout."""
    for name, module in model.named_modules():
        where = f"module {name!r} ({type(module).__name__})"
        normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if normalises and (module.training or module.running_mean is None):
            raise ValueError(
                f"{where} normalises with the statistics of the batch, which couples the examples: no Fisher of "
                "single examples exists; call model.eval() first (and use track_running_stats=True)."
            )
        active = isinstance(module, nn.RReLU) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        active = active or (isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0)
        if active and module.training:
            raise ValueError(
                f"{where} draws at random in training mode (active Dropout), so that every pass "
                "sees another network; call model.eval() first."
            )


def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """Numbers that change when a parameter or buffer changes."""
    with torch.no_grad():
        sums = [_sums(t).cpu() for t in [*model.parameters(), *model.buffers()]]
    return tuple(torch.cat(sums).tolist()) if sums else ()


def digest(marks: tuple[int, ...]) -> str:
    """Short hexadecimal digest of a fingerprint."""
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _sums(t: Tensor) -> Tensor:
    """Exact sums of a tensor's bits in residue classes: any single change alters one, exchanged rows nearly all."""
    flat = t.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat.new_zeros(0, dtype=torch.uint8)
    words = raw[: raw.numel() // 8 * 8].view(torch.int64)  # sums wrap around, which loses nothing
    rest = raw[words.numel() * 8 :].to(torch.int64)
    rows = words[: words.numel() // _CLASSES * _CLASSES].view(-1, _CLASSES)
    return torch.cat([rows.sum(0), words[rows.numel() :], rest])


_CLASSES = 251
"""A prime, so that rows of usual lengths fall into different classes; wide enough to be summed at memory speed."""
