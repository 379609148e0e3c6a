"""The model is a guest: what a pass may touch is put back afterwards, also after an exception (DESIGN section 4)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


_visits = threading.local()


def visiting() -> bool:
    """Whether a pass of our own is running, which no optimizer takes for training."""
    return getattr(_visits, "depth", 0) > 0


@contextmanager
def as_guest(model: nn.Module) -> Iterator[None]:
    """Run with gradients on; restore buffers, training modes and the global random state afterwards."""
    buffers = [(b, b._version, b.clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        _visits.depth = getattr(_visits, "depth", 0) + 1
        try:
            yield
        finally:
            _visits.depth -= 1
            with torch.no_grad():
                for buffer, version, saved in buffers:
                    if buffer._version != version:
                        buffer.copy_(saved)
            for module, mode in modes:
                module.training = mode


def check_modes(model: nn.Module) -> None:
    """Refuse modules whose outputs couple examples or are random: training BatchNorm, active Dropout."""
    for name, module in model.named_modules():
        where = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or module.running_mean is None:
                raise ValueError(
                    f"{where} normalises with the statistics of the batch, which couples the examples: no Fisher of single "
                    "examples exists; call model.eval() first (and use track_running_stats=True)."
                )
        active = isinstance(module, nn.RReLU) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        active = active or (isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0)
        if active and module.training:
            raise ValueError(f"{where} draws at random in training mode (active Dropout), so that every pass sees another network; call model.eval() first.")


def fingerprint(model: nn.Module) -> tuple[float, ...]:
    """Numbers that change when a parameter or buffer changes."""
    marks: list[float] = []
    with torch.no_grad():
        sums = [_sums(t) for t in [*model.parameters(), *model.buffers()]]
        if sums:
            marks = torch.cat([s.cpu() for s in sums]).tolist()
    return tuple(marks)


def digest(marks: tuple[float, ...]) -> str:
    """Short hexadecimal digest of a fingerprint."""
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _sums(t: Tensor) -> Tensor:
    """An exact sum of the bits, which no single change escapes, and a position-weighted sum, which sees exchanges."""
    flat = t.detach().reshape(-1)
    if not flat.numel():
        return torch.zeros(2, dtype=torch.float64, device=t.device)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[1 if t.is_complex() else flat.element_size()]
    bits = torch.view_as_real(flat).reshape(-1).view(torch.int32) if t.is_complex() else flat.view(width)
    exact = bits.sum(dtype=torch.int64) % (2**52)
    numbers = torch.view_as_real(flat).reshape(-1) if t.is_complex() else flat
    numbers = numbers if numbers.is_floating_point() else numbers.to(torch.float64)
    side = max(1, int(numbers.numel() ** 0.5))
    whole = numbers[: side * (numbers.numel() // side)].reshape(-1, side)
    columns = torch.linspace(1, 2, side, device=flat.device, dtype=whole.dtype)
    rows = torch.linspace(1, 3, len(whole), device=flat.device, dtype=whole.dtype)
    weighted = rows @ (whole @ columns) + numbers[whole.numel() :].sum()
    return torch.nan_to_num(torch.stack([exact.double(), weighted.double()]))
