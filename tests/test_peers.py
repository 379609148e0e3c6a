"""The same quantities by other public libraries (the bench extra): evidence, where their scale is understood.

Products are compared, not factors: the libraries spread constants differently over the two Kronecker factors.
Everything is in float64 on networks of a few dozen parameters. Run by `make peers`.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import fisherviz as fv

pytestmark = pytest.mark.peers
N = 7


def dense_network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()


def convolution():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 2 * 2, 3)
    ).double()


NETWORKS = {"dense": (dense_network, (N, 4)), "convolution": (convolution, (N, 2, 4, 4))}


@pytest.fixture(params=NETWORKS)
def network(request):
    """A model, inputs and labels."""
    make, shape = NETWORKS[request.param]
    return make(), torch.randn(shape, dtype=torch.float64), torch.randint(3, (N,))


@pytest.fixture
def curvlinops():
    return pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed (bench extra)")


@pytest.fixture
def nngeometry():
    pytest.importorskip("nngeometry", reason="nngeometry is not installed (bench extra)")
    import nngeometry.metrics
    import nngeometry.object

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # it makes tensors of its own in the default type
    yield nngeometry
    torch.set_default_dtype(before)


@pytest.fixture
def backpack():
    return pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed (bench extra)")


def assert_close(theirs, ours, tolerance=1e-8):
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance * float(ours.abs().max()))


# ---- curvlinops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [("categorical", nn.CrossEntropyLoss()), (nn.MSELoss(), nn.MSELoss()), ("bernoulli", nn.BCEWithLogitsLoss())],
    ids=["categorical", "mean-squared error", "bernoulli"],
)
def test_exact_fisher_is_the_gauss_newton_matrix_of_curvlinops(curvlinops, network, likelihood, loss):
    model, x, y = network
    if not isinstance(loss, nn.CrossEntropyLoss):
        y = torch.randint(2, (N, 3)).double()
    operator = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)])
    theirs = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    # BCEWithLogitsLoss averages over the three outputs, the likelihood of the same name adds
    scale = 3 if likelihood == "bernoulli" else 1
    assert_close(scale * theirs, fv.Probe(model, likelihood).fisher(x).to_dense())


def _curvlinops_kfac(cls, network, **options):
    model, x, y = network
    return cls(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], fisher_type="type-2",
        separate_weight_and_bias=False, check_deterministic=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_kfac_is_that_of_curvlinops(curvlinops, network, setting):
    model, x, _ = network
    operator = _curvlinops_kfac(curvlinops.KFACLinearOperator, network, kfac_approx=setting)
    ours = fv.approximate(fv.Probe(model, "categorical").fisher(x), "kfac", setting=setting)
    assert_close(operator @ torch.eye(operator.shape[1], dtype=torch.float64), ours.to_dense())


def test_ekfac_is_that_of_curvlinops(curvlinops, network):
    model, x, _ = network
    operator = _curvlinops_kfac(curvlinops.EKFACLinearOperator, network)
    ours = fv.approximate(fv.Probe(model, "categorical").fisher(x), "ekfac")
    assert_close(operator @ torch.eye(operator.shape[1], dtype=torch.float64), ours.to_dense(), 1e-6)


# ---- nngeometry ------------------------------------------------------------------------------------------------------


def _nngeometry(nngeometry, network, representation):
    model, x, y = network
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=len(x))
    return nngeometry.metrics.FIM(model, loader, getattr(nngeometry.object, representation))


def test_exact_fisher_is_that_of_nngeometry(nngeometry, network):
    model, x, _ = network
    ours = fv.Probe(model, "categorical").fisher(x).to_dense()
    assert_close(_nngeometry(nngeometry, network, "PMatDense").to_torch(), ours)


def test_kfac_is_that_of_nngeometry(nngeometry, network):
    model, x, _ = network
    theirs = _nngeometry(nngeometry, network, "PMatKFAC").to_torch(split_weight_bias=True)
    assert_close(theirs, fv.approximate(fv.Probe(model, "categorical").fisher(x), "kfac").to_dense())


# ---- BackPACK --------------------------------------------------------------------------------------------------------


def _with_backpack(backpack, network, extension):
    model, x, y = network
    extended = backpack.extend(copy.deepcopy(model))
    loss = backpack.extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack.backpack(extension):
            loss(extended(x), y).backward()
    return extended


def test_exact_diagonal_is_that_of_backpack(backpack, network):
    from backpack.extensions import DiagGGNExact

    model, x, _ = network
    extended = _with_backpack(backpack, network, DiagGGNExact())
    theirs = torch.cat([p.diag_ggn_exact.reshape(-1) for p in extended.parameters()])
    assert_close(theirs, fv.Probe(model, "categorical").fisher(x).diagonal())


def test_kfac_is_that_of_backpack_where_weights_and_biases_do_not_meet(backpack):
    from backpack.extensions import KFLR

    make, shape = NETWORKS["dense"]
    network = make(), torch.randn(shape, dtype=torch.float64), torch.randint(3, (N,))
    model, x, _ = network
    extended = _with_backpack(backpack, network, KFLR())
    ours = fv.approximate(fv.Probe(model, "categorical").fisher(x), "kfac")
    for module, theirs in zip(model, extended, strict=True):
        if isinstance(module, nn.Linear):
            name = next(n for n, m in model.named_modules() if m is module)
            block = ours.block(name, name)
            weights = module.weight.numel()
            assert_close(torch.kron(*theirs.weight.kflr), block[:weights, :weights])
            assert_close(theirs.bias.kflr[0], block[weights:, weights:])
