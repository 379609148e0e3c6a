"""Tensors and captures as plain containers of tensors, in which states are saved, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture


def pack(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and captures as plain containers of tensors."""
    return {key: value.clone() if isinstance(value, Tensor) else _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """A capture as a dictionary, and what is in it."""
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)} if is_dataclass(value) else value


def unpack(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `pack` was given."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            out[key] = value.to(device, copy=True)
        else:
            out[key] = _capture(value, device)
    return out


def _capture(packed: Mapping[str, Any], device: torch.device) -> AnyCapture:
    parts: dict[str, Any] = {
        name: t.to(device) if isinstance(t, Tensor) else _capture(t, device) if isinstance(t, Mapping) else t
        for name, t in packed.items()
    }
    kinds: tuple[Any, ...] = (Capture, TokenCapture, TiedCapture, GenericCapture)
    return next(kind for kind in kinds if {f.name for f in fields(kind)} >= set(parts))(**parts)
