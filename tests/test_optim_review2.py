"""What optimizers meet in practice: shuffled loaders, layers that run later, checkpoints, changed groups."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from fisherviz import optim
from fisherviz.batches import Batches
from tests.optim_oracle import data, net


def test_the_fisher_may_come_from_a_loader_that_shuffles():
    model, (x, y) = net(), data(8)
    shuffles = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    opt = optim.SubsampledNaturalGradient(model, "categorical", fisher_data=shuffles)
    drawn = []
    for _ in range(6):  # three epochs of two batches
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        drawn.append(next(iter(opt._fisher.values())).a[:, 0, :-1].clone())
    rows = [{tuple(row.tolist()) for row in torch.cat(drawn[i : i + 2])} for i in (0, 2, 4)]
    assert rows[0] == rows[1] == rows[2] == {tuple(row.tolist()) for row in x}
    assert not torch.equal(drawn[0], drawn[2])


def test_a_stream_of_batches_may_change_and_data_of_several_passes_may_not():
    passes = iter([[torch.zeros(2, 1)], [torch.ones(3, 1)], [torch.zeros(2, 1)], [torch.ones(3, 1)]])

    class Changing:
        def __iter__(self):
            return iter(next(passes))

    stream = Batches(Changing(), repeats=False)
    assert [len(x) for _ in range(2) for x, _ in stream] == [2, 3]
    assert stream.fingerprint == ""
    same = Batches(Changing())
    list(same)
    with pytest.raises(RuntimeError, match="saw other examples"):
        list(same)
