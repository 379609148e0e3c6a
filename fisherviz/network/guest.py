"""The model is a guest: what a pass may touch is put back afterwards, also after an exception."""

from __future__ import annotations

import ctypes
import hashlib
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fisherviz.network.belongings import Belongings
from fisherviz.support.modes import full_precision, keeping_modes

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


class RandomState:
    """The states of the global generators of torch (of all GPUs in use, too), numpy and Python, as they are now."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda = torch.cuda.get_rng_state_all() if in_use else []
        self.python = random.getstate()
        self.numpy_words, self.numpy = _numpy_state()

    def differs(self) -> bool:
        """Whether any of them stands elsewhere now."""
        now = RandomState()
        cpu = torch.equal(now.torch, self.torch) and all(map(torch.equal, now.cuda, self.cuda))
        if now.numpy_words is None or self.numpy_words is None:  # another generator than numpy's usual one
            return not cpu or now.python != self.python or repr(now.numpy) != repr(self.numpy)
        numpy = (now.numpy_words, now.numpy["has_gauss"]) == (self.numpy_words, self.numpy["has_gauss"])
        return not cpu or now.python != self.python or not numpy

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy["has_gauss"] or self.numpy_words is None or _numpy_words() != self.numpy_words:
            np.random.set_state(self.numpy)  # noqa: NPY002


def _numpy_words() -> bytes | None:
    """The memory of numpy's global generator, which tells in a microsecond whether anybody drew from it."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    mersenne = isinstance(generator, np.random.MT19937)
    return ctypes.string_at(generator.ctypes.state_address, _MERSENNE_BYTES) if mersenne else None


def _numpy_state() -> tuple[bytes | None, Any]:
    """That memory and the whole state, which takes numpy longer to write down than a small network to run."""
    words, seen = _numpy_words(), _numpy_seen[0]
    if words is None or words != seen[0] or seen[1]["has_gauss"]:
        _numpy_seen[0] = seen = (words, np.random.get_state(legacy=False))  # noqa: NPY002
    return seen


_MERSENNE_BYTES = 625 * 4
_numpy_seen: list[tuple[bytes | None, Any]] = [(None, None)]


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Put the global generators back afterwards, whatever draws from them meanwhile."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def undisturbing(source: Iterable[Any]) -> Iterator[Any]:
    """Iterate over somebody's data, which may draw at random, with the global generators left as they are.

    The data sees one stream of random numbers from start to end, the same one whenever the generators stand the same.
    """
    with keeping_random_state():
        iterator = iter(source)
        inner = RandomState()
    while True:
        with keeping_random_state():
            inner.restore()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            inner = RandomState()
        yield batch


@contextmanager
def as_guest(model: nn.Module, weights: bool = False, hooks: bool = False) -> Iterator[None]:
    """Run with gradients on; all that forwards may change, and the global random state, is restored afterwards.

    Hooks on gradients, a user's log or clipping, are for the user's training: they sleep meanwhile, since a Fisher is
    of the function that the model computes.

    Args:
        model: the model.
        weights: whether the model may rewrite weights in its forward, which costs a copy of them; which it rewrote is
            known in later visits.
        hooks: whether hooks on gradients act all the same: in a closure of the user's own.
    """
    with (
        lock_of(model), keeping_random_state(), keeping_modes(model), torch.inference_mode(False), torch.enable_grad(),
        nullcontext() if hooks else _without_gradient_hooks(model), _uncompiled(), _uncached(), full_precision(model),
    ):  # fmt: skip
        belongings = Belongings(model, weights)
        outer = _visits.__dict__.setdefault("belongings", weakref.WeakKeyDictionary())
        before = outer.get(model)
        outer[model] = belongings
        _visits.depth = getattr(_visits, "depth", 0) + 1
        try:
            yield
        finally:
            _visits.depth -= 1
            if before is None:
                del outer[model]
            else:
                outer[model] = before
            belongings.restore()


def _uncompiled() -> AbstractContextManager[Any]:
    """What torch.compile has compiled runs as it was written: its backward passes serve one vector, once."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def _uncached() -> Iterator[None]:
    """Outside torch's `parametrize.cached()`, which gives every forward the weight of the first, with its one graph."""
    opened, held = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled += opened
        parametrize._cache = held


def refresh(model: nn.Module) -> None:
    """Before a forward of a visit: the model is as it was found, whatever earlier ones have changed."""
    if (visits := getattr(_visits, "belongings", None)) is not None and (belongings := visits.get(model)) is not None:
        belongings.refresh()


@contextmanager
def _without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """The user's hooks on gradients of parameters and modules, away for a while."""
    modules = list(model.modules())
    parameters = (p for m in modules for _, p in m._parameters.items() if p is not None)
    held = [hooks for p in parameters if (hooks := p._backward_hooks)]
    held += [hooks for m in modules for hooks in (m._backward_hooks, m._backward_pre_hooks) if hooks]
    asleep = [(hooks, dict(hooks)) for hooks in held]
    for hooks, _ in asleep:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in asleep:
            hooks.update(before)


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
    """Numbers that change when a parameter or buffer changes, or when entries, units or tensors trade places."""
    with lock_of(model):  # a pass of another thread may have its own tensors in their places
        return fingerprint_of([*model.parameters(), *model.buffers()])


def fingerprint_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Numbers that change when any byte of the tensors does, whatever is exchanged, flipped, rolled or negated.

    Sums of rows of 64-bit words times fixed random odd numbers, modulo 2⁶⁴, exact in any order. Each word's high bits
    are mixed into its low ones first: a sign bit is half the modulus, so that two of them would cancel. What fills no
    row follows as one: networks have many small tensors.
    """
    marks, rests = list[int](), dict[torch.device, list[Tensor]]()
    with torch.no_grad():
        for t in (part for tensor in tensors for part in _plain(tensor.detach())):
            raw = t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            whole = len(raw) // _ROW_BYTES * _ROW_BYTES
            marks += [*t.shape, *_sums(raw[:whole])]
            rests.setdefault(raw.device, []).append(raw[whole:])
        for parts in rests.values():
            rest = torch.cat(parts)
            marks += _sums(nn.functional.pad(rest, (0, -len(rest) % _ROW_BYTES)))
    return tuple(marks)


def _plain(t: Tensor) -> list[Tensor]:
    """What a tensor of any layout holds, as dense tensors; one on the meta device holds nothing."""
    if t.is_meta:
        return [torch.tensor(t.shape, device="cpu")]
    if t.is_quantized:
        return [t.int_repr()]
    if t.layout == torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    return [t]


def digest(marks: tuple[int | float | str, ...]) -> str:
    """Short hexadecimal digest of a fingerprint."""
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _sums(raw: Tensor) -> list[int]:
    """Σ (w xor (w >>> 31)) m of each row of whole rows' bytes."""
    if not len(raw):
        return []
    if raw.storage_offset() % 8:
        raw = raw.clone()  # a part of a larger tensor, between two words
    words = raw.view(torch.int64).view(-1, _ROW)
    factors = _factors(words.device)
    if words.device.type != "cpu":
        return ((words ^ (words >> 31 & (2**33 - 1))) * factors).sum(1).tolist()
    # numpy multiplies 64-bit integers five times as fast as torch; pieces stay in the cache
    rows, m = words.numpy().view(np.uint64), factors.numpy().view(np.uint64)
    out, mixed = np.empty(len(rows), np.uint64), np.empty_like(rows[:_PIECE])
    for start in range(0, len(rows), _PIECE):
        piece = rows[start : start + _PIECE]
        part = np.right_shift(piece, 31, out=mixed[: len(piece)])
        np.bitwise_xor(part, piece, out=part)
        np.einsum("rc,c->r", part, m, out=out[start : start + _PIECE])
    return out.view(np.int64).tolist()


@cache
def _factors(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**62), 2**62, (_ROW,), generator=torch.Generator().manual_seed(0), device="cpu")
    return (drawn * 2 + 1).to(device)


_ROW = 1024
"""Words of 8 bytes that share a sum."""
_ROW_BYTES = 8 * _ROW
_PIECE = 64
"""Rows that are read at once."""
