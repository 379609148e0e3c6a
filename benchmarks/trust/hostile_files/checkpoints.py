"""Weights, and states of runs."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.trust.hostile_files.case import HUGE, Case, holding, swollen
from benchmarks.trust.hostile_files.torch_files import (
    archive,
    old_stream,
    old_tensor,
    payloads,
    tar,
    tensor,
    torch_archive,
)


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
            yield Case("pickles", f"{name} in {form}", doors, holding("weights.pt", whole))
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
        yield Case("claimed sizes", name, doors, holding("weights.pt", archive(torch_archive(pickled, storages))))
    for count in (2**31, 2**40, 2**62):
        content = old_stream(old_tensor(count, 2), ("0",), struct.pack("<q", count) + bytes(64))
        yield Case("claimed sizes", f"torch before 1.6: {count:,} numbers", doors, holding("weights.pt", content))
    whole = archive(torch_archive(good, data))
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        cut = whole[: int(share * len(whole))]
        yield Case("truncated", f"a torch archive cut at {share:.0%}", doors, holding("weights.pt", cut))
    zeros = bytes(HUGE)
    bombs = {
        "an entry of zeros": lambda: archive(torch_archive(good, {"0": zeros}), zipfile.ZIP_DEFLATED),
        "a pickle of zeros": lambda: archive(torch_archive(zeros), zipfile.ZIP_DEFLATED),
        "two entries of one name": lambda: archive(torch_archive(good, data)) + b"",
        "a torchscript archive": lambda: archive(torch_archive(good, data, **{"archive/constants.pkl": good})),
        "an archive in a pickle's place": lambda: archive(torch_archive(whole, data)),
        "names that leave the folder": lambda: archive({f"../../{k}": v for k, v in torch_archive(good, data).items()}),
        "entries that claim more than there is": lambda: swollen(whole),
    }
    for name, content in bombs.items():
        if name != "two entries of one name":
            yield Case("archives", f"torch: {name}", doors, holding("weights.pt", content))


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
