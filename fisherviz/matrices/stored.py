"""A matrix over layers as one safetensors file: the tensors that define its operators, and how they are put together.

The tensors are named by layer, such as `operators.layer1.A`; the file's metadata hold, as JSON, what the matrix is, the
geometry of its layers, and the operators. Neither network nor data are needed to read it, and no code of it is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fisherviz.capture.captures import Capture, GenericCapture, TiedCapture
from fisherviz.capture.formed import FormedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.network.recorded import recorded, restored
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import Operator
from fisherviz.operators.recording import Reader, Recorder
from fisherviz.statistics.examples import Examples

FORMAT = 1
_KEY, _SUM = "fisherviz", "sha256"
SAID = {"name", "kind", "reduction", "title", "repr", "version"}
"""What a matrix says of itself: title and line of text; the method and the Fisher's kind and reduction, "" where it has
none."""
MARKS = {"weights", "data"}
"""Digests of what it was made from, "" where they are not known; files of release 0.1.0 may lack them."""
_HELD = (Examples, Capture, FormedCapture, GenericCapture, TiedCapture, TokenCapture)


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Args:
        space: the probed parameters.
        operator: the matrix in unit order.
        what: what it says of itself, by the names in `SAID` and `MARKS`.
    """

    space: ParameterSpace
    operator: Operator
    what: dict[str, str]


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
    text = json.dumps(facts)
    return save(recorder.tensors, {_KEY: text, _SUM: _digest(text, recorder.tensors)})


def decoded(path: str | os.PathLike[str], device: torch.device) -> Stored:
    """What a file holds.

    Args:
        path: the file.
        device: where the tensors are to live.

    Raises:
        ValueError: it is not there, is no saved matrix, is damaged, or a newer release wrote it.
    """
    try:
        metadata, tensors = _read(path)
        text, expected = metadata[_KEY], metadata[_SUM]
        facts = json.loads(text)
        version = int(facts["format"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no saved approximation ({error}); give the file that an approximation's save() wrote."
        ) from error
    if version > FORMAT:
        raise ValueError(f"{path} is in format {version}, this release reads up to {FORMAT}; upgrade fisherviz.")
    if _digest(text, tensors) != expected:
        raise ValueError(f"{path} is damaged: its content is not what was saved; save the approximation again.")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        space = restored(facts["space"], getattr(torch, facts["dtype"]), device)
        operator = Reader(tensors, _HELD, device).value(facts["operator"])
        fits = isinstance(operator, Operator) and operator.shape == (space.size,) * 2
        if fits and set(facts["what"]) - MARKS == SAID and all(isinstance(x, str) for x in facts["what"].values()):
            return Stored(space, operator, dict.fromkeys(MARKS, "") | facts["what"])
    except ValueError as error:  # a class that is not there, or that refuses its arguments
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path} was not written by fisherviz: {type(error).__name__}, {error}.") from error
    raise ValueError(f"{path} was not written by fisherviz: what it holds is no matrix over its layers.")


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of one file: safetensors opens it twice, and another process may replace it in between."""
    while True:
        before = os.stat(path)
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if os.path.samestat(before, after := os.stat(path)) and before.st_mtime_ns == after.st_mtime_ns:
            return found


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in the file, so that a flipped bit is noticed."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
