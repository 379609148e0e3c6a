"""The processes that torchrun has started a command in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from fisherviz.support.processes import ALONE, Processes

PATIENCE = timedelta(days=7)
"""That a process waits for others: their shares may take long, and one that ends is noticed by its connection."""


@contextmanager
def launched(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that share a command's work, for as long as it takes.

    Args:
        device: that was asked for.

    Yields:
        The processes, by torchrun's variables of the environment, and this one's device: each has a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Processes.of_group(), device
    finally:
        distributed.destroy_process_group()
