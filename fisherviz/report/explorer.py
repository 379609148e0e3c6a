"""What the page's explorer of matrices is given: the saved blocks, rounded and compressed, once for all pictures.

The streams are those of results/blocks.py; blocks.js reads them. Numbers are rounded until they have room, and methods
that have none are left out from the end of the ranking, which the page says.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from fisherviz.plotting import style
from fisherviz.results import blocks
from fisherviz.results.comparison import EXACT, Comparison
from fisherviz.support.names import shortened

ROOM = 3_700_000
"""Characters that all explorers of a page may take, of the 5 MB that the page may."""
PRECISIONS = (7, 6, 5, 4)
"""Binary digits behind the point, the most that have room."""
KINDS = {"matrix": "", "inverse": "_inverse"}
ROOT_MEANS = "rms"
"""The kind whose blocks are single cells."""
WIDTH = 12
COLORS = {"sequential": style.SEQUENTIAL, "diverging": style.DIVERGING, "dark": "berlin"}
"""Names of perceptually uniform maps; the last is the diverging one on a dark page, where no value is dark."""


@dataclass(frozen=True)
class Explorer:
    """One section's explorer.

    Args:
        methods: in the order of the ranking.
        kinds: of "matrix", "inverse" and "rms", which is there above the limit of dense matrices.
        layers: their names.
        left_out: methods that had no room.
        error: largest relative error of an entry that was rounded; 0 where none was.
        sampled: whether "matrix" is of a sample of the parameters.
        torch_order: whether the order in which torch stores them is known.
        data: JSON text, safe inside a script element.
    """

    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    left_out: tuple[str, ...]
    error: float
    sampled: bool
    torch_order: bool
    data: Markup


def has_blocks(comparison: Comparison) -> bool:
    """Whether a comparison holds what an explorer shows."""
    return not {f"block_rms/{EXACT}", "blocks_layout"}.isdisjoint(comparison.arrays)


def explorer(comparison: Comparison, ranked: list[str], room: int = ROOM) -> Explorer | None:
    """The explorer of a comparison.

    Args:
        comparison: whose matrices.
        ranked: its methods, closest first.
        room: characters that it may take.

    Returns:
        The explorer; None if the comparison holds no blocks.
    """
    arrays = comparison.arrays
    if not has_blocks(comparison):
        return None
    roots, sampled = f"block_rms/{EXACT}" in arrays, "sample_units" in arrays
    methods = [name for name in ranked if {f"block_rms/{name}", f"blocks/{name}"} & set(arrays)]
    if not methods:
        return None
    for digits in PRECISIONS:
        kinds = _kinds(arrays, methods, digits) | (_root_means(arrays, methods) if roots else {})
        if _size(kinds, methods) <= room:
            break
    shown = list(methods)
    while len(shown) > 1 and _size(kinds, shown) > room:
        shown.pop()
    data: dict[str, Any] = {
        "methods": shown,
        "layers": _layers(comparison),
        "kinds": {
            kind: {name: streams[name] for name in (EXACT, *shown) if name in streams}
            for kind, streams in kinds.items()
        },
    }
    if sampled:
        data["parameters"] = comparison.meta["parameters"]
    if "blocks_layout" in arrays:
        within, between = arrays["blocks_layout"][0].astype(int).tolist()
        data["layout"] = {"within": within, "between": between}
    if "blocks_torch" in arrays:
        data["torch"] = _floats(arrays["blocks_torch"])
    if roots:
        data["means"] = dict.fromkeys(kinds, kinds[ROOT_MEANS][EXACT][0])
    else:
        data["means"] = {kind: _floats(arrays[f"block_means{KINDS[kind]}/{EXACT}"]) for kind in kinds}
    some_rounded = any(array.size for name, array in arrays.items() if name.startswith("entries"))
    return Explorer(
        tuple(shown), tuple(kinds), comparison.layers, tuple(methods[len(shown) :]),
        _error(digits) if some_rounded else 0.0, sampled, "torch" in data, in_script(data),
    )  # fmt: skip


def _error(digits: int) -> float:
    """Largest relative error of a number that was rounded when it was saved and is rounded once more."""
    return 2.0 ** -(blocks.BITS + 1) + (2.0 ** -(digits + 1) if digits < blocks.BITS else 0.0)


def in_script(data: Any) -> Markup:
    """JSON that can stand inside a script element: nothing in it ends the element, opens one or begins a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def color_maps() -> Markup:
    """The explorer's colours: 256 of each map, as hexadecimal digits without signs between them."""
    places = np.linspace(0, 1, 256)
    return in_script({name: "".join(to_hex(c)[1:] for c in colormaps[m](places)) for name, m in COLORS.items()})


def _kinds(arrays: Mapping[str, np.ndarray], methods: list[str], digits: int) -> dict[str, dict[str, list[str]]]:
    found = {}
    for kind, suffix in KINDS.items():
        streams = {
            name: [
                _floats(arrays[f"blocks{suffix}/{name}"]),
                _rounded(arrays[f"entries{suffix}/{name}"], digits),
            ]
            for name in (EXACT, *methods)
            if f"blocks{suffix}/{name}" in arrays
        }
        if EXACT in streams:
            found[kind] = streams
    return found


def _root_means(arrays: Mapping[str, np.ndarray], methods: list[str]) -> dict[str, dict[str, list[str]]]:
    streams = {EXACT: [_floats(arrays[f"block_rms/{EXACT}"])]}
    for name in methods:
        streams[name] = [_floats(arrays[f"{what}/{name}"]) for what in ("block_rms", "block_rms_difference")]
    return {ROOT_MEANS: streams}


def _size(kinds: Mapping[str, Mapping[str, list[str]]], methods: list[str]) -> int:
    return sum(len(text) for streams in kinds.values() for name in (EXACT, *methods) for text in streams.get(name, ()))


def _layers(comparison: Comparison) -> list[dict[str, Any]]:
    """Names, and shapes where single entries are shown, with what was chosen of larger ones."""
    arrays, count = comparison.arrays, len(comparison.layers)
    infos = comparison.meta.get("layers") or [{} for _ in comparison.layers]
    shapes = arrays["blocks_layout"][1:].astype(int).tolist() if "blocks_layout" in arrays else [(1, 1)] * count
    found = [
        {
            "name": name, "label": label, "units": units, "inputs": inputs,
            "structured": info.get("path") == "structured", "bias": bool(info.get("bias")),
        }
        for name, label, (units, inputs), info in zip(
            comparison.layers, shortened(comparison.layers, WIDTH), shapes, infos, strict=True
        )
    ]  # fmt: skip
    if "sample_units" in arrays:
        for what, side in (("units", 0), ("inputs", 1)):
            places = blocks.of_digits(arrays[f"sample_{what}"])
            ends = np.cumsum([shape[side] for shape in shapes])[:-1]
            for layer, mine in zip(found, np.split(places, ends), strict=True):
                layer[f"chosen_{what}"] = mine.tolist()
        for layer, info in zip(found, infos, strict=True):
            layer["fan_in"] = info.get("in_features", 0)
    return found


def _floats(array: np.ndarray) -> str:
    return _compressed(np.ascontiguousarray(array, dtype="<f4").tobytes())


def _rounded(array: np.ndarray, digits: int) -> str:
    """The upper two bytes of each number, all first ones before all second ones."""
    whole = blocks.rounded(array, digits).view(np.uint32)
    return _compressed((whole >> 24).astype(np.uint8).tobytes() + (whole >> 16 & 255).astype(np.uint8).tobytes())


def _compressed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()
