"""Several real processes of one process group (gloo), each running the same function; what each of them saved."""

import multiprocessing
import time
from datetime import timedelta

import torch

TIMEOUT = 240
"""Seconds after which a process that hangs is given up: a safety net, nothing depends on it."""
IMPORTED = (
    "pandas", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "fisherviz.comparison.compare",
    "fisherviz.optim",
)  # fmt: skip
"""What functions import on their way, torch itself some of it: once for all, before processes are forked."""


def run(function, count, folder, *arguments):
    """The results of `function(*arguments)` in `count` processes by rank, None of one that was killed."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([function.__module__, *IMPORTED])
    folder.mkdir()
    started = [server.Process(target=_work, args=(function, rank, count, folder, arguments)) for rank in range(count)]
    for process in started:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    found = [folder / str(rank) for rank in range(count)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in found]


def _work(function, rank, count, folder, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # processes may be seeded differently
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
    )
    torch.save(function(*arguments), folder / str(rank))
    torch.distributed.destroy_process_group()
