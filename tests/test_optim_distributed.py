"""Two processes with DistributedDataParallel take the steps of one process on the whole batch."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from fisherviz import optim
from tests.optim_oracle import assert_same, data, matrices, net

MAKE = {
    "foof": lambda m: optim.FOOF(m, "categorical", damping=0.1),
    "kfac": lambda m: optim.KFAC(
        m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1, kind="exact", T=2
    ),
    "tengrad": lambda m: optim.TENGraD(m, "categorical"),
}


def worker(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    found = {}
    for name, make in MAKE.items():
        inner = net()
        model = torch.nn.parallel.DistributedDataParallel(inner)
        opt = make(model)
        try:
            for k in range(3):
                x, y = data(12, seed=k)
                own = slice(0, 6) if rank == 0 else slice(6, 12)
                opt.zero_grad()
                F.cross_entropy(model(x[own]), y[own]).backward()
                opt.step()
            found[name] = [M.tolist() for M in matrices(inner)]
        except NotImplementedError as error:
            found[name] = str(error)
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_steps_like_one_process():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    for name in ("foof", "kfac"):
        model = net()
        opt = MAKE[name](model)
        for k in range(3):
            x, y = data(12, seed=k)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        for rank in range(2):
            found = [torch.tensor(M, dtype=torch.float64) for M in results[rank][name]]
            assert_same(found, matrices(model), 1e-10)
    assert "which other processes do not see" in results[0]["tengrad"]


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        optim.FOOF(torch.nn.DataParallel(net()), "categorical")
