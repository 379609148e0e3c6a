"""What torch writes, with anything inside: archives of all its releases, pickles that call."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

from benchmarks.trust.hostile_files.case import CANARY, TOUCH, Calls


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
