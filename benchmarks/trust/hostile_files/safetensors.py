"""Headers of safetensors, and saved matrices."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Iterator
from typing import Any

from benchmarks.trust.hostile_files.case import TOUCH, Calls, Case, holding
from benchmarks.trust.hostile_files.torch_files import (
    archive,
    called,
    torch_archive,
)


def safetensors_files() -> Iterator[Case]:
    """Headers of .safetensors files that say what cannot be."""
    one = _entry([6], 0, 24)
    twice = json.dumps({"0.weight": one})[1:-1]
    headers: dict[str, bytes] = {
        "a header of 2^63 bytes": _safetensors({"0.weight": one}, length=2**63),
        "a header of 2^64 - 1 bytes": _safetensors({"0.weight": one}, length=2**64 - 1),
        "a header of 99 MB": _safetensors({"0.weight": one}, length=99_000_000),
        "a header of no bytes": _safetensors({"0.weight": one}, length=0),
        "no header": b"",
        "seven bytes": bytes(7),
        "overlapping tensors": _safetensors({"a": _entry([3], 0, 12), "b": _entry([3], 8, 20)}),
        "tensors with a hole": _safetensors({"a": _entry([1], 0, 4), "b": _entry([1], 20, 24)}),
        "two names of one place": _safetensors({"a": one, "b": one}),
        "an end before its begin": _safetensors({"a": _entry([6], 24, 0)}),
        "an end behind the file": _safetensors({"a": _entry([2**40], 0, 2**42)}),
        "a negative side": _safetensors({"a": _entry([-6], 0, 24)}),
        "a negative begin": _safetensors({"a": _entry([6], -24, 0)}),
        "a fraction of a side": _safetensors({"a": _entry([6.5], 0, 24)}),
        "a side of 2^64": _safetensors({"a": _entry([2**64], 0, 24)}),
        "sides whose product overflows": _safetensors({"a": _entry([2**33, 2**33], 0, 24)}),
        "a shape that does not fit": _safetensors({"a": _entry([7], 0, 24)}),
        "an unknown type": _safetensors({"a": _entry([6], 0, 24, "PICKLE")}),
        "a type that torch lacks": _safetensors({"a": _entry([48], 0, 24, "F4")}),
        "lists 100,000 deep": _safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "mappings 100,000 deep": _safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a list": _safetensors(b"[]"),
        "no JSON": _safetensors(b"{'a': __import__('os')}"),
        "a key twice": _safetensors(f"{{{twice},{twice}}}".encode()),
        "metadata that are no texts": _safetensors({"__metadata__": {"a": [1]}, "0.weight": one}),
        "bytes that are no text": _safetensors(b'{"\xff\xfe": 1}'),
        "more data than tensors": _safetensors({"0.weight": one}, bytes(100)),
        "a pickle": pickle.dumps(Calls(exec, TOUCH), 2),
        "a torch archive": archive(torch_archive(called("builtins", "exec", TOUCH))),
    }
    for name, content in headers.items():
        yield Case("safetensors", name, ("weights", "approximation"), holding("weights.safetensors", content))
    for name, text in {
        "an index that leaves the folder": '{"weight_map": {"a": "../../etc/passwd"}}',
        "an index with an absolute path": '{"weight_map": {"a": "/etc/passwd"}}',
        "an index of files that are not there": '{"weight_map": {"a": "b.safetensors"}}',
        "an index of a pickle": '{"weight_map": {"a": "net.py"}}',
        "an index 100,000 deep": '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "an index that is a list": "[]",
        "an index of numbers": '{"weight_map": {"a": 1}}',
        "an index with a key twice": '{"weight_map": {}, "weight_map": {}}',
    }.items():
        write = holding("weights.safetensors.index.json", text.encode())
        yield Case("safetensors", name, ("weights",), write, "net.py" if name == "an index of a pickle" else "")
    for name, facts in _approximations().items():
        text = facts if isinstance(facts, str) else json.dumps(facts)
        yield Case("saved matrices", name, ("approximation",), holding("matrix.safetensors", _sealed_matrix(text)))


def _safetensors(header: bytes | dict[str, Any], data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def _entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _sealed_matrix(text: str) -> bytes:
    """A safetensors file with facts of a matrix and the right sum over them."""
    from safetensors.torch import save

    return save({}, {"fisherviz": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def _approximations() -> dict[str, Any]:
    what = dict.fromkeys(("name", "kind", "reduction", "title", "repr", "version"), "x")
    part = {"name": "w", "shape": [2], "columns": [0, 1], "rows": 2, "stored": None}
    info = {
        "name": "l", "kind": "Linear", "path": "structured", "parameters": ["w"], "num_parameters": 2,
        "in_features": 1, "out_features": 2, "bias": False, "note": "",
    }  # fmt: skip
    space = {"order": ["w"], "layers": [{"info": info, "parts": [part]}]}
    base = {"format": 1, "what": what, "dtype": "float32", "space": space, "operator": None}
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    identity = {"class": "Identity", "name": "", "arguments": {"size": 2**40}}
    return {
        "no operator": base,
        "a list": [],
        "a number": 1,
        "a format that is none": {**base, "format": "x"},
        "a format of a thousand digits": json.dumps({**base, "format": 1}).replace("1", "9" * 5000, 1),
        "an operator 500 deep": {**base, "operator": deep},
        "an operator 100,000 deep": '{"format": 1, "operator": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "an operator of os": {**base, "operator": {"class": "os.system", "name": "", "arguments": {"command": "x"}}},
        "an operator of builtins": {**base, "operator": {"class": "exec", "name": "", "arguments": {"0": TOUCH}}},
        "a type that is a function": {**base, "dtype": "load"},
        "a type of a type": {**base, "operator": {"dtype": "hub"}},
        "an operator of 2^40 rows": {**base, "operator": identity},
        "a parameter of 2^60 numbers": {
            **base, "space": {"order": ["w"], "layers": [{"info": info, "parts": [{**part, "shape": [2**60]}]}]},
        },
        "a parameter of -1 numbers": {
            **base, "space": {"order": ["w"], "layers": [{"info": info, "parts": [{**part, "shape": [-1]}]}]},
        },
        "a tensor that is not there": {**base, "operator": {"tensor": "w"}},
        "itself": {**base, "operator": {"same": ""}},
        "NaN": json.dumps({**base, "format": 1}).replace("1", "NaN", 1),
        "what it says as lists": {**base, "what": [1, 2]},
    }  # fmt: skip
