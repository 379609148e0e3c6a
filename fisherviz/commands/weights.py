"""Weights out of the files that people have: state_dicts, and what trainers and wrappers of modules make of them.

Pickled code is never run. A prefix or a wrapping is taken off only where what is left fits the network's names alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fisherviz.support.choices import did_you_mean
from fisherviz.support.errors import option, refusing
from fisherviz.support.pickles import tensors
from fisherviz.support.plain import from_json

DEEPEST = 3
"""Levels of dictionaries around a state_dict."""
AVERAGED = ("ema", "average", "swa")
"""In the names of averages, which a checkpoint may hold beside the weights themselves."""
SHOWN = 4
"""Names that a sentence tells; the rest is counted."""


@dataclass(frozen=True)
class _Candidate:
    """Tensors by name that may be the network's, and where in the file they were."""

    state: dict[str, Tensor]
    keys: tuple[str, ...] = ()
    prefix: str = ""
    aside: int = 0

    @property
    def words(self) -> str:
        """Which part of the file that is."""
        parts = [f"its entry {'/'.join(self.keys)!r}"] if self.keys else []
        parts += [f"without the prefix {self.prefix!r}"] if self.prefix else []
        parts += [f"{self.aside} other {'tensors' if self.aside > 1 else 'tensor'} left out"] if self.aside else []
        return ", ".join(parts)

    @property
    def averages(self) -> int:
        """Parts of its place that call it an average of weights."""
        return sum(any(word in key.lower() for word in AVERAGED) for key in (*self.keys, self.prefix))


def load_weights(model: nn.Module, path: Path) -> str:
    """Read weights into a network; pickled code is never run.

    Args:
        model: gets the weights.
        path: a .safetensors file, the index of several, or what `torch.save` made of a state_dict or a checkpoint.

    Returns:
        Which part of the file they are, in words; "" where they are all of it.

    Raises:
        OptionError: the file is missing, is something else, or does not fit the network.
    """
    with option("--weights"):
        content = _read(path)
        own = model.state_dict()
        found = [each for whole in _candidates(content) for each in (whole, *_without_prefix(whole, own))]
        if not found:
            raise ValueError(f"{path} holds no state_dict; save model.state_dict().")
        found = [replace(each, state=_with_tied(each.state, own)) for each in found]
        fitting = [each for each in found if each.state.keys() == own.keys()]
        least = min((each.averages for each in fitting), default=0)
        fitting = [each for each in fitting if each.averages == least]
        if not fitting:
            raise ValueError(_unfit(path, own, max(found, key=lambda each: len(each.state.keys() & own.keys()))))
        if len(fitting) > 1:
            told = " and ".join(repr("/".join((*each.keys, each.prefix)).strip("/")) for each in fitting)
            raise ValueError(f"{path} holds weights of this network in {told}; save the ones meant alone.")
        chosen = fitting[0]
        wrong = [name for name in own if own[name].shape != chosen.state[name].shape]
        if wrong:
            shapes = [
                f"{name!r} has the shape {tuple(chosen.state[name].shape)}, the network's {tuple(own[name].shape)}"
                for name in wrong[:SHOWN]
            ]
            raise ValueError(f"{path} does not fit the network of --model: {'; '.join(shapes)}{_more(wrong)}.")
        if other := [name for name in own if _numbers(own[name]) != _numbers(chosen.state[name])]:
            raise ValueError(
                f"{path} does not fit the network of --model: {_first(other)} holds "
                f"{_numbers(chosen.state[other[0]])} numbers ({chosen.state[other[0]].dtype}), the network's is "
                f"{own[other[0]].dtype}; save the weights as the network computes with them, not quantised."
            )
        model.load_state_dict(chosen.state)
        return chosen.words


def _first(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _numbers(t: Tensor) -> str:
    """What kind of numbers a tensor holds; torch copies one into the other, and loses what makes the difference."""
    return "complex" if t.is_complex() else "real" if t.is_floating_point() else "whole"


def _read(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file, for example {path / 'model.safetensors'}.")
    if not path.is_file():
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*")])
        raise ValueError(f"there is no file {path}{near}")
    if path.name.endswith(".safetensors.index.json"):
        try:
            names = sorted({str(name) for name in from_json(path.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of .safetensors files.") from error
        if inside := [name for name in names if Path(name).name != name or not (path.parent / name).is_file()]:
            raise ValueError(f"{path} names {inside[0]!r}, which is no file beside it.")
        return {key: tensor for name in names for key, tensor in _safetensors(path.parent / name).items()}
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        return tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{path} holds more than weights, or none ({error}); save model.state_dict() with torch.save or "
            "safetensors."
        ) from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        with refusing():
            return load_file(path)
    except ValueError as error:
        raise ValueError(f"{path} is no .safetensors file, or a damaged one ({error}).") from error


def _candidates(content: Any, keys: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """The dictionaries of tensors in what a file holds."""
    if not isinstance(content, Mapping) or len(keys) > DEEPEST:
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield _Candidate(tensors, keys)
    for name, value in content.items():
        yield from _candidates(value, (*keys, str(name)))


def _without_prefix(whole: _Candidate, own: Mapping[str, Tensor]) -> Iterator[_Candidate]:
    """Its parts whose names end in the network's: behind each prefix of the network's first name."""
    first = min(own, default="")
    for name in whole.state:
        if first and name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            part = {key.removeprefix(prefix): t for key, t in whole.state.items() if key.startswith(prefix)}
            yield _Candidate(part, whole.keys, prefix, len(whole.state) - len(part))


def _with_tied(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names of tensors that the network holds under several, of which files may have one alone."""
    places = {(own[name].data_ptr(), own[name].shape): name for name in own if name in state}
    tied = {name: places.get((t.data_ptr(), t.shape)) for name, t in own.items() if name not in state and t.numel()}
    return {**state, **{name: state[other] for name, other in tied.items() if other is not None}}


def _unfit(path: Path, own: Mapping[str, Tensor], nearest: _Candidate) -> str:
    """What is missing and what is too much."""
    missing = [name for name in own if name not in nearest.state]
    surplus = [name for name in nearest.state if name not in own]
    parts = [f"it lacks {_listed(missing)}"] if missing else []
    parts += [f"it has {_listed(surplus)}, which the network lacks"] if surplus else []
    where = f" ({nearest.words})" if nearest.words else ""
    return f"{path}{where} does not fit the network of --model: {'; '.join(parts)}."


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + _more(names)


def _more(names: list[str]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
