"""A matrix over layers as one safetensors file: the tensors that define its operators, and how they are put together.

The tensors are named by layer, such as `operators.layer1.A`; the file's metadata hold, as JSON, what the matrix is, the
geometry of its layers, and the operators. Neither network nor data are needed to read it, and no code of it is run.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fisherviz.capture.captures import Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.network.recorded import recorded, restored
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import Operator
from fisherviz.operators.recording import Reader, Recorder
from fisherviz.statistics.examples import Examples

FORMAT = 1
_KEY = "fisherviz"
_HELD = (Examples, Capture, GenericCapture, TiedCapture, TokenCapture)


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Args:
        space: the probed parameters.
        operator: the matrix in unit order.
        what: plain values that say what it is.
    """

    space: ParameterSpace
    operator: Operator
    what: dict[str, Any]


def encoded(stored: Stored, dtype: torch.dtype) -> bytes:
    """The file's content.

    Args:
        stored: what it is to hold.
        dtype: of the parameters.

    Raises:
        NotImplementedError: an operator cannot be written down.
    """
    recorder = Recorder(_HELD, stored.space.names)
    facts = {
        "format": FORMAT,
        "what": stored.what,
        "dtype": str(dtype).removeprefix("torch."),
        "space": recorded(stored.space),
        "operator": recorder.plain(stored.operator, ""),
    }
    return save(recorder.tensors, {_KEY: json.dumps(facts)})


def decoded(path: str | os.PathLike[str], device: torch.device) -> Stored:
    """What a file holds.

    Args:
        path: the file.
        device: where the tensors are to live.

    Raises:
        ValueError: it is not there, is no saved matrix, is damaged, or a newer release wrote it.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — it is no dictionary
        version = facts["format"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds no saved approximation ({error}); give the file that an approximation's save() wrote."
        ) from error
    if version > FORMAT:
        raise ValueError(f"{path} is in format {version}, this release reads up to {FORMAT}; upgrade fisherviz.")
    space = restored(facts["space"], getattr(torch, facts["dtype"]), device)
    return Stored(space, Reader(tensors, _HELD, device).value(facts["operator"]), facts["what"])
