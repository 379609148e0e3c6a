"""Files that want to run code, take memory or time, or leave their folder: made here, by kind, never kept.

A case writes what it is about into an empty folder; `entries` says which doors of the package it knocks at. What would
be run creates the file CANARY beside it.
"""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

CANARY = "executed"
HUGE = 2**29
"""Bytes that bombs unfold to; they are a thousandth of that."""
TOUCH = f"open({CANARY!r}, 'w').close()"


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Args:
        kind: what the page counts it under.
        name: what is wrong with it.
        entries: the doors, by the names of `doors.DOORS`.
        write: into a folder; gives the path that a door is handed.
        named: what the refusal must name, beside which the file's own name will do.
    """

    kind: str
    name: str
    entries: tuple[str, ...]
    write: Callable[[Path], Path]
    named: str = ""


class Calls:
    """Pickled, it is a call: unpickling makes it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        """The call."""
        return self.call


def called(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls a function by its name, which need not be there when it is written."""
    body = b"".join(pickle.dumps(each, 2)[2:-1] for each in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + body + b"tR."


def payloads() -> dict[str, bytes]:
    """Pickles that run something, or make torch take memory."""
    lots = 2**36
    running = {
        "os.system": pickle.dumps(Calls(os.system, f"touch {CANARY}"), 2),
        "builtins.exec": pickle.dumps(Calls(exec, TOUCH), 2),
        "builtins.eval": pickle.dumps(Calls(eval, TOUCH), 2),
        "builtins.open": pickle.dumps(Calls(builtins.open, CANARY, "w"), 2),
        "os.mkdir": pickle.dumps(Calls(os.mkdir, CANARY), 2),
        "protocol 4": pickle.dumps(Calls(exec, TOUCH), 4),
        "protocol 0": pickle.dumps(Calls(exec, TOUCH), 0),
        "subprocess.Popen": called("subprocess", "Popen", ["touch", CANARY]),
        "shutil.copy": called("shutil", "copy", "/etc/hostname", CANARY),
        "pickle.loads": called("pickle", "loads", pickle.dumps(Calls(exec, TOUCH), 0).decode("latin1")),
        "runpy": called("runpy", "run_path", "net.py"),
        "timeit": called("timeit", "timeit", TOUCH),
        "code of a logger": called("logging.config", "dictConfig", {"version": 1}),
        "importlib": called("importlib", "import_module", "antigravity"),
        "torch.load": called("torch", "load", "inner.pt"),
        "torch.hub.load": called("torch.hub", "load", "owner/name", "net"),
        "torch.jit.load": called("torch.jit", "load", "inner.pt"),
        "numpy.load": called("numpy", "load", "inner.npy", None, True),
        "torch.storage._load_from_bytes": called("torch.storage", "_load_from_bytes", "x"),
        "torch._inductor": called("torch._inductor.codecache", "PyCodeCache.load", TOUCH),
        "old name INST": b"(S'" + TOUCH.encode() + b"'\nibuiltins\nexec\n.",
        "an extension": b"\x80\x02\x82\x01.",
    }
    running["nested in a list"] = b"\x80\x02]" + running["builtins.exec"][2:-1] + b"a."
    taking = {
        "bytearray of 64 GiB": called("__builtin__", "bytearray", lots),
        "Tensor of 64 GiB": called("torch", "Tensor", lots // 4),
        "FloatTensor of 64 GiB": called("torch", "FloatTensor", lots // 4),
        "UntypedStorage of 64 GiB": called("torch", "UntypedStorage", lots),
        "UntypedStorage in storage": called("torch.storage", "UntypedStorage", lots),
        "wrapper subclass": called("torch._utils", "_rebuild_wrapper_subclass", None, None, (lots,), (1,)),
        "a memo of 2^31": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "an integer of a gigabyte": b"\x80\x02\x8b\x00\x00\x00\x40.",
        "a string of a gigabyte": b"\x80\x02X\x00\x00\x00\x40.",
        "lists 100,000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "tuples 100,000 deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "a stack of nothing": b"\x80\x02" + b"0" * 1000 + b".",
        "bytes doubled 40 times": _doubled(40),
    }
    return {**running, **taking}


def _doubled(times: int) -> bytes:
    text = b"c_codecs\nencode\n(" * times + b"X\x02\x00\x00\x00aa"
    return b"\x80\x02" + text + b"X\x03\x00\x00\x00hextR" * times + b"."


def archive(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive as torch writes one."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return content.getvalue()


def torch_archive(pickled: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes) -> dict[str, bytes]:
    """The entries of what `torch.save` writes."""
    data = {f"archive/data/{key}": content for key, content in (storages or {}).items()}
    return {"archive/data.pkl": pickled, "archive/byteorder": b"little", **data, "archive/version": b"3\n", **more}


def tensor(size: tuple[int, ...], stride: tuple[int, ...], count: int, offset: int = 0, key: str = "0") -> bytes:
    """A pickle of {"0.weight": one float32 tensor} with whatever sizes it claims."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    place = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + plain(key) + plain("cpu") + plain(count) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + plain(offset) + plain(size) + plain(stride)
    return b"\x80\x02}" + plain("0.weight") + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


def old_stream(pickled: bytes, keys: tuple[str, ...] = (), data: bytes = b"") -> bytes:
    """What `torch.save` wrote before 1.6, of a pickle."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, machine)]
    return b"".join([*parts, pickled, pickle.dumps(list(keys), 2), data])


def old_tensor(count: int, size: int) -> bytes:
    """Its main pickle of one tensor; there a storage has a view beside its numbers."""
    return tensor((size,), (1,), count).replace(b"tQ", b"NtQ", 1)


def tar(entries: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    """A tar archive, the form of torch's first releases."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as made:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            made.addfile(entry)
    return content.getvalue()


def _file(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())
        return path

    return write


def checkpoints() -> Iterator[Case]:
    """What is handed to --weights, and lies in a run's folder."""
    doors = ("weights", "resume")
    for name, content in payloads().items():
        for form, whole in (
            ("a bare pickle", content),
            ("a torch archive", archive(torch_archive(content))),
            ("torch before 1.6", old_stream(content)),
            ("torch's first tar", tar({"storages": content, "tensors": content, "pickle": content})),
        ):
            yield Case("pickles", f"{name} in {form}", doors, _file("weights.pt", whole))
    good = tensor((2,), (1,), 2)
    data = {"0": bytes(8)}
    claims = {
        "a tensor of 2^40 numbers": (tensor((2**40,), (1,), 2), data),
        "a storage of 2^40 numbers": (tensor((2**40,), (1,), 2**40), data),
        "a storage larger than its entry": (tensor((1000,), (1,), 1000), data),
        "a storage of -1 numbers": (tensor((2,), (1,), -1), data),
        "a storage of 2^63 numbers": (tensor((2,), (1,), 2**63), data),
        "a negative side": (tensor((-2,), (1,), 2), data),
        "a negative stride": (tensor((2,), (-1,), 2), data),
        "an offset behind the end": (tensor((2,), (1,), 2, 2**40), data),
        "a negative offset": (tensor((2,), (1,), 2, -1), data),
        "sides whose product overflows": (tensor((2**32, 2**32), (1, 1), 2), data),
        "2^40 views of one number": (tensor((2**40,), (0,), 2), data),
        "a storage that is not there": (good, {}),
        "a key that leaves the archive": (tensor((2,), (1,), 2, key="../../etc/passwd"), data),
        "a count by way of the memo": (good.replace(b"K\x02tQ", b"K\x020J\x00\x00\x00\x7ftQ"), data),
    }
    for name, (pickled, storages) in claims.items():
        yield Case("claimed sizes", name, doors, _file("weights.pt", archive(torch_archive(pickled, storages))))
    for count in (2**31, 2**40, 2**62):
        content = old_stream(old_tensor(count, 2), ("0",), struct.pack("<q", count) + bytes(64))
        yield Case("claimed sizes", f"torch before 1.6: {count:,} numbers", doors, _file("weights.pt", content))
    whole = archive(torch_archive(good, data))
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        cut = whole[: int(share * len(whole))]
        yield Case("truncated", f"a torch archive cut at {share:.0%}", doors, _file("weights.pt", cut))
    zeros = bytes(HUGE)
    bombs = {
        "an entry of zeros": lambda: archive(torch_archive(good, {"0": zeros}), zipfile.ZIP_DEFLATED),
        "a pickle of zeros": lambda: archive(torch_archive(zeros), zipfile.ZIP_DEFLATED),
        "two entries of one name": lambda: archive(torch_archive(good, data)) + b"",
        "a torchscript archive": lambda: archive(torch_archive(good, data, **{"archive/constants.pkl": good})),
        "an archive in a pickle's place": lambda: archive(torch_archive(whole, data)),
        "names that leave the folder": lambda: archive({f"../../{k}": v for k, v in torch_archive(good, data).items()}),
        "entries that claim more than there is": lambda: _swollen(whole),
    }
    for name, content in bombs.items():
        if name != "two entries of one name":
            yield Case("archives", f"torch: {name}", doors, _file("weights.pt", content))


def _swollen(whole: bytes) -> bytes:
    """The archive with the sizes of its directory's entries at 2 GiB."""
    found = bytearray(whole)
    place = found.find(b"PK\x01\x02")
    while place >= 0:
        struct.pack_into("<II", found, place + 20, 2**31, 2**31)
        place = found.find(b"PK\x01\x02", place + 4)
    return bytes(found)


def _safetensors(header: bytes | dict[str, Any], data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def _entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def states() -> Iterator[Case]:
    """Checkpoints with the right sum over what no run wrote."""
    from fisherviz.support.sealing import seal

    good = {
        "format": 1,
        "metrics_bytes": 0,
        "model": {},
        "optimizer": {},
        "average": None,
        "random": torch.zeros(1),
        "random_cuda": None,
        "position": [0, 0],
        "counts": [0, 0, 0],
        "running": 0.0,
        "seconds": {},
        "data": "",
    }
    changes: dict[str, dict[str, Any]] = {
        "no format": {"format": None},
        "a format in words": {"format": "1"},
        "a format from the future": {"format": 99},
        "nothing else": {},
        "other data": {"data": "0" * 16},
        "weights as a list": {"model": [1]},
        "weights of another network": {"model": {"evil": torch.zeros(3)}},
        "2^40 views of one number as a weight": {"model": {"0.weight": torch.zeros(1).expand(2**40)}},
        "a random state of one byte": {"random": torch.zeros(1, dtype=torch.uint8)},
        "a position in words": {"position": ["a", "b"]},
        "a negative position": {"position": [-1, -1]},
        "bytes of metrics beyond the file": {"metrics_bytes": 2**60},
    }
    for name, change in changes.items():

        def write(folder: Path, change: dict[str, Any] = change) -> Path:
            from fisherviz.support.sealing import unseal

            there = folder / "checkpoint.pt"
            state = (unseal(there.read_bytes()) if there.exists() else good) | change
            state.pop("sealed", None)
            there.write_bytes(seal(state if change else {"format": 1}))
            return there

        yield Case("checkpoints", name, ("resume",), write)


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
        yield Case("safetensors", name, ("weights", "approximation"), _file("weights.safetensors", content))
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
        write = _file("weights.safetensors.index.json", text.encode())
        yield Case("safetensors", name, ("weights",), write, "net.py" if name == "an index of a pickle" else "")
    for name, facts in _approximations().items():
        text = facts if isinstance(facts, str) else json.dumps(facts)
        yield Case("saved matrices", name, ("approximation",), _file("matrix.safetensors", _sealed_matrix(text)))


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


def yaml_texts() -> Iterator[Case]:
    """Configurations."""
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(97 + k)}: &{chr(97 + k)} [{', '.join(['*' + chr(96 + k)] * 9)}]\n" for k in range(1, 12)
    )
    tag = "tag:yaml.org,2002:python/"
    texts = {
        "python/object/apply": f"dataset: !!python/object/apply:os.system ['touch {CANARY}']",
        "python/object/new": f"dataset: !!python/object/new:os.system ['touch {CANARY}']",
        "python/object": "dataset: !!python/object:subprocess.Popen {}",
        "python/name": "dataset: !!python/name:os.system",
        "python/module": "dataset: !!python/module:antigravity",
        "python/tuple": "dataset: !!python/tuple [1]",
        "a verbatim tag": f"dataset: !<{tag}object/apply:os.system> ['touch {CANARY}']",
        "a tag by a directive": f"%TAG !e! {tag}\n---\ndataset: !e!object/apply:os.system ['touch {CANARY}']",
        "a tag of one's own": "dataset: !exec 'x'",
        "a billion laughs in options": "model_options:\n" + "".join("  " + x + "\n" for x in laughs.splitlines()),
        "a billion laughs": laughs,
        "a list that holds itself": "monitor_methods: &a [*a]",
        "a mapping that holds itself": "model_options: &a {x: *a}",
        "lists 100,000 deep": "model_options: " + "[" * 100_000,
        "lists 100,000 deep and closed": "model_options: " + "[" * 100_000 + "]" * 100_000,
        "mappings 10,000 deep": "model_options: " + "{a: " * 10_000 + "1" + "}" * 10_000,
        "blocks 2,000 deep": "".join(" " * k + "a:\n" for k in range(700)),
        "questions 10,000 deep": "? " * 10_000,
        "dashes 10,000 deep": "- " * 10_000,
        "a merge of a billion": "model_options:\n  a: &a {x: 1}\n"
        + "".join(f"  {chr(98 + k)}: &{chr(98 + k)} {{<<: [*{chr(97 + k)}, *{chr(97 + k)}]}}\n" for k in range(20))
        + "seed: -1\n",
        "an integer of 5,000 digits": "seed: " + "9" * 5000,
        "an integer of 100,000 hexadecimal digits": "seed: 0x" + "f" * 100_000,
        "a sexagesimal integer": "seed: " + ":".join(["1"] * 3000),
        "a date that is none": "dataset: 2026-99-99",
        "bytes that are none": "dataset: !!binary '*'",
        "a float that is none": "holdout: .nan",
        "infinity": "holdout: .inf",
        "a key twice": "seed: 1\nseed: 2",
        "a list as a key": "? [a]\n: 1",
        "a set": "!!set {seed, epochs}",
        "a megabyte": "# " + "x" * 2**20,
        "a control character": "dataset: \x1b[2J",
        "bytes that are no text": b"dataset: \xff\xfe\xfa",
        "two documents": "seed: 1\n---\nseed: 2",
        "a list": "- 1",
        "a text": "x",
        "an alias of nothing": "seed: *a",
        "a module of Python as network": f"model: os:system\nmodel_options: {{command: touch {CANARY}}}",
        "a function of Python as data": f"dataset: subprocess:getoutput\nmodel_options: {{cmd: touch {CANARY}}}",
        "a name inside a module": "model: torch.hub:os.system\nmodel_options: {command: touch executed}",
        "a class of Python as optimizer": f"optimizer: os:system\noptimizer_options: {{command: touch {CANARY}}}",
    }
    for name, text in texts.items():
        content = text.encode() if isinstance(text, str) else text
        yield Case("YAML", name, ("config", "sweep config", "run", "resume config"), _file("config.yaml", content))
    for flag in ("-O", "-M", "--over"):
        for name in (
            "python/object/apply",
            "a list that holds itself",
            "an integer of 5,000 digits",
            "a date that is none",
        ):
            value = str(texts[name]).partition(": ")[2]
            yield Case(
                "YAML", f"{name} after {flag}", (f"flag {flag}",), _file("value", f"lr={value}".encode()), named=flag
            )


def json_texts() -> Iterator[Case]:
    """The facts of comparisons and runs, and what a report says of itself."""
    texts: dict[str, str | bytes] = {
        "lists 100,000 deep": "[" * 100_000 + "]" * 100_000,
        "mappings 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "an integer of 5,000 digits": '{"format": ' + "9" * 5000 + "}",
        "NaN": '{"format": NaN}',
        "infinity": '{"format": Infinity}',
        "a number beyond all": '{"format": 1e999, "sha256": {}, "meta": {}}',
        "a format in words": '{"format": "2", "sha256": {}, "meta": {}}',
        "sums as a list": '{"format": 2, "sha256": [], "meta": {}}',
        "facts as a list": "[1, 2]",
        "facts as a text": '"x"',
        "nothing": "",
        "half a surrogate": '{"format": "\\ud800"}',
        "bytes that are no text": b'{"\xff": 1}',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "code": "__import__('os').system('touch executed')",
    }
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        for file, doors in (
            ("comparison.json", ("comparison", "against")),
            ("report.json", ("against",)),
            ("summary.json", ("run",)),
            ("metrics.jsonl", ("run",)),
        ):
            line = content + (b"\n" if file == "metrics.jsonl" else b"")
            if (file == "metrics.jsonl" and not content) or (file == "report.json" and b'"format": "2"' in content):
                continue
            yield Case("JSON", f"{name} as {file}", doors, _beside(file, line))
    for name, meta in {
        "layers as numbers": {"layers": [1, 2]},
        "layers without names": {"layers": [{}]},
        "notes as a number": {"notes": 7},
        "settings as a list": {"settings": [1]},
        "parameters in words": {"parameters": "many"},
    }.items():
        yield Case("JSON", f"meta with {name}", ("page",), _with_meta(meta))
    for folder in ("../..", "/etc", "..", "a/../../b"):
        text = json.dumps({"sections": [{"title": "x", "folder": folder}], "files": ["index.html"]})
        yield Case("JSON", f"a section in {folder}", ("against",), _beside("report.json", text.encode()))


def _with_meta(meta: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "comparison.json"
        facts = json.loads(path.read_text())
        facts.pop("sealed", None)
        path.write_text(json.dumps({**facts, "meta": meta}))
        return folder

    return write


def _beside(name: str, content: bytes | Callable[[], bytes], signed: bool = False) -> Callable[[Path], Path]:
    """Into the folder of a good comparison or run, which the door has put there; gives the folder."""

    def write(folder: Path) -> Path:
        data = content if isinstance(content, bytes) else content()
        (folder / name).write_bytes(data)
        if signed:  # whoever wrote it wrote its sum too
            facts = json.loads((folder / "comparison.json").read_text())
            facts["sha256"][name] = hashlib.sha256(data).hexdigest()
            facts.pop("sealed", None)
            (folder / "comparison.json").write_text(json.dumps(facts))
        return folder

    return write


def _npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin1") + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) % 2 ** (16 if version == (1, 0) else 32))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def array_files() -> Iterator[Case]:
    """arrays.npz of a comparison and the archive of the faces."""

    def shaped(shape: str, descr: str = "'<f4'") -> str:
        return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"

    objects = io.BytesIO()
    np.save(objects, np.array([Calls(exec, TOUCH)], dtype=object), allow_pickle=True)
    members = {
        "an array of objects": objects.getvalue(),
        "2^40 numbers": _npy(shaped("(1099511627776,)"), bytes(64)),
        "sides whose product overflows": _npy(shaped("(4294967296, 4294967296)"), bytes(64)),
        "sides whose product is 0 in 64 bits": _npy(shaped("(4294967296, 4294967296, 0)"), b""),
        "a negative side": _npy(shaped("(-4,)"), bytes(16)),
        "two negative sides": _npy(shaped("(-2, -2)"), bytes(16)),
        "a side in words": _npy(shaped("('a',)"), bytes(16)),
        "fewer bytes than numbers": _npy(shaped("(100,)"), bytes(16)),
        "more bytes than numbers": _npy(shaped("(2,)"), bytes(16)),
        "a type of Python's": _npy(shaped("(1,)", "'|O'"), pickle.dumps(Calls(exec, TOUCH))),
        "a structured type": _npy(shaped("(1,)", "[('a', '|O')]"), bytes(8)),
        "words": _npy(shaped("(2,)", "'<U4'"), bytes(32)),
        "dates": _npy(shaped("(2,)", "'<M8[s]'"), bytes(16)),
        "a header that is code": _npy("__import__('os').system('touch executed')"),
        "a header of a million brackets": _npy("(" * 60_000),
        "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        "a version from the future": _npy(shaped("(4,)"), bytes(16), (9, 0)),
        "no array": b"hello",
        "nothing": b"",
    }
    for name, member in members.items():
        content = archive({"heatmap/exact.npy": member}, zipfile.ZIP_DEFLATED)
        yield Case("numpy arrays", name, ("comparison", "against"), _beside("arrays.npz", content, signed=True))
        faces = archive({"faces.npy": member, "subject.npy": member}, zipfile.ZIP_DEFLATED)
        yield Case("numpy arrays", f"{name} as faces", ("data faces",), _file("data/olivetti_faces.npz", faces))
    flat = _npy(shaped(f"({HUGE // 4},)"), bytes(HUGE))
    bombs: dict[str, Callable[[], bytes]] = {
        "zeros": lambda: archive({"a.npy": flat}, zipfile.ZIP_DEFLATED),
        "two arrays of one name": lambda: _twice(_npy(shaped("(4,)"), bytes(16))),
        "entries that claim more than there is": lambda: _swollen(archive({"a.npy": _npy(shaped("(4,)"), bytes(16))})),
        "a wrong sum": lambda: _flipped(archive({"a.npy": _npy(shaped("(4,)"), bytes(16))}), b"\x93NUMPY"),
        "no archive": lambda: b"hello",
        "an array alone": lambda: _npy(shaped("(4,)"), bytes(16)),
    }
    for name, made in bombs.items():
        yield Case("archives", f"npz: {name}", ("comparison",), _beside("arrays.npz", made, signed=True))


def _twice(member: bytes) -> bytes:
    import warnings

    content = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(content, "w") as made:
        warnings.simplefilter("ignore")
        made.writestr("a.npy", member)
        made.writestr("a.npy", member)
    return content.getvalue()


def _flipped(content: bytes, behind: bytes) -> bytes:
    place = content.find(behind) + len(behind) + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def parquet_files() -> Iterator[Case]:
    """comparison.parquet."""
    for name, made in _tables().items():
        yield Case("Parquet", name, ("comparison", "against"), _beside("comparison.parquet", made, signed=True))


def _tables() -> dict[str, Callable[[], bytes]]:
    import pyarrow as pa
    from pyarrow import parquet

    words = {name: pa.array(["all"]) for name in ("method", "row", "col", "metric")}
    good = pa.table({**words, "value": [1.0], "stderr": [0.0]})

    def written(table: pa.Table, **options: Any) -> Callable[[], bytes]:
        def write() -> bytes:
            stream = io.BytesIO()
            parquet.write_table(table, stream, **options)
            return stream.getvalue()

        return write

    def said(**metadata: str | bytes) -> pa.Table:
        return good.replace_schema_metadata(metadata)

    evil = pickle.dumps(Calls(exec, TOUCH), 0).decode("latin1")
    index = {"index_columns": [{"kind": "range", "name": None, "start": 0, "stop": 2**60, "step": 1}], "columns": []}
    columns = {"index_columns": [], "columns": [{"name": "value", "field_name": "value", "pandas_type": evil,
               "numpy_type": f"__import__('os').system('touch {CANARY}')", "metadata": {"pickled": evil}}]}  # fmt: skip
    whole = written(good)()
    long = pa.table({**words, "method": ["x" * 2**20], "value": [1.0], "stderr": [0.0]})
    twice = pa.Table.from_arrays([*good.columns, good.column(0)], [*good.column_names, "method"])

    def many() -> bytes:
        word = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**20, np.int8)), ["a"])
        numbers = dict.fromkeys(("value", "stderr"), np.zeros(2**20))
        table = pa.table({**dict.fromkeys(words, word), **numbers})
        stream = io.BytesIO()
        with parquet.ParquetWriter(stream, table.schema) as writer:
            for _ in range(24):
                writer.write_table(table)
        return stream.getvalue()

    found: dict[str, Callable[[], bytes]] = {
        "many rows in few bytes": many,
        "a word of a megabyte in 200 rows": lambda: written(pa.concat_tables([long] * 200))(),
        "compression by zstd": written(good, compression="zstd"),
        "compression by gzip": written(good, compression="gzip"),
        "words as bytes": written(good.set_column(0, "method", pa.array([b"\xff\xfe"]))),
        "words as numbers": written(good.set_column(0, "method", pa.array([1]))),
        "words as lists": written(good.set_column(0, "method", pa.array([["a"]]))),
        "words that are missing": written(good.set_column(0, "method", pa.array([None], pa.string()))),
        "numbers as words": written(good.set_column(4, "value", pa.array(["1"]))),
        "numbers that are NaN": written(good.set_column(4, "value", pa.array([float("nan")]))),
        "numbers that are missing": written(good.set_column(4, "value", pa.array([None], pa.float64()))),
        "no columns": written(pa.table({"x": [1]})),
        "a column twice": written(twice),
        "no table": lambda: b"hello",
        "nothing": lambda: b"",
        "a footer of 2 GiB": lambda: whole[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "a footer of no bytes": lambda: whole[:-8] + struct.pack("<I", 0) + b"PAR1",
        "a pickle": lambda: pickle.dumps(Calls(exec, TOUCH)),
    }
    for share in (0.1, 0.5, 0.9):
        found[f"cut at {share:.0%}"] = lambda share=share: whole[: int(share * len(whole))]
    found |= {
        f"harmless: {name}": written(table)
        for name, table in {
            "pandas' metadata with a pickle": said(pandas=json.dumps(columns)),
            "pandas' metadata with 2^60 rows": said(pandas=json.dumps(index)),
            "pandas' metadata that are no JSON": said(pandas="{"),
            "pandas' metadata 10,000 deep": said(pandas="[" * 10_000 + "]" * 10_000),
            "attributes of pandas": said(PANDAS_ATTRS=evil),
        }.items()
    }
    return found


def data_files() -> Iterator[Case]:
    """Files of data sets."""
    idx = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 28, 28) + bytes(2 * 784)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

    def mnist(content: Callable[[], bytes]) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            for name in names:
                (folder / "data/mnist").mkdir(parents=True, exist_ok=True)
                (folder / f"data/mnist/{name}-ubyte.gz").write_bytes(content())
            return folder / f"data/mnist/{names[0]}-ubyte.gz"

        return write

    def one(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
        return _file(f"data/{name}", content)

    packed = gzip.compress(idx, mtime=0)
    shape = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 4)
    gz = {
        "a bomb": lambda: gzip.compress(bytes(HUGE), 6),
        "no gzip": lambda: b"hello",
        "nothing": lambda: b"",
        "a wrong sum": lambda: packed[:-8] + bytes(4) + packed[-4:],
        "a wrong length": lambda: packed[:-4] + b"\xff\xff\xff\x7f",
        "cut in the middle": lambda: packed[: len(packed) // 2],
        "bytes behind the end": lambda: packed + b"hello",
        "an archive instead": lambda: archive({"../../evil": b"x"}),
        "a tar with links": lambda: gzip.compress(tar({"../../evil": b"x"}, {"link": "/etc/passwd"})),
        "a pickle": lambda: gzip.compress(pickle.dumps(Calls(exec, TOUCH))),
    }
    for name, made in gz.items():
        for which, write in (("mnist", mnist(made)), ("weather", one("weatherHistory.csv.gz", made))):
            yield Case("data sets", f"{which}: {name}", (f"data {which}", f"check {which}"), write)
    for name, content in {
        "sides whose product overflows": gzip.compress(shape + bytes(16)),
        "255 dimensions": gzip.compress(bytes([0, 0, 8, 255]) + bytes(2000)),
        "floats": gzip.compress(bytes([0, 0, 13, 3]) + idx[4:]),
        "one image for all four files": packed,
        "blanked": gzip.compress(bytes(len(idx))),
    }.items():
        yield Case("data sets", f"mnist: {name}", ("data mnist", "check mnist"), mnist(lambda content=content: content))
    yield Case("data sets", "mnist: images that are all black", ("data mnist", "check mnist"), _black)
    yield Case("data sets", "mnist: labels of no class", ("data mnist", "check mnist"), _mislabelled)
    xz = {
        "a bomb": lambda: _xz(bytes(HUGE)),
        "no xz": lambda: b"hello",
        "a dictionary of 1.5 GiB": lambda: _xz(bytes(3073), 1536 * 2**20),
        "cut in the middle": lambda: _xz(bytes(3073 * 5))[:-20],
        "a wrong sum": lambda: _flipped(_xz(os.urandom(3073)), b"\xfd7zXZ"),
        "bytes behind the end": lambda: _xz(bytes(3073)) + b"hello",
        "records of another length": lambda: _xz(bytes(3074)),
        "labels of no class": lambda: _xz(b"\xff" * 3073),
    }
    for name, made in xz.items():
        for file in ("train_first4000", "test_first1000"):

            def both(folder: Path, made: Callable[[], bytes] = made, file: str = file) -> Path:
                for each in ("train_first4000", "test_first1000"):
                    content = made() if each == file else _xz(bytes(range(1)) + os.urandom(3072))
                    _file(f"data/cifar10-subset/{each}.bin.xz", content)(folder)
                return folder / f"data/cifar10-subset/{file}.bin.xz"

            yield Case("data sets", f"cifar10-subset ({file}): {name}", ("data cifar10-subset",), both)
    tables = {
        "ecoli.csv.gz": ("ecoli", "mcg,gvh,lip,chg,aac,alm1,alm2,class\n", "1,1,1,1,1,1,1,cp\n"),
        "kc_house_data.csv.gz": ("house", "id,date,price\n", "1,20140501,1\n"),
    }
    for file, (which, head, row) in tables.items():
        for name, text in {
            "a cell of code": head + row.replace("1", "=cmd()", 1),
            "a missing number": head + row.replace("1", "", 1) * 2,
            "an infinite number": head + row.replace("1", "inf", 1) * 2,
            "no rows": head,
            "a class that is none": head + row.replace("cp", "\x1b[31mcp"),
            "a million columns": ",".join("c" for _ in range(100_000)) + "\n" + row,
            "a quote that never ends": head + '"' + "x" * 2**20,
            "bytes that are no text": head + "\udcff",
        }.items():
            content = gzip.compress(text.encode("utf-8", "surrogateescape"))
            yield Case("data sets", f"{which}: {name}", (f"data {which}",), one(file, lambda c=content: c))


def _idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def _mnist(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for name, part in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        _file(f"data/mnist/{name}-images-idx3-ubyte.gz", _idx(images[part]))(folder)
        _file(f"data/mnist/{name}-labels-idx1-ubyte.gz", _idx(labels[part]))(folder)
    return folder / "data/mnist/train-images-idx3-ubyte.gz"


def _black(folder: Path) -> Path:
    return _mnist(folder, np.zeros((80, 28, 28)), np.arange(80) % 10)


def _mislabelled(folder: Path) -> Path:
    _mnist(folder, np.random.default_rng(0).integers(0, 256, (80, 28, 28)), np.full(80, 200))
    return folder / "data/mnist/train-labels-idx1-ubyte.gz"


def _xz(content: bytes, dictionary: int = 2**20) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    packed = bytearray(lzma.compress(content, lzma.FORMAT_XZ, filters=filters))
    if dictionary != 2**20:  # its size is a byte of the block's header, which has a sum of its own
        place = packed.find(b"\x21\x01", 12)
        packed[place + 2] = 36 if dictionary > 2**30 else 30
        length = 4 * (packed[12] + 1)
        import zlib

        struct.pack_into("<I", packed, 12 + length - 4, zlib.crc32(bytes(packed[12 : 12 + length - 4])))
    return bytes(packed)


def storages() -> Iterator[Case]:
    """Optuna's storages."""
    import sqlite3

    def database(*statements: str) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            with sqlite3.connect(folder / "study.db") as made:
                for each in statements:
                    made.execute(each)
            made.close()
            return folder / "study.db"

        return write

    yield Case("storages", "no database", ("storage",), _file("study.db", b"hello" * 100))
    yield Case("storages", "a pickle", ("storage",), _file("study.db", pickle.dumps(Calls(exec, TOUCH))))
    yield Case("storages", "other tables", ("storage",), database("create table studies (x text)"))
    yield Case(
        "storages", "a version that is none", ("storage",),
        database("create table version_info (version_info_id integer primary key, schema_version integer, "
                 "library_version text)", "insert into version_info values (1, 99, 'x')"),
    )  # fmt: skip
    for url in ("nothing", "sqlite", "evil+driver://x", "mysql+pickle://x", "os://system", "sqlite:////no/such/x.db"):
        yield Case("storages", f"the address {url}", ("storage url",), _file("url", url.encode()), named="storage")


def cases() -> list[Case]:
    """All of them."""
    parts = (
        checkpoints(), states(), safetensors_files(), yaml_texts(), json_texts(), array_files(), parquet_files(),
        data_files(), storages(),
    )  # fmt: skip
    return [case for part in parts for case in part]
