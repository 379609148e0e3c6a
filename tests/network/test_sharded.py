"""Parameters of which a process holds a part are refused where the model is given."""

import pytest
import torch
from torch import distributed, nn

import fisherviz as fv

tensor = pytest.importorskip("torch.distributed.tensor")
fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def by_hand(net, mesh):
    """As tensor parallelism leaves it."""
    net[2].weight = nn.Parameter(tensor.distribute_tensor(net[2].weight.detach(), mesh, [tensor.Shard(0)]))
    return net


def fsdp1(net, mesh):
    return fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu"))


def fsdp2(net, mesh):
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no public fully_shard")
    return fsdp.fully_shard(net, mesh=mesh)


@pytest.mark.parametrize(
    ("shard", "sentence"),
    [
        (by_hand, r"'2\.weight' is a DTensor .* use whole parameters, as DistributedDataParallel does\."),
        (fsdp2, r"'0\.weight' is a DTensor .* use whole parameters, as DistributedDataParallel does\."),
        (fsdp1, r"module '\(root\)' is FullyShardedDataParallel, .* use whole parameters, as DistributedDataPar"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_sharded_parameters_are_refused_with_the_reason(mesh, shard, sentence):
    net = shard(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), mesh)
    with pytest.raises(TypeError, match=sentence):
        fv.Probe(net, "categorical")
    with pytest.raises(TypeError, match=sentence):
        fv.optim.FOOF(net, "categorical")
